"""The ladder on asyncio, where no AnyIO scope surrounds the work: ``Task.cancel`` delivers once by itself.

This is the fast way. It needs no cancel scope, so a handler that never waits pays for none. The only
thing that asyncio cannot tell is whether the work sits inside an AnyIO shield; that is the one look
into AnyIO's asyncio backend which this library takes. Without it, :mod:`._scoped` serves everything.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import suppress
from functools import partial
from types import coroutine
from typing import Any, cast
from weakref import ref

from starlette.types import Scope

from ._stepper import Reader, is_queues, only_waits
from .exceptions import RequestCancelled
from .ladder import DUE, FORCE, RUNNING, Ladder
from .policy import CancelPolicy

try:
    from anyio._backends import _asyncio as _anyio

    _states: Any = cast(Any, _anyio)._task_states.data  # of a WeakKeyDictionary, whose `get` would be a call more
except (ImportError, AttributeError):  # a later AnyIO: everything then goes the AnyIO way
    _states = None


def free_task() -> asyncio.Task[Any] | None:
    """The calling task if it is one of asyncio's and, as far as can be told, inside no AnyIO cancel scope."""
    if _states is None:
        return None
    try:
        task = asyncio.current_task()
    except RuntimeError:  # another backend than asyncio
        return None
    if (
        _states
        and task is not None
        and (state := _states.get(ref(task))) is not None
        and state.cancel_scope is not None
    ):
        return None
    return task


def is_shielded(task: asyncio.Task[Any], within: Any = None) -> bool:
    """Whether an AnyIO shield is between ``task`` and the scope ``within``, as far as can be told."""
    state = _states.get(ref(task)) if _states else None
    scope = state.cancel_scope if state is not None else None
    while scope is not None and scope is not within:
        if scope.shield:
            return True
        scope = scope._parent_scope
    return False


# Started eagerly, a watcher reads what is there already without a turn of the loop.
_EAGERLY: dict[str, Any] = {"eager_start": True} if sys.version_info >= (3, 12) else {}
_Task: Any = partial(asyncio.Task, **_EAGERLY)

Watcher = asyncio.Task[None] | Reader


def start(reader: Reader) -> Watcher:
    """Have the client watched for this reader."""
    if is_queues(reader.server_receive):
        reader.step_queue()
        return reader
    if only_waits(reader.server_receive):
        reader.step()
        return reader
    task: asyncio.Task[None] = _Task(reader.watch_on(), loop=asyncio.get_running_loop())  # eager, it must be told
    return task


def stop(watcher: Watcher) -> None:
    """Have it end. One that is a task does so in the next turn, if the loop will have one."""
    if isinstance(watcher, Reader):
        watcher.close_reader()
    elif not watcher.get_loop().is_closed():
        watcher.cancel()


class NativeLadder(Ladder):
    """Delivers by ``Task.cancel``, and takes its requests back by ``Task.uncancel``."""

    cheap_timers = True
    _arrived = False
    _within: Any = None

    def __init__(self, policy: CancelPolicy, scope: Scope, task: asyncio.Task[Any]) -> None:
        super().__init__(policy, scope)
        self._task = task
        self._cancelling = task.cancelling()
        self._requests = 0
        self._watcher: Watcher | None = None
        self._helpers: tuple[asyncio.Task[Any], ...] = ()

    def take_over(self, cancelling: int, waits: int, waiting_for: Any, watcher: Watcher | None) -> None:
        """The work has been going on without a ladder.

        :param cancelling: how many cancellations of its task there were when it began
        :param waits: how often it has waited
        :param waiting_for: what it waits for, if it does
        :param watcher: what watches it, if something does
        """
        self._cancelling = cancelling
        self.waits = waits
        self._waiting_for = waiting_for
        self._watcher = watcher
        self._watched = watcher is not None

    def _swallows(self, exc: BaseException) -> bool:
        return isinstance(exc, asyncio.CancelledError) and self._requests > 0 and not self._take_back()

    def others_cancel(self) -> bool:
        return self._task.cancelling() > self._cancelling + self._requests

    def end(self) -> None:
        super().end()
        if self._requests:
            self._take_back()
        # Not awaited: that would cost every request a turn of the loop.
        if self._watcher is not None:
            stop(self._watcher)
            self._watcher = None
        for helper in self._helpers:
            stop(helper)
        self._helpers = ()

    def _take_back(self) -> bool:
        """Whether somebody else's request to cancel remains."""
        while self._requests and self._task.cancelling() > self._cancelling:
            self._requests -= 1
            self._task.uncancel()
        return self._task.cancelling() > self._cancelling

    def _deliver(self) -> bool:
        task = self._task
        if (task.cancelling() > self._cancelling and not self._insist) or not self._can_take():
            return False
        self._request()
        return True

    def _force(self) -> None:
        if self._can_take():
            self._request()

    def _can_take(self) -> bool:
        waiting_for = self._waiting_for
        if waiting_for is RUNNING or (isinstance(waiting_for, asyncio.Future) and waiting_for.done()):
            return False
        return not self.in_host() and not is_shielded(self._task, self._within)

    def _thrown(self, exc: BaseException) -> None:
        if not self._requests or not isinstance(exc, asyncio.CancelledError):
            return
        if self._arrived and self.state != FORCE and not self.others_cancel():
            self._requests = 0  # the work has taken ours back itself: this one is somebody else's
        self._arrived = True

    def _request(self) -> None:
        self._requests += 1
        self._task.cancel()

    def in_host(self) -> bool:
        return asyncio.current_task() is self._task

    def settle_from_thread(self) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._task.get_loop().call_soon_threadsafe(self._expect_error)

    def _expect_error(self) -> None:
        # Called before the thread's result arrives; that wakes the work first and calls `_settle_after` second.
        if isinstance(self._waiting_for, asyncio.Future):
            self._waiting_for.add_done_callback(self._settle_after)

    def _settle_after(self, wait: asyncio.Future[Any]) -> None:
        """The work has waited, and got the error or something else."""
        if self.state <= DUE and not wait.cancelled() and isinstance(wait.exception(), RequestCancelled):
            self._settle()

    @coroutine
    def _yield(self) -> Generator[None, None, None]:
        yield

    def turn(self) -> Awaitable[None]:
        return self._yield()

    def spawn(self, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._add_helper(_Task(function(), loop=self._task.get_loop()))

    def start_watcher(self, reader: Reader) -> None:
        self._watcher = start(reader)

    def pause_watcher(self) -> None:
        if isinstance(self._watcher, Reader) and self.in_host():
            self._watcher.close_reader()
            self._watcher = None
            self.unwatched()

    def enlist(self) -> None:
        """Have the calling task end with the work at the latest, as what is spawned does."""
        task = asyncio.current_task()
        assert task is not None
        self._add_helper(task)

    def _add_helper(self, helper: asyncio.Task[Any]) -> None:
        if len(self._helpers) > 1:
            self._helpers = tuple(helper for helper in self._helpers if not helper.done())
        self._helpers += (helper,)

    def call_later(self, seconds: float, function: Callable[[], object]) -> asyncio.TimerHandle:
        return self._task.get_loop().call_later(seconds, function)

    def _call_soon(self, function: Callable[[], object]) -> None:
        self._task.get_loop().call_soon(function)
