"""The ladder where AnyIO scopes are needed: under another scope on asyncio, and always on Trio."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

import anyio
import anyio.from_thread
from anyio.abc import TaskGroup
from starlette.types import Scope

from ._native import NativeLadder
from .ladder import DUE, FORCE, Ladder
from .policy import CancelPolicy


class ScopedLadder(NativeLadder):
    """asyncio, inside somebody's AnyIO scope, such as the task group of a ``BaseHTTPMiddleware``.

    Two nested scopes surround the work. Cancelling the outer one interrupts it, shields honoured; the inner
    one is shielded from then on, so that the cleanup can await: AnyIO's cancellation is level-triggered and
    would cancel it at each await. The shield also holds off a second cancellation from further out.
    """

    def __init__(self, policy: CancelPolicy, scope: Scope, task: asyncio.Task[Any]) -> None:
        super().__init__(policy, scope, task)
        self._within = self._outer = anyio.CancelScope()
        self._inner = anyio.CancelScope()

    def run(self, work: Coroutine[Any, Any, None]) -> Awaitable[None]:
        return super().run(_within(self._outer, self._inner, work))

    def _take_back(self) -> bool:  # AnyIO does it
        return self._task.cancelling() > self._cancelling

    def others_cancel(self) -> bool:  # by force AnyIO requests it again and again
        return self.state != FORCE and super().others_cancel()

    def _deliver(self) -> bool:
        if (self._task.cancelling() > self._cancelling and not self._insist) or not self._can_take():
            return False
        # Open for this one call, in which AnyIO cancels whom it can. Were the scope left open until the
        # work sees it, a work that awaits other tasks (`gather`) would cancel those again in every turn
        # until they are through with their cleanup.
        self._inner.shield = False
        self._outer.cancel()
        self._inner.shield = True
        self._requests += self._task.cancelling() - self._cancelling
        return self._requests > 0

    def _force(self) -> None:
        self._inner.cancel()

    def _thrown(self, exc: BaseException) -> None:
        """Let one cancellation from further out through, and shield the cleanup from its repetitions."""
        super()._thrown(exc)
        if self._inner.shield or not isinstance(exc, asyncio.CancelledError):
            return
        if anyio.current_effective_deadline() == -math.inf:
            self._inner.shield = True
            if anyio.current_effective_deadline() == -math.inf:  # it is a scope of the work's own
                self._inner.shield = False
            else:
                self._interrupted(self.policy.cleanup_timeout)


class GroupLadder(Ladder):
    """Any backend, through AnyIO's public API alone; used on Trio, with Trio's own level semantics.

    A shield around a cleanup would give it time there too, but it would also make every nursery inside
    believe that the cancellation was its own, and swallow it.
    """

    def __init__(self, policy: CancelPolicy, scope: Scope) -> None:
        super().__init__(policy, scope)
        self._outer = anyio.CancelScope()
        self._inner = anyio.CancelScope()
        self._host = anyio.get_current_task().id
        self._group: TaskGroup

    async def run(self, work: Coroutine[Any, Any, None]) -> None:
        error: BaseException | None = None
        try:
            async with anyio.create_task_group() as self._group:
                try:
                    await super().run(_within(self._outer, self._inner, work))
                except BaseException as exc:  # so that the group does not wrap it
                    error = exc
                # What has been reached is not to be lost to a cancellation that comes while the helpers end.
                self._group.cancel_scope.shield = True
                self._group.cancel_scope.cancel()
        finally:
            super()._over()
        if error is not None:
            try:
                raise error
            finally:
                del error

    def _over(self) -> None:
        """Not yet: its helpers end, which takes turns of the event loop."""

    def _settle(self) -> None:
        # What unwinds from an error of its own has had its interruption: no nursery will swallow that.
        self._inner.shield = True
        super()._settle()

    def settle_from_thread(self) -> None:
        with suppress(RuntimeError):  # AnyIO did not make this thread: nobody waits for it
            anyio.from_thread.run_sync(self.settle)

    def _swallows(self, exc: BaseException) -> bool:
        return False  # the outer scope has done so

    def _deliver(self) -> bool:
        if self.in_host():  # it may be about to unwind by itself; else its next wait is cancelled
            return False
        self._outer.cancel()
        return True

    def _force(self) -> None:
        self._inner.cancel()

    async def turn(self) -> None:
        await anyio.sleep(0)

    def in_host(self) -> bool:
        return anyio.get_current_task().id == self._host

    def spawn(self, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._group.start_soon(_two_turns_later, function)

    def call_later(self, seconds: float, function: Callable[[], object]) -> anyio.CancelScope:
        timer = anyio.CancelScope(shield=True)  # a cancellation from further out does not take the cleanup its end
        self._group.start_soon(sleep_then, timer, seconds, function)
        return timer

    def _call_soon(self, function: Callable[[], object]) -> None:
        # The work is about to wait. From here on Trio tries again by itself.
        self._outer.cancel()
        if self.state == DUE:
            self._interrupted(self.policy.cleanup_timeout)


async def _within(outer: anyio.CancelScope, inner: anyio.CancelScope, work: Coroutine[Any, Any, None]) -> None:
    with outer, inner:
        await work


async def _two_turns_later(function: Callable[[], Coroutine[Any, Any, None]]) -> None:
    # As on asyncio, a wait that is over at once is not worth a watcher.
    await anyio.sleep(0)
    await anyio.sleep(0)
    await function()


async def sleep_then(timer: anyio.CancelScope, seconds: float, function: Callable[[], object]) -> None:
    """A timer, where timers are tasks."""
    with timer:
        await anyio.sleep(seconds)
        function()
