"""Which addresses the server of this event loop listens at, and whether it still does.

A server that stops closes its listening sockets first, whatever made it stop: a signal, ``should_exit``, a limit
of requests (uvicorn, gunicorn), or a parent process that tells its workers by other means (Hypercorn). Every
server written in Python has one task that waits for that end, with the sockets among its local variables: as
asyncio's or uvloop's ``Server``, as Trio's ``SocketListener``. There we look; no server's own names are needed.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, TypeAlias

Address: TypeAlias = int | str
"""A port, or the path of a Unix socket."""
OLDEST = 20  # tasks: those of a server are among the first
MANY = 64  # a list of more is none of listening sockets
Still: TypeAlias = Callable[[], bool]


def address_of(server: tuple[str, int | None] | None) -> Address | None:
    """That of ``scope["server"]``."""
    return None if server is None else server[1] or server[0]


def listening() -> dict[Address, Still]:
    """For each address that the server listens at: whether it still does."""
    return {address: still for task in _tasks() for thing in _locals(task) for address, still in _addresses(thing)}


def _tasks() -> Iterable[Any]:
    """The outermost coroutines of the oldest tasks of the running event loop.

    Not of all: to look into a coroutine leaves some kilobytes with it, for the frame that Python makes of it.
    """
    try:
        return [task.get_coro() for task in sorted(asyncio.all_tasks(), key=_age)[:OLDEST]]
    except RuntimeError:
        return _tasks_of_trio()


def _tasks_of_trio() -> Iterable[Any]:
    tasks: list[Any] = [sys.modules["trio"].lowlevel.current_root_task()]
    for task in tasks:  # it grows
        tasks += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
        if len(tasks) > OLDEST:
            break
    return [task.coro for task in tasks[:OLDEST]]


def _age(task: asyncio.Task[Any]) -> int:
    """asyncio numbers its tasks; one that somebody gave a name is none of a server's first."""
    number = task.get_name().removeprefix("Task-")
    return int(number) if number.isdecimal() else sys.maxsize


def _locals(coroutine: Any) -> Iterator[object]:
    """What the frames of a suspended coroutine hold, and what their objects call ``servers``."""
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        for value in frame.f_locals.values():
            yield value
            yield getattr(value, "__dict__", {}).get("servers")
        coroutine = coroutine.cr_await


def _addresses(things: object) -> Iterator[tuple[Address, Still]]:
    if not isinstance(things, list) or len(things) > MANY:
        return
    for thing in things:
        with suppress(Exception):  # it only looked like one; or it is closed
            if inspect.getattr_static(thing, "is_serving", None) is not None:
                for socket in thing.sockets:
                    yield _name(socket), thing.is_serving
            elif (trio := sys.modules.get("trio")) and isinstance(thing, trio.SocketListener):
                yield _name(thing.socket), partial(_is_open, thing.socket)


def _is_open(socket: Any) -> bool:
    return bool(socket.fileno() >= 0)


def _name(socket: Any) -> Address:
    name: tuple[str, int] | str = socket.getsockname()
    return name[1] if isinstance(name, tuple) else name
