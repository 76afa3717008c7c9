"""Work, stepped by hand: its waits are seen, its interruptions, and which of them ended a cleanup.

Theory of operation
===================

A cleanup is killed by a second interruption, which arrives while a first one is being handled. Python keeps that: the
first is then the context of the second. Three things look alike, and are none:

- *the cancellation of something else*: of a task that is awaited. asyncio counts the requests to cancel a task, and
  only with one more of them was it this one. Nor does a context count that the exception has brought along;
- *a first one that is over*: it was turned into a ``TimeoutError``, say, and is its cause;
- *a cleanup that limits itself*, by a timeout of its own: the second one ends inside of it, and so does the request.

On Trio it is seen at once which one it is: a scope that has interrupted the task before does so again at each wait that
is not shielded from it, while a cleanup's own timeout is a scope that has interrupted nobody yet.

On asyncio a kill passes the function in which the first one was being handled, or its request is taken back together
with that of the first one. After a cleanup's own timeout it is the first one that goes on. Hence an interruption stays
under suspicion until one or the other can be told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Generator, Iterator
from traceback import walk_tb
from types import FrameType, coroutine
from typing import Any, Protocol
from weakref import WeakSet

from starlette.requests import ClientDisconnect

from ..exceptions import ClientGone
from .sites import BY_HAND, frames_of_waiting


class Seam(Protocol):
    """What stepping must ask of asyncio or Trio."""

    @property
    def counts(self) -> bool:
        """Whether requests to cancel a task are counted."""
        ...

    def requests(self) -> int:
        """How often the running task has been asked to cancel, where that is counted."""
        ...

    def interruption(self, value: Any) -> BaseException | None:
        """The cancellation that a wait has ended with, if it did."""
        ...

    def scopes(self) -> Collection[Any]:
        """Those that cancel the running task, where that can be seen."""
        ...


class Told(Protocol):
    """Whom stepping tells."""

    dropped: bool
    """Whether the work shall end by force."""

    @property
    def backend(self) -> Seam: ...

    def suspended(self, work: Any) -> None:
        """The work is about to wait."""
        ...

    def judged(self, interruption: BaseException, killed: bool) -> None:
        """What came of that.

        :param killed: whether it has ended a cleanup
        """
        ...


class Dropped(BaseException):
    """Raised at each wait of work that does not end when it is cancelled."""


UNENDING: list[Any] = []
"""Work that did not end by that either. Python would have it end when it is freed, and complain."""

ENOUGH = 10
"""Times to raise it."""


class Interruption:
    """A cancellation of the running task, with which its wait has ended.

    :param exc: as it arrives
    :param requests: to cancel the task, before this one
    :param again: whether it comes from a scope that has interrupted the task before; ``None``: requests are counted
    """

    def __init__(self, exc: BaseException, requests: int, again: bool | None = None) -> None:
        self.exc = exc
        self._requests = requests
        self._again = again
        self._brought = exc.__context__
        self.later: list[BaseException] = []

    def has_killed(self, requests: int, over: bool, waiting: Collection[FrameType] = ()) -> bool | None:
        """Whether it has ended a cleanup; ``None``: that cannot be told yet.

        :param requests: by now
        :param over: whether the work has ended
        :param waiting: the functions in which it waits
        """
        first = self._first()
        if first is not None:
            if self._again is not None and type(first) is type(self.exc):
                return self._again
            if _outlives(self.exc, first, waiting):
                return True
            if _outlives(first, self.exc, waiting):
                return False
        if self._again is not None:
            return False if first is None or over else None
        if requests > self._requests and not over:
            return None
        return first is not None and requests != self._requests and _scope(first) == _scope(self.exc)

    def _first(self) -> BaseException | None:
        """The interruption that was being handled when this one arrived."""
        before = self.exc.__context__
        seen = {id(self._brought), *map(id, self.later)}  # a task group re-raises it in the context of a later one
        while before is not None and id(before) not in seen:
            if is_interruption(before):
                return before
            if before.__cause__ is not None and is_interruption(before.__cause__):
                return None
            seen.add(id(before))
            before = before.__context__
        return None


def is_interruption(exc: BaseException) -> bool:
    """Whether ``exc`` tells the work that it shall end."""
    if isinstance(exc, (asyncio.CancelledError, ClientDisconnect, ClientGone)):
        return True
    return type(exc).__name__ == "Cancelled" and type(exc).__module__.partition(".")[0] == "trio"


def _outlives(exc: BaseException, other: BaseException, waiting: Collection[FrameType]) -> bool:
    """Whether ``exc`` has gone on where ``other`` has ended, and not only into a context manager that swallows it."""
    end = _passed(other)[:1]
    return bool(end) and end[0] in _passed(exc)[1:] and end[0] not in waiting


def _passed(exc: BaseException) -> list[FrameType]:
    """The frames that ``exc`` has passed; first the one to which it has come."""
    frames = [frame for frame, _ in walk_tb(exc.__traceback__)]
    while len(frames) > 1 and frames[-1].f_code.co_name in BY_HAND:
        frames.pop()  # they have thrown it in
    return frames


def _scope(exc: BaseException) -> str:
    """AnyIO's, where it has cancelled on asyncio: it tells which scope it was."""
    return str(exc.args[:1]).partition(" by ")[0]


@coroutine
def stepped(work: Any, told: Told) -> Generator[Any, Any, Any]:
    """Step ``work`` by hand, and tell of each wait and each interruption."""
    seam = told.backend
    step: Callable[[Any], Any] = work.send
    value: Any = None
    requests = seam.requests()
    suspects: list[Interruption] = []
    interrupted_by: WeakSet[Any] = WeakSet()
    drops = 0
    try:
        while True:
            over = True
            try:
                waits_for = step(value)
                over = False
            except StopIteration as end:
                return end.value
            finally:
                if suspects:
                    suspects = list(_unjudged(suspects, seam.requests(), over, work, told))
            requests = min(requests, seam.requests())
            told.suspended(work)
            try:
                value = yield waits_for
            except GeneratorExit:
                work.close()
                raise
            except BaseException as exc:
                step, value = work.throw, exc
            else:
                step = work.send
            before, requests = requests, seam.requests()
            arrived = seam.interruption(value)
            if arrived is not None and (requests > before or not seam.counts):
                for suspect in suspects:
                    suspect.later.append(arrived)
                scopes = seam.scopes()
                again = None if seam.counts else not interrupted_by.isdisjoint(scopes)
                suspects.append(Interruption(arrived, before, again))
                interrupted_by.update(scopes)
            if told.dropped and arrived is not None:
                step, value = work.throw, Dropped()
                drops += 1
                if drops > ENOUGH:
                    UNENDING.append(work)
                    raise value
            del arrived
    finally:
        suspects.clear()
        del step, value, suspects  # an exception would hold this frame, which holds it


def _unjudged(suspects: list[Interruption], requests: int, over: bool, work: Any, told: Told) -> Iterator[Interruption]:
    waiting = list(frames_of_waiting(work))
    for suspect in suspects:
        killed = suspect.has_killed(requests, over, waiting)
        if killed is None:
            yield suspect
        else:
            told.judged(suspect.exc, killed)


def told_of(exc: BaseException | None) -> Any:
    """Who was told of the work that has raised ``exc``, if it was stepped."""
    frames = [frame for frame, _ in walk_tb(exc.__traceback__ if exc is not None else None)]
    return next((frame.f_locals["told"] for frame in reversed(frames) if frame.f_code is _CODE), None)


_CODE = stepped.__code__
