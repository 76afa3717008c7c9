"""A watcher without a task, where the server's ``receive`` needs none.

A task is there for what a ``receive`` may do: enter a timeout or a cancel scope, which bind to the task that
they are entered in, or set a context variable. That of some servers only waits for a future. Where it reaches
the channel as the server gave it, whoever reads it is stepped by the callbacks of these futures, in no task at
all, and closed where it waits: 3 µs less a request, and a task less that an idle stream keeps. Where it is the ``get``
of a queue, not even that is called: the reader waits at the queue itself.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

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

_get: Any = asyncio.Queue.get  # Hypercorn's and Daphne's
_has_getters = hasattr(asyncio.Queue, "_wakeup_next")
_plain: set[Any] = {_get}
_uvicorns: set[Any] = set()

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
    return method.__func__ in _plain or is_uvicorns(receive)


def is_queues(receive: Receive) -> bool:
    """Whether this is the ``get`` of a queue, of whose waiters we know as much as is needed."""
    method: Any = receive
    return type(receive) is MethodType and method.__func__ is _get and _has_getters


def is_uvicorns(receive: Receive) -> bool:
    """Whether this is uvicorn's, as we have read it."""
    if type(receive) is not MethodType:
        return False
    method: Any = receive
    function = method.__func__
    if function in _uvicorns:
        return True
    if function.__module__ in _UVICORN and _READ.issuperset(function.__code__.co_names):
        _uvicorns.add(function)
        return True
    return False


class Reader:
    """Reads the server's ``receive`` beside the work, for the channel that it is: in a task, or step by step."""

    __slots__ = ("_coming", "_future", "server_receive")

    server_receive: Receive
    _coming: Any  # the next message, as the coroutine that will return it; None: nobody steps it
    _future: Any  # for which it waits

    @abstractmethod
    def takes(self, message: Message) -> bool:
        """A message has come. Whether to read on."""

    @abstractmethod
    def fails(self, exc: Exception) -> None:
        """``receive`` has raised."""

    @abstractmethod
    def rests(self) -> None:
        """Nobody reads any more. The last call, unless the server's ``receive`` breaks off the whole program."""

    @abstractmethod
    async def watch_on(self) -> None:
        """Read in a task."""

    def step(self, future: object = None) -> None:
        """Read what only waits for futures of asyncio's, message by message; the first step at once.

        :param future: the one that was waited for
        """
        if future is not self._future:  # closed in the turn in which it was done, and begun anew perhaps
            return
        if future is None:
            self._coming = self.server_receive()
        try:
            while True:
                try:
                    self._future = self._coming.send(None)
                except StopIteration as came:
                    if not self.takes(came.value):
                        break
                    self._coming = self.server_receive()
                else:
                    self._future._asyncio_future_blocking = False  # as a task answers `await`
                    self._future.add_done_callback(self.step)
                    return
        except asyncio.CancelledError:
            pass
        except Exception as exc:
            self.fails(exc)
        self._coming = self._future = None
        self.rests()

    def step_queue(self, future: object = None) -> None:
        """As ``step``, where ``receive`` is the ``get`` of a queue: without a coroutine to make and to close.

        :param future: the one that was waited for
        """
        if future is not self._future:
            return
        queue = self._coming = self.server_receive.__self__  # type: ignore[attr-defined]
        try:
            while not queue.empty():
                if not self.takes(queue.get_nowait()):
                    break
            else:
                if getattr(queue, "_is_shutdown", False):  # Python 3.13
                    queue.get_nowait()  # raises
                self._future = asyncio.get_running_loop().create_future()
                queue._getters.append(self._future)
                self._future.add_done_callback(self.step_queue)
                return
        except Exception as exc:
            self.fails(exc)
        self._coming = self._future = None
        self.rests()

    def close_reader(self) -> None:
        """Close what is read step by step where it waits. It has ended when this returns."""
        coming, future = self._coming, self._future
        if coming is None:
            return
        if isinstance(coming, asyncio.Queue):
            future.remove_done_callback(self.step_queue)
            if not future.done():
                coming._getters.remove(future)  # type: ignore[attr-defined]
            elif not coming.empty():
                coming._wakeup_next(coming._getters)  # type: ignore[attr-defined]
        else:
            future.remove_done_callback(self.step)
            coming.close()
        self._coming = self._future = None
        self.rests()
