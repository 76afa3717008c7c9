"""The seam: how tasks are seen and run on asyncio and on Trio."""

from __future__ import annotations

import asyncio
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import Context
from inspect import iscoroutine
from typing import Any

import anyio

from .records import CURRENT, Record, Started, is_interruption, stepped
from .sites import stack_here

GIVE_UP = 5.0
"""Seconds for which cancelled work is awaited."""


class Backend(ABC):
    """What differs between asyncio and Trio. Made inside a running event loop."""

    @abstractmethod
    def install(self) -> None:
        """From now on, each task that is started for a record is noted and stepped."""

    @abstractmethod
    def remove(self) -> None:
        """Undo ``install``."""

    @abstractmethod
    def requests(self) -> int:
        """How often the running task has been asked to cancel, where that is counted."""

    @abstractmethod
    def interruption(self, value: Any, requests: int) -> BaseException | None:
        """The cancellation of the running task that its wait has ended with, if it did.

        :param requests: how many there had been before
        """

    @abstractmethod
    def alive(self, task: Any) -> bool:
        """Whether a task has not ended."""

    @abstractmethod
    def cancel(self, task: Any) -> None:
        """Cancel a task that is left over, where one can."""

    @abstractmethod
    def running(self, work: Coroutine[Any, Any, None]) -> AbstractAsyncContextManager[Running]:
        """Run ``work`` beside the block, as a server runs an application: in a task of its own."""

    @abstractmethod
    def aside(self, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run ``function`` by itself, for nobody's request."""


class Running:
    """Work that runs.

    :ivar ended: is set when it has
    :ivar error: what it raised
    """

    def __init__(self, cancel: Callable[[], object]) -> None:
        self.cancel = cancel
        self.ended = anyio.Event()
        self.error: BaseException | None = None

    async def run(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except BaseException as exc:
            self.error = exc
            if not isinstance(exc, (Exception, BaseExceptionGroup, asyncio.CancelledError)):
                raise
        finally:
            self.ended.set()


class AsyncioBackend(Backend):
    """asyncio: tasks come from a factory."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._before = self._loop.get_task_factory()
        self._ours = self._make
        self._aside: set[asyncio.Task[None]] = set()

    def install(self) -> None:
        self._loop.set_task_factory(self._ours)

    def remove(self) -> None:
        if self._loop.get_task_factory() is self._ours:  # else somebody builds on it
            self._loop.set_task_factory(self._before)

    def _make(self, loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Future[Any]:
        context: Context | None = options.get("context")
        record = CURRENT.get() if context is None else context.get(CURRENT)
        if record is None or not iscoroutine(work):
            return self._task(loop, work, options)
        started = Started(work.__qualname__, work, stack_here())
        task = self._task(loop, wrapped(work, record), options)
        record.started(task, started)
        return task

    def _task(self, loop: asyncio.AbstractEventLoop, work: Any, options: dict[str, Any]) -> asyncio.Future[Any]:
        if self._before is not None:
            return self._before(loop, work, **options)
        return asyncio.Task(work, loop=loop, **options)

    def requests(self) -> int:
        task = asyncio.current_task()
        assert task is not None
        return task.cancelling()

    def interruption(self, value: Any, requests: int) -> BaseException | None:
        return value if isinstance(value, asyncio.CancelledError) and self.requests() > requests else None

    def alive(self, task: Any) -> bool:
        return not task.done()

    def cancel(self, task: Any) -> None:
        task.cancel()

    def aside(self, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        task = self._loop.create_task(function(), context=Context())
        self._aside.add(task)
        task.add_done_callback(self._aside.discard)

    @asynccontextmanager
    async def running(self, work: Coroutine[Any, Any, None]) -> AsyncIterator[Running]:
        running = Running(lambda: task.cancel())
        task = self._loop.create_task(running.run(work))  # no AnyIO scope is around it, as on a server
        try:
            yield running
        finally:
            if not task.done():
                task.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait([task], timeout=GIVE_UP)


class TrioBackend(Backend):
    """Trio: an instrument hears of each task before its first step."""

    def install(self) -> None:
        sys.modules["trio"].lowlevel.add_instrument(self)

    def remove(self) -> None:
        sys.modules["trio"].lowlevel.remove_instrument(self)

    def task_spawned(self, task: Any) -> None:
        """Called by Trio."""
        record: Record | None = task.context.get(CURRENT)
        if record is not None:
            record.started(task, Started(task.name, task.coro, stack_here()))
            task.coro = wrapped(task.coro, record)

    def requests(self) -> int:
        return 0

    def interruption(self, value: Any, requests: int) -> BaseException | None:
        error = getattr(value, "error", None)  # Trio sends outcomes
        return error if isinstance(error, BaseException) and is_interruption(error) else None

    def alive(self, task: Any) -> bool:
        return task.coro.cr_frame is not None

    def cancel(self, task: Any) -> None:
        """A Trio task belongs to its nursery: nobody else can."""

    def aside(self, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        sys.modules["trio"].lowlevel.spawn_system_task(function, context=Context())

    @asynccontextmanager
    async def running(self, work: Coroutine[Any, Any, None]) -> AsyncIterator[Running]:
        async with anyio.create_task_group() as group:
            running = Running(group.cancel_scope.cancel)
            group.start_soon(running.run, work)
            yield running
            group.cancel_scope.cancel()


def current_backend() -> Backend:
    """That of the running event loop."""
    try:
        return AsyncioBackend()
    except RuntimeError:
        return TrioBackend()


def wrapped(work: Any, record: Record) -> Coroutine[Any, Any, Any]:
    """``work``, stepped for ``record``, under its own name."""

    async def run() -> Any:
        return await stepped(work, record)

    coroutine: Any = run()
    coroutine.__name__, coroutine.__qualname__ = work.__name__, work.__qualname__
    named: Coroutine[Any, Any, Any] = coroutine
    return named
