"""One request to an application, without a socket, by a client that may leave: its course, and what came of it."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from typing import Any

import anyio
from anyio.lowlevel import checkpoint
from starlette.types import ASGIApp, Scope

from ..channel import Channel
from ..policy import Cause
from ..protect import channel_of
from . import pools
from .backends import Running
from .connection import Connection
from .faults import Fault, Kind, fail_on
from .habits import Habits
from .moments import Moment
from .records import Record
from .sites import Stack, stack_of, stack_of_waiting, told
from .watching import watch

TURNS = 10
"""Of the event loop, in which what ends by itself has ended."""

POLL = 0.005
"""Seconds between two looks at work whose client has left."""

LOOKS = 20
"""At such work before it is blamed, however slow the machine."""


READ = Channel.receive.__qualname__


class NeverCame(AssertionError):
    """The visit was over before the moment for which its client waited."""


class Visit(Connection):
    """A request, while it runs and once it is over.

    :ivar error: the exception that has reached the server
    :ivar lasted: seconds that the application went on for once the client had left
    :ivar left_at: where the work waited when the client left
    :ivar over: whether the application has returned
    :ivar cancelled: whether the server has cancelled it
    """

    def __init__(self, scope: Scope, body: Iterable[bytes], habits: Habits) -> None:
        super().__init__(body, habits)
        self.scope = scope
        self.error: BaseException | None = None
        self.lasted: float | None = None
        self.over = False
        self.left_at: Stack = ()
        self._record: Record
        self._arranged: list[tuple[Moment, Callable[[], object]]] = []
        self._channel: Channel | None = None
        self.cancelled = False
        self._news: anyio.Event | None = None

    def __repr__(self) -> str:
        return f"<Visit {self.scope['method']} {self.scope['path']} {self.status}, {len(self.chunks)} chunks>"

    @property
    def faults(self) -> list[Fault]:
        """What the work should not have done."""
        return self._record.faults

    @property
    def waits(self) -> int:
        """How often the work has waited so far, in all its tasks."""
        return self._record.suspensions

    @property
    def where(self) -> str:
        """Where it waits now, in all its tasks: behind a ``BaseHTTPMiddleware`` the handler is in another one."""
        return self._record.everywhere()

    def assert_clean(self) -> None:
        """The work ended when its client had left, cleaned up, and neither left nor said anything.

        :raises AssertionError: it did not; names each fault, with the line to look at
        """
        __tracebackhide__ = True
        fail_on(self.faults, repr(self))

    async def until(self, moment: Moment) -> None:
        """Wait for a moment.

        :raises NeverCame: the visit is over and it has not come
        """
        if moment.wait is not None:
            await moment.wait()
            return
        while not moment.reached(self):
            if self.over:
                raise NeverCame(f"{self!r} was over before {moment!r}")
            self._news = self._news or anyio.Event()
            await self._news.wait()

    # -- its course --------------------------------------------------------------------------

    def begin(self, record: Record, leave: Moment | None, stall: Moment | None, resume: Moment | None) -> None:
        """Before the application is called."""
        self._record = record
        if leave is not None:
            self.cuts_at, self.stalls_at = leave.cuts_at, leave.stalls_at
        self._arrange(leave, self.leave)
        self._arrange(stall, lambda: self._stall_until(resume))

    def _stall_until(self, resume: Moment | None) -> None:
        self.stall()
        self._arrange(resume, self.resume)

    async def run(self, app: ASGIApp) -> None:
        """The application's own task."""
        try:
            await self._record.run(_call(app, self))
        finally:
            self.over = True
            if self.left is not None:
                self.lasted = anyio.current_time() - self.left
            self.look()

    def judge(self, error: BaseException | None) -> None:
        """The application has ended with ``error``."""
        self.error = error
        if isinstance(error, (Exception, BaseExceptionGroup)):
            self.blame("error", f"{error!r} reached the server, from\n{told(stack_of(error))}")
        elif self.left is None and not self.completed:
            self.blame("error", "the application returned without a complete response")
        if self.stolen is not None:
            first, second = self.stolen
            self.blame("body stolen", f"two readers at once, at\n{told(first)}\n  and at\n{told(second)}")
        if self.peeked is not None:
            self.blame("body stolen", f"is_disconnected() has taken a piece of it, at\n{told(self.peeked)}")

    def blame(self, kind: Kind, text: str) -> None:
        self._record.blame(kind, text)

    def _arrange(self, moment: Moment | None, action: Callable[[], object]) -> None:
        """Do something when a moment comes; at once if it is there."""
        if moment is not None and moment.wait is None:
            self._arranged.append((moment, action))
            self.look()

    def look(self) -> None:
        """Something has happened, on the connection or in the work."""
        self._channel = channel_of(self.scope) or self._channel
        if self._channel is not None and self.stolen is None and not self.body_complete:
            self._check_channel()
        for arranged in list(self._arranged):
            moment, action = arranged
            if moment.reached(self) and arranged in self._arranged:
                self._arranged.remove(arranged)
                action()
        if self._news is not None:
            self._news.set()
            self._news = None

    def _check_channel(self) -> None:
        """On a protected route, it is the channel that two tasks read at once."""
        readers = [stack for stack in self._record.stacks() if any(site.function == READ for site in stack)]
        if len(readers) > 1:
            self.stolen = (readers[0], readers[1])

    @property
    def cause(self) -> Cause | None:
        """Why the library ended the work, if it did."""
        return self._channel.ladder.cause if self._channel is not None else None

    def leave(self) -> None:
        """The client goes away."""
        if self.left is None:
            self.left_at = stack_of_waiting(self._record.suspended_in)
        super().leave()

    def was_told(self) -> bool:
        """Whether the work knows that the client has left."""
        return self.heard or self.cause is not None or self.cancelled


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a visit waits for the work behind it, in seconds.

    :param untold: from the client's leaving, for work that nobody tells of it
    :param cleanup: from the client's leaving, for work that knows
    :param whole: for a visit whose client stays
    """

    untold: float = 0.1
    cleanup: float = 5.0
    whole: float = 20.0

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not (isinstance(value, (int, float)) and value > 0):
                raise ValueError(f"{each.name}: seconds (> 0), not {value!r}")


@asynccontextmanager
async def visiting(
    app: ASGIApp,
    visit: Visit,
    *,
    upload: AsyncIterable[bytes] | None = None,
    leave: Moment | None = None,
    stall: Moment | None = None,
    resume: Moment | None = None,
    patience: Patience,
    watched: Sequence[Any] = (),
) -> AsyncIterator[Visit]:
    """Run ``app`` for one request, beside the block; then wait until it is over, and look at what it left."""
    over = watch()
    borrowed = [pools.in_use(pool) for pool in watched]
    with over.record(visit.look) as record:
        visit.begin(record, leave, stall, resume)
        async with anyio.create_task_group() as group:
            if upload is not None:
                group.start_soon(_upload, upload, visit)
            for moment, action in ((leave, visit.leave), (stall, visit.stall), (resume, visit.resume)):
                if moment is not None and moment.wait is not None:
                    group.start_soon(_act, moment.wait, action)
            async with over.backend.running(visit.run(app)) as running:
                try:
                    yield visit
                except BaseException:
                    visit.leave()
                    raise
                await _until_over(visit, running, patience)
            visit.judge(running.error)
            group.cancel_scope.cancel()
        await settle(record)
        record.look()
        for pool, before in zip(watched, borrowed, strict=True):
            if (more := pools.in_use(pool) - before) > 0:
                record.blame("not returned", f"{more} of {pools.name(pool)}")
        for task in record.tasks():
            over.backend.cancel(task)
        await settle(record)


async def _call(app: ASGIApp, visit: Visit) -> None:
    await app(visit.scope, visit.receive, visit.send)


async def _upload(pieces: AsyncIterable[bytes], visit: Visit) -> None:
    async for piece in pieces:
        visit.upload(piece)
    visit.end_upload()


async def _act(wait: Callable[[], Awaitable[object]], action: Callable[[], object]) -> None:
    await wait()
    action()


async def _until_over(visit: Visit, running: Running, patience: Patience) -> None:
    began = anyio.current_time()
    looks = 0
    while not running.ended.is_set():
        with anyio.move_on_after(POLL):
            await running.ended.wait()
        now = anyio.current_time()
        if visit.left is None:
            if now - began > patience.whole:
                visit.blame(
                    "went on", f"its client stayed, and it was not over after {now - began:.1f} s, at\n{visit.where}"
                )
                break
            continue
        looks += 1
        cancels_after = visit.habits.cancels_after
        if cancels_after is not None and not visit.cancelled and now - visit.left > cancels_after:
            visit.cancelled = True
            running.cancel()
        elif visit.was_told():
            if now - visit.left > patience.cleanup:
                visit.blame(
                    "went on", f"it knew that its client had left {now - visit.left:.1f} s ago, at\n{visit.where}"
                )
                break
        elif now - visit.left > patience.untold and looks > LOOKS:
            visit.blame("went on", f"nobody told it that its client had left, at\n{visit.where}")
            break


async def settle(*records: Record) -> None:
    """Let what ends by itself end, and have nothing left that is only part of a reference cycle."""
    for turn in range(TURNS):
        if turn > 2 and not any(record.tasks() for record in records):
            break
        await checkpoint()
    if any(record.needs_collecting() for record in records):
        gc.collect()
