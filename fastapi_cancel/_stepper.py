"""A watcher without a task, where the server's ``receive`` needs none.

A task is there for what a ``receive`` may do: enter a timeout or a cancel scope, which bind to the task that
they are entered in, or set a context variable. That of some servers only waits for a future. Where it reaches
the channel as the server gave it, whoever reads it is stepped by the callbacks of these futures, in no task at
all, and closed where it waits: 3 µs less a request, and a task less that an idle stream keeps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import MethodType
from typing import Any, Protocol, TypeVar

from starlette.types import Message, Receive

_UVICORN = frozenset({"uvicorn.protocols.http.h11_impl", "uvicorn.protocols.http.httptools_impl"})
# What its `receive` makes use of, as far as we have read it. A release that does something else gets a task again.
_READ = frozenset(
    {
        *("waiting_for_100_continue", "transport", "is_closing", "write"),
        *("h11", "InformationalResponse", "conn", "send"),
        *("disconnected", "response_complete", "flow", "resume_reading", "message_event", "wait", "clear"),
        *("bytes", "body", "more_body", "bytearray"),
    }
)

_plain: set[Any] = {asyncio.Queue.get}  # Hypercorn's and Daphne's

Function = TypeVar("Function", bound=Callable[..., Any])


def plain(function: Function) -> Function:
    """A method of that kind."""
    _plain.add(function)
    return function


def only_waits(receive: Receive) -> bool:
    """Whether all that ``receive`` does is to wait for futures of asyncio's, as far as is known."""
    if type(receive) is not MethodType:  # not by its attributes: a proxy, as tracers use them, forwards these
        return False
    method: Any = receive
    function = method.__func__
    if function in _plain:
        return True
    if function.__module__ in _UVICORN and _READ.issuperset(function.__code__.co_names):
        plain(function)
        return True
    return False


class Reader(Protocol):
    """Whom the messages are read for."""

    server_receive: Receive

    def takes(self, message: Message) -> bool:
        """A message has come. Whether to read on."""
        ...

    def fails(self, exc: Exception) -> None:
        """``receive`` has raised."""

    def rests(self) -> None:
        """Nobody reads any more. The last call, unless the server's ``receive`` breaks off the whole program."""

    def watch_on(self) -> Coroutine[Any, Any, None]:
        """Read in a task instead."""
        ...


class Stepper:
    """Reads what only waits for futures of asyncio's, message by message; its first step at once."""

    __slots__ = ("_future", "_reader", "_reading")

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._reading: Any = reader.server_receive()
        self._future: Any = None
        self._step()

    def _step(self, _: object = None) -> None:
        if self._reading is None:  # cancelled in the turn in which the future was done
            return
        try:
            while True:
                try:
                    self._future = self._reading.send(None)
                except StopIteration as came:
                    message = came.value
                else:
                    self._future._asyncio_future_blocking = False  # as a task answers `await`
                    self._future.add_done_callback(self._step)
                    return
                if not self._reader.takes(message):
                    break
                self._reading = self._reader.server_receive()
        except asyncio.CancelledError:
            pass
        except Exception as exc:
            self._reader.fails(exc)
        self._end()

    def cancel(self) -> None:
        """Close it where it waits. It has ended when this returns."""
        if self._reading is not None:
            self._future.remove_done_callback(self._step)
            self._reading.close()
            self._end()

    def _end(self) -> None:
        self._reading = self._future = None
        self._reader.rests()
