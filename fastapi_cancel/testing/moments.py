"""When a client leaves, stops reading or reads on: moments of a :class:`.visit.Visit`."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol

from anyio import sleep
from starlette._utils import is_async_callable

from .events import Event

if TYPE_CHECKING:
    from .visit import Visit


class Waitable(Protocol):
    """An event of asyncio, Trio or AnyIO."""

    def wait(self) -> Awaitable[object]: ...


class Moment:
    """A point in the course of a visit. It is there once ``reached`` says so, which is asked after all that happens.

    :param text: how to name it
    :param reached: looks at the visit
    :param wait: instead, something to wait for
    :param stalls_at: the chunk that the client does not read
    :param cuts_at: bytes of the request's body; a piece that goes beyond is cut in two
    """

    def __init__(
        self,
        text: str,
        reached: Callable[[Visit], bool] = lambda visit: False,
        wait: Callable[[], Awaitable[object]] | None = None,
        stalls_at: int | None = None,
        cuts_at: int | None = None,
    ) -> None:
        self.text = text
        self.reached = reached
        self.wait = wait
        self.stalls_at = stalls_at
        self.cuts_at = cuts_at

    def __repr__(self) -> str:
        return self.text


def before_body() -> Moment:
    """Before the first byte of the request's body: the first ``receive`` says http.disconnect."""
    return Moment("before_body()", lambda visit: True)


def after_body(size: int) -> Moment:
    """Once the application has read ``size`` bytes of the request's body: the upload is cut there."""
    _check("size", size, 0)
    return Moment(f"after_body({size})", lambda visit: visit.uploaded >= size, cuts_at=size)


def after_start() -> Moment:
    """Once the response has started: status and headers are out, no byte of its body."""
    return Moment("after_start()", lambda visit: visit.status is not None)


def after_chunks(count: int) -> Moment:
    """Once ``count`` chunks of the response have come."""
    _check("count", count, 1)
    return Moment(f"after_chunks({count})", lambda visit: len(visit.chunks) >= count)


def after_event(match: str | Callable[[Event], bool]) -> Moment:
    """Once a server-sent event has come that matches.

    :param match: text that its data contains, or a function that looks at it
    :raises TypeError: it is neither
    """
    if not isinstance(match, str) and not callable(match):
        raise TypeError(f"match: text, or a function, not {match!r}")
    matches = (lambda event: match in event.data) if isinstance(match, str) else match
    return Moment(f"after_event({match!r})", lambda visit: any(map(matches, visit.events)))


def during_send(chunk: int = 1) -> Moment:
    """While the application sends a chunk, the first or a later one: ``send`` waits for a client that does not read,
    and then leaves."""
    _check("chunk", chunk, 1)
    return Moment(f"during_send({chunk})", lambda visit: visit.sending == chunk, stalls_at=chunk)


def at_wait(number: int) -> Moment:
    """When the work waits for the so-many-th time, in whichever of its tasks: its every ``await`` that does wait."""
    _check("number", number, 1)
    return Moment(f"at_wait({number})", lambda visit: visit.waits >= number)


def when(condition: Waitable | threading.Event | Callable[[], Any]) -> Moment:
    """When something outside happens.

    :param condition: an event of asyncio, Trio, AnyIO or ``threading``; a coroutine function that returns when the
        time has come; or a function that says whether it has, which is asked every millisecond
    :raises TypeError: it is none of these
    """
    name = f"when({getattr(condition, '__qualname__', repr(condition))})"
    for wait in (getattr(condition, "wait", None), condition):
        if is_async_callable(wait):
            return Moment(name, wait=wait)
    asked = getattr(condition, "is_set", condition)  # of a thread's or a process's event, whose `wait` would block
    if not callable(asked):
        raise TypeError(f"condition: an event or a function, not {condition!r}")
    return Moment(name, wait=lambda: _poll(asked))


async def _poll(function: Callable[[], Any]) -> None:
    while not function():
        await sleep(0.001)


def _check(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: a number (>= {least}), not {value!r}")
