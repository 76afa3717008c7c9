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
from typing import Any, TypeVar, cast

from starlette.types import Receive

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
    function = cast(Any, receive).__func__
    if function in _plain:
        return True
    if function.__module__ in _UVICORN and _READ.issuperset(function.__code__.co_names):
        plain(function)
        return True
    return False


class Stepper:
    """Runs a coroutine that only waits for futures of asyncio's; its first step at once."""

    __slots__ = ("_coroutine", "_future")

    def __init__(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._coroutine: Coroutine[Any, Any, None] | None = coroutine
        self._future: asyncio.Future[Any] | None = None
        self._step()

    def _step(self, _: object = None) -> None:
        if self._coroutine is None:  # cancelled in the turn in which the future was done
            return
        try:
            future = self._future = self._coroutine.send(None)
        except (StopIteration, asyncio.CancelledError):
            self._coroutine = self._future = None
        else:
            future._asyncio_future_blocking = False  # as a task answers `await`
            future.add_done_callback(self._step)

    def cancel(self) -> None:
        """Close it where it waits. It has ended when this returns."""
        if self._coroutine is not None:
            assert self._future is not None
            self._future.remove_done_callback(self._step)
            self._coroutine.close()
            self._coroutine = self._future = None
