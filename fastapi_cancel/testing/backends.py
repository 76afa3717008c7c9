"""The seam: how tasks are seen and run on asyncio and on Trio."""

from __future__ import annotations

import asyncio
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import Context
from functools import partial
from inspect import CORO_CREATED, getcoroutinestate, iscoroutine
from typing import Any

import anyio

from .records import CURRENT, Record, Started
from .sites import stack_here
from .stepping import Dropped, is_interruption, stepped

LASTING = {("sse_starlette.sse", "_shutdown_watcher")}
"""What a package starts once, whichever request is the first, for the whole life of the event loop."""

ANYIO = "TaskHandle._run_coro"
"""What the tasks of AnyIO's groups run on asyncio; it is their name that tells them apart."""

GIVE_UP = 5.0
"""Seconds for which cancelled work is awaited, before it is ended by force."""

POLL = 0.005
"""Seconds between two looks at work that does not end."""


class Backend(ABC):
    """What differs between asyncio and Trio. Made inside a running event loop.

    :ivar counts: whether requests to cancel a task are counted
    """

    counts: bool

    @abstractmethod
    def is_running(self) -> bool:
        """Whether the running event loop is still the one in which this was made."""

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
    def interruption(self, value: Any) -> BaseException | None:
        """The cancellation that a wait has ended with, if it did."""

    @abstractmethod
    def scopes(self) -> Collection[Any]:
        """Those that cancel the running task, where that can be seen."""

    @abstractmethod
    def alive(self, task: Any) -> bool:
        """Whether a task has not ended."""

    @abstractmethod
    def once_suspended(self, function: Callable[[], object]) -> None:
        """Call ``function`` when the running task waits, as it is about to."""

    def called(self, task: Any, function: str) -> str:
        """The name by which the user knows a task.

        :param function: that it runs
        """
        return function

    @abstractmethod
    def cancel(self, task: Any) -> bool:
        """Cancel a task that is left over. Whether one can."""

    @abstractmethod
    def wake(self, task: Any) -> None:
        """Have a task take its next step, whatever it waits for."""

    @abstractmethod
    def running(
        self, work: Coroutine[Any, Any, None], record: Record | None = None, patience: float = GIVE_UP
    ) -> AbstractAsyncContextManager[Running]:
        """Run ``work`` beside the block, as a server runs an application: in a task of its own.

        Work that still runs at the end of the block is cancelled, and has ended thereafter.

        :param record: of the work: what does not end when it is cancelled is ended by force
        :param patience: seconds before that
        """

    @abstractmethod
    def aside(self, function: Callable[[], Coroutine[Any, Any, None]], at_last: Callable[[], object]) -> None:
        """Run ``function`` by itself, for nobody's request.

        :param at_last: called when it has ended, or the event loop has before
        """

    async def _end(self, running: Running, record: Record | None, patience: float) -> None:
        if not running.ended.is_set():
            running.cancel()
            with anyio.CancelScope(shield=True):
                with anyio.move_on_after(patience):
                    await running.ended.wait()
                while record is not None and not running.ended.is_set():
                    running.forced = record.dropped = True
                    for task in (running.task, *record.tasks()):
                        self.wake(task)
                    await anyio.sleep(POLL)
        if running.error is not None and _is_for_the_test(running.error):
            raise running.error


class Running:
    """Work that runs.

    :ivar cancel: does so
    :ivar task: that runs it; on Trio, once it has begun
    :ivar ended: is set when it has
    :ivar error: what it raised
    :ivar forced: whether it had to be ended by force
    """

    cancel: Callable[[], object]

    def __init__(self) -> None:
        self.task: Any = None
        self.ended = anyio.Event()
        self.error: BaseException | None = None
        self.forced = False

    async def run(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except BaseException as exc:
            self.error = exc
        finally:
            self.ended.set()


def _is_for_the_test(exc: BaseException) -> bool:
    """Whether ``exc`` is neither an application's error nor its cancellation: KeyboardInterrupt, pytest's own ones."""
    if isinstance(exc, BaseExceptionGroup):
        return any(map(_is_for_the_test, exc.exceptions))
    return not isinstance(exc, (Exception, Dropped)) and not is_interruption(exc)


class AsyncioBackend(Backend):
    """asyncio: tasks come from a factory."""

    counts = True

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._before = self._loop.get_task_factory()
        self._ours = self._make
        self._aside: set[asyncio.Task[None]] = set()

    def is_running(self) -> bool:
        return asyncio._get_running_loop() is self._loop

    def install(self) -> None:
        self._loop.set_task_factory(self._ours)

    def remove(self) -> None:
        if self._loop.get_task_factory() is self._ours:  # else somebody builds on it
            self._loop.set_task_factory(self._before)

    def _make(self, loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Future[Any]:
        context: Context | None = options.get("context")
        record = CURRENT.get() if context is None else context.get(CURRENT)
        if record is None or not iscoroutine(work) or _lasts(work):
            return self._task(loop, work, options)
        started = Started(work.__qualname__, work, stack_here())
        task = self._task(loop, wrapped(work, record), options)
        task.add_done_callback(partial(_close_unstarted, work))
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

    def interruption(self, value: Any) -> BaseException | None:
        return value if isinstance(value, asyncio.CancelledError) else None

    def scopes(self) -> Collection[Any]:
        return ()

    def alive(self, task: Any) -> bool:
        return not task.done()

    def once_suspended(self, function: Callable[[], object]) -> None:
        function()

    def called(self, task: Any, function: str) -> str:
        return str(task.get_name()) if function == ANYIO else function

    def cancel(self, task: Any) -> bool:
        task.cancel()
        return True

    def wake(self, task: Any) -> None:
        task.cancel()

    def aside(self, function: Callable[[], Coroutine[Any, Any, None]], at_last: Callable[[], object]) -> None:
        task = self._loop.create_task(function(), context=Context())
        self._aside.add(task)
        task.add_done_callback(self._aside.discard)
        task.add_done_callback(lambda _: at_last())

    @asynccontextmanager
    async def running(
        self, work: Coroutine[Any, Any, None], record: Record | None = None, patience: float = GIVE_UP
    ) -> AsyncIterator[Running]:
        running = Running()
        task = running.task = self._loop.create_task(running.run(work))  # no AnyIO scope is around it, as on a server
        running.cancel = task.cancel
        task.add_done_callback(
            lambda _: running.ended.set()
        )  # cancelled before its first step, it does not do so itself
        task.add_done_callback(partial(_close_unstarted, work))
        try:
            yield running
        finally:
            await self._end(running, record, patience)


class TrioBackend(Backend):
    """Trio: an instrument hears of each task before its first step."""

    counts = False

    def __init__(self) -> None:
        self._once_suspended: list[Callable[[], object]] = []
        self._token = sys.modules["trio"].lowlevel.current_trio_token()

    def is_running(self) -> bool:
        trio = sys.modules["trio"]
        return bool(trio.lowlevel.in_trio_run() and trio.lowlevel.current_trio_token() is self._token)

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

    def once_suspended(self, function: Callable[[], object]) -> None:
        self._once_suspended.append(function)  # who waits for an event may not be woken before

    def after_task_step(self, task: Any) -> None:
        """Called by Trio."""
        while self._once_suspended:
            self._once_suspended.pop(0)()

    def requests(self) -> int:
        return 0

    def interruption(self, value: Any) -> BaseException | None:
        error = getattr(value, "error", None)  # Trio sends outcomes
        return error if isinstance(error, BaseException) and is_interruption(error) else None

    def scopes(self) -> Collection[Any]:
        found = []
        status = sys.modules["trio"].lowlevel.current_task()._cancel_status
        while status is not None:
            if status._scope._cancel_called:
                found.append(status._scope)
            status = None if status._scope._shield else status._parent
        return found

    def alive(self, task: Any) -> bool:
        return task.coro.cr_frame is not None

    def cancel(self, task: Any) -> bool:
        return False  # it belongs to its nursery

    def wake(self, task: Any) -> None:
        """A shield would keep a cancellation off: do what Trio does with one, down to its own names."""
        trio = sys.modules["trio"]
        if (abort := task._abort_func) is not None and abort(_drop) is trio.lowlevel.Abort.SUCCEEDED:
            trio.lowlevel.reschedule(task, sys.modules["outcome"].Error(Dropped()))

    def aside(self, function: Callable[[], Coroutine[Any, Any, None]], at_last: Callable[[], object]) -> None:
        async def run() -> None:
            try:
                with anyio.CancelScope(shield=True):  # Trio cancels its system tasks once the main one is over
                    await function()
            finally:
                at_last()

        sys.modules["trio"].lowlevel.spawn_system_task(run, context=Context())

    async def _run(self, running: Running, scope: anyio.CancelScope, work: Coroutine[Any, Any, None]) -> None:
        running.task = sys.modules["trio"].lowlevel.current_task()
        with scope:
            await running.run(work)

    @asynccontextmanager
    async def running(
        self, work: Coroutine[Any, Any, None], record: Record | None = None, patience: float = GIVE_UP
    ) -> AsyncIterator[Running]:
        running = Running()
        error: BaseException | None = None
        async with anyio.create_task_group() as group:
            scope = anyio.CancelScope(shield=True)  # what cancels the test does not reach into a server
            running.cancel = scope.cancel
            group.start_soon(self._run, running, scope, work)
            try:
                yield running
            except BaseException as exc:  # so that the group does not wrap it
                error = exc
            group.cancel_scope.shield = True
            try:
                await self._end(running, record, patience)
            except BaseException as exc:
                error = exc
        try:
            if error is not None:
                raise error
        finally:
            del error


def _close_unstarted(work: Coroutine[Any, Any, Any], task: object) -> None:
    """A task that is cancelled before its first step has awaited its coroutine, to asyncio. Not our wrapper."""
    if getcoroutinestate(work) == CORO_CREATED:
        work.close()


def _drop() -> None:
    raise Dropped


def current_backend() -> Backend:
    """That of the running event loop."""
    try:
        return AsyncioBackend()
    except RuntimeError:
        return TrioBackend()


def _lasts(work: Any) -> bool:
    return (work.cr_frame.f_globals.get("__name__"), work.__qualname__) in LASTING


def wrapped(work: Any, record: Record) -> Coroutine[Any, Any, Any]:
    """``work``, stepped for ``record``, under its own name."""

    async def run() -> Any:
        try:
            return await stepped(work, record)
        except Dropped:
            raise asyncio.CancelledError from None  # which nobody has to hear of

    coroutine: Any = run()
    coroutine.__name__, coroutine.__qualname__ = work.__name__, work.__qualname__
    named: Coroutine[Any, Any, Any] = coroutine
    return named
