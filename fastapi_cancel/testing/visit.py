"""One request to an application, without a socket, by a client that may leave: its course, and what came of it."""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import anyio
from anyio.lowlevel import checkpoint
from starlette.types import ASGIApp, Scope

from ..channel import Channel
from ..policy import Cause
from ..protect import channel_of
from .backends import GIVE_UP
from .connection import ClientLeft, Connection
from .faults import Fault, Kind, fail_on
from .habits import Habits
from .moments import Moment
from .records import CURRENT, Record
from .sites import Stack, stack_of, stack_of_waiting, told
from .stepping import is_interruption

TURNS = 10
"""Of the event loop, in which what ends by itself has ended."""

READ = Channel.receive.__qualname__


class NeverCame(AssertionError):
    """The visit was over before the moment for which its client waited."""


class Visit(Connection):
    """A request, while it runs and once it is over.

    :ivar error: the exception that has reached the server
    :ivar lasted: seconds that the application went on for once the client had left
    :ivar left_at: where the work waited when the client left
    :ivar over: whether the application has returned
    :ivar cancelled: whether somebody has cancelled it: the server, or the test
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
        self._stalls = anyio.Event()
        self._failure: BaseException | None = None

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
        :raises RuntimeError: it is the application that waits
        """
        if CURRENT.get() is self._record:
            raise RuntimeError("until() is for the test: the application itself would end its own wait by waiting")
        self.prepare(moment)
        if moment.wait is not None:
            came = await self._came(moment.wait)
        else:
            while not moment.reached(self) and not self.over:
                await self._something()
            came = moment.reached(self)
        self.raise_failure()
        if not came:
            raise NeverCame(f"{self!r} was over before {moment!r}")

    async def _came(self, wait: Callable[[], Awaitable[object]]) -> bool:
        """Whether ``wait`` returns before the visit is over."""
        came = False

        async def come() -> None:
            nonlocal came
            await wait()
            came = True
            group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            group.start_soon(self.guarded, come)
            while not self.over and self._failure is None:
                await self._something()
            group.cancel_scope.cancel()
        return came

    async def _something(self) -> None:
        """Wait until something happens, on the connection or in the work."""
        self._news = self._news or anyio.Event()
        await self._news.wait()

    # -- its course --------------------------------------------------------------------------

    def begin(
        self, record: Record, leave: Moment | None, stall: Moment | None, resume: Moment | None
    ) -> list[Callable[[], Coroutine[Any, Any, None]]]:
        """Before the application is called.

        :return: what is to run beside it
        """
        self._record = record
        beside = [
            self._arrange(leave, self.leave),
            self._arrange(stall, lambda: self._stall_until(resume)),
            partial(self._wait, self._stalls.wait, resume, self.resume) if resume is not None and resume.wait else None,
        ]
        return [partial(self.guarded, each) for each in beside if each is not None]

    def _arrange(self, moment: Moment | None, action: Callable[[], object]) -> Callable[[], Awaitable[None]] | None:
        """Do something when a moment comes; at once if it is there.

        :return: a wait for it, if it takes one
        """
        if moment is None:
            return None
        self.prepare(moment)
        if moment.wait is not None:
            return partial(self._wait, checkpoint, moment, action)
        self._arranged.append((moment, action))
        self.look()
        return None

    def _stall_until(self, resume: Moment | None) -> None:
        self.stall()
        self._stalls.set()
        if resume is not None and resume.wait is None:
            self._arrange(resume, self.resume)

    async def _wait(self, first: Callable[[], Awaitable[object]], moment: Moment, action: Callable[[], object]) -> None:
        assert moment.wait is not None
        await first()
        await moment.wait()
        action()

    async def guarded(self, function: Callable[[], Awaitable[object]]) -> None:
        """Run something of the test's own."""
        try:
            await function()
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as exc:
            self.fail(exc)

    def fail(self, exc: BaseException) -> None:
        """Something of the test's own has failed: end the visit, for the test to hear of it."""
        self._failure = self._failure or exc
        self.leave()

    def raise_failure(self) -> None:
        """If there was one."""
        if self._failure is not None:
            raise self._failure

    async def run(self, app: ASGIApp) -> None:
        """The application's own task."""
        backend = self._record.backend
        try:
            if not self.habits.whole_body or await self.take_body():
                await self._record.run(_call(app, self))
        except BaseException as exc:
            # Not one that it got from a task of its own, by awaiting that.
            self.cancelled |= is_interruption(exc) and (not backend.counts or backend.requests() > 0)
            raise
        finally:
            self.over = True
            if self.left is not None:
                self.lasted = anyio.current_time() - self.left
            self.look()

    def judge(self, error: BaseException | None) -> None:
        """The application has ended by itself."""
        self.error = error
        self.given_up |= self.sending is not None  # in a helper that it does not wait for
        if isinstance(error, (Exception, BaseExceptionGroup)) and not isinstance(error, ClientLeft):
            self.blame("error", f"{error!r} reached the server, from\n{told(stack_of(error))}")
        elif self.left is None and not (self.completed or self.given_up or self.cancelled):
            self.blame("error", "the application returned without a complete response")
        if self.stolen is not None:
            first, second = self.stolen
            self.blame("body stolen", f"two readers at once, at\n{told(first)}\n  and at\n{told(second)}")
        if self.peeked is not None:
            self.blame("body stolen", f"is_disconnected() has taken a piece of it, at\n{told(self.peeked)}")

    def blame(self, kind: Kind, text: str) -> None:
        self._record.blame(kind, text)

    def go_on_no_more(self, text: str) -> None:
        """The application has had its time: what happens from here on is the test's own doing."""
        self.blame("went on", text)
        self._record.listening = False

    def look(self) -> None:
        """Something has happened."""
        self._channel = channel_of(self.scope) or self._channel
        if self._channel is not None and self.stolen is None and not self.body_complete:
            self._check_channel()
        for arranged in list(self._arranged):
            moment, action = arranged
            if self._is_there(moment) and arranged in self._arranged:
                self._arranged.remove(arranged)
                action()
        if self._news is not None:
            self._news.set()
            self._news = None

    def _is_there(self, moment: Moment) -> bool:
        try:
            return moment.reached(self)
        except BaseException as exc:  # the application is not to hear of it
            self._arranged.clear()
            self.fail(exc)
            return False

    def _check_channel(self) -> None:
        """On a protected route, it is the channel that two tasks read at once."""
        readers = [stack for stack in self._record.stacks() if any(site.function == READ for site in stack)]
        if len(readers) > 1:
            self.stolen = (readers[0], readers[1])

    @property
    def cause(self) -> Cause | None:
        """Why the library ended the work, if it did."""
        return self._channel.cause if self._channel is not None else None

    def leave(self) -> None:
        """The client goes away, if the visit is not over."""
        if self.over:
            return
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
    :param cancelled: for work that has had its time, and is cancelled; then it is ended by force
    """

    untold: float = 0.1
    cleanup: float = 5.0
    whole: float = 20.0
    cancelled: float = GIVE_UP

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not (isinstance(value, (int, float)) and value > 0):
                raise ValueError(f"{each.name}: seconds (> 0), not {value!r}")


async def _call(app: ASGIApp, visit: Visit) -> None:
    await app(visit.scope, visit.receive, visit.send)


async def settle(*records: Record) -> None:
    """Let what ends by itself end, and have nothing left that is only part of a reference cycle."""
    for turn in range(TURNS):
        if turn > 2 and not any(record.tasks() for record in records):
            break
        await checkpoint()
    if any(record.needs_collecting() for record in records):
        gc.collect()
