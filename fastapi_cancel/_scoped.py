"""The ladder where AnyIO scopes are needed: under another scope on asyncio, and always on Trio.

Two nested scopes surround the work. Cancelling the outer one interrupts it, honouring shields and
worker threads; the inner one, an :class:`~._edge.Edge`, is shielded from the first delivery on, so the
cleanup can await. It also shields the work from a second cancellation that comes from further out, such
as the task group of a ``BaseHTTPMiddleware`` whose own task the server cancels.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import anyio
from anyio.abc import TaskGroup
from starlette.types import Scope

from ._edge import Edge
from ._native import NativeLadder
from .ladder import DUE, Ladder
from .policy import CancelPolicy


class ScopedLadder(NativeLadder):
    """asyncio, inside somebody's AnyIO scope."""

    def __init__(self, policy: CancelPolicy, scope: Scope, task: asyncio.Task[Any]) -> None:
        super().__init__(policy, scope, task)
        self._outer = anyio.CancelScope()
        self._edge = Edge(policy.cleanup_timeout)

    def run(self, work: Coroutine[Any, Any, None]) -> Awaitable[None]:
        return self._drive(_within(self._outer, self._edge.scope, work))

    def _take_back(self) -> bool:  # AnyIO does it
        return self._task.cancelling() > self._cancelling

    def _deliver(self) -> bool:
        if self._task.cancelling() > self._cancelling or not self._can_take():
            return False
        # Un-shielded for this one call, in which AnyIO cancels whom it can. Were the scope left open
        # until the work sees it, a work that awaits other tasks (`gather`) would cancel those again
        # in every turn until they are through with their cleanup.
        self._edge.scope.shield = False
        self._outer.cancel()
        self._edge.scope.shield = True
        self._requests += self._task.cancelling() - self._cancelling
        return self._requests > 0

    def _force(self) -> None:
        self._edge.scope.cancel()

    def _thrown(self, exc: BaseException) -> None:
        self._edge.thrown(exc)


class GroupLadder(Ladder):
    """Any backend, through AnyIO's public API alone: helpers are tasks of a task group."""

    def __init__(self, policy: CancelPolicy, scope: Scope) -> None:
        super().__init__(policy, scope)
        self._outer = anyio.CancelScope()
        self._edge = Edge(policy.cleanup_timeout)
        self._host = anyio.get_current_task().id
        self._group: TaskGroup

    async def run(self, work: Coroutine[Any, Any, None]) -> None:
        error: Exception | None = None
        async with anyio.create_task_group() as self._group:
            try:
                await self._drive(_within(self._outer, self._edge.scope, work))
            except Exception as exc:  # so that the group does not wrap it
                error = exc
            self._group.cancel_scope.cancel()
        if error is not None:
            try:
                raise error
            finally:
                del error

    def _swallows(self, exc: BaseException) -> bool:
        return False  # the outer scope has done so

    def _deliver(self) -> bool:
        self._outer.cancel()
        return False  # `_thrown` or `_sent` sees it arrive

    def _force(self) -> None:
        self._edge.scope.cancel()

    def _thrown(self, exc: BaseException) -> None:
        if self._edge.thrown(exc):
            self._arrived()

    def _sent(self, value: object) -> None:
        if self._edge.sent(value):
            self._arrived()

    def _arrived(self) -> None:
        if self.state is DUE:
            self._interrupted(self.policy.cleanup_timeout)

    def settle(self) -> None:
        super().settle()
        if self.cause is not None and self.in_host():
            self._edge.scope.shield = True

    def in_host(self) -> bool:
        return anyio.get_current_task().id == self._host

    def spawn(self, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._group.start_soon(function)

    def call_later(self, seconds: float, function: Callable[[], object]) -> anyio.CancelScope:
        timer = anyio.CancelScope()
        self._group.start_soon(_sleep_then, timer, seconds, function)
        return timer

    def _call_soon(self, function: Callable[[], object]) -> None:
        """Not needed: a cancelled AnyIO scope tries again by itself."""


async def _within(outer: anyio.CancelScope, inner: anyio.CancelScope, work: Coroutine[Any, Any, None]) -> None:
    with outer, inner:
        await work


async def _sleep_then(timer: anyio.CancelScope, seconds: float, function: Callable[[], object]) -> None:
    with timer:
        await anyio.sleep(seconds)
        function()
