"""When the watcher of a request starts: at its first wait or, on a route whose requests are quick, a little later.

A watcher costs as much as all else that is done here for a request. Whoever leaves in the middle of a query or of a
look into a cache saves nobody any work. So a request of a route whose last ones were over soon is watched once it has
waited for ``LATER`` seconds to twice that, and for two rounds of the timer that all requests of an event loop share:
where the loop is so busy that its turns are long, a wait that takes but one of them is none to be watched either.
"""

from __future__ import annotations

import asyncio
from contextvars import Context, copy_context
from typing import Protocol

from starlette.types import Scope

from .ladder import name_of

LATER = 0.002  # seconds

AT_ONCE = "fastapi_cancel.at_once"
"""In the scope of a request: watch it from its first wait on. For tests that have a client leave there, and for a
server that may not say so any more a little later."""

SLOW, SAMPLE = 8, 16  # requests


class Pace:
    """What is known of the requests of a route: slow, until one was quick.

    After each ``SAMPLE`` one is watched a little later, to see whether it is over before. If so, all are, until
    ``SLOW`` in a row have waited for longer than that.

    :ivar at_once: how many of the next are watched from their first wait on
    """

    __slots__ = ("_slow", "at_once")

    def __init__(self) -> None:
        self._slow, self.at_once = SLOW, SAMPLE

    def was_slow(self) -> None:
        """A request has waited for long enough to be watched."""
        self._slow += 1
        if self._slow >= SLOW:
            self.at_once += SAMPLE

    def was_quick(self) -> None:
        """A request was over before that."""
        self._slow = self.at_once = 0


class Waiting(Protocol):
    """A request that has begun to wait."""

    scope: Scope
    pace: Pace

    def watch_now(self) -> None: ...


Room = dict[Waiting, Context]
"""Where a request waits for its watcher; it leaves when it is over before."""

NOW: Room = {}
"""No such room: the request is to be watched at once."""


class _Rounds:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.room: Room = {}
        self._next: Room = {}
        self._sleep()

    def _sleep(self) -> None:
        # In a context of its own: that of a request would be handed on from round to round.
        self._loop.call_later(LATER, self._go, context=Context())

    def _go(self) -> None:
        due, self._next, self.room = self._next, self.room, {}
        if self._next:
            self._sleep()
        elif _rounds.get(self._loop) is self:
            del _rounds[self._loop]
        while due:
            waiting, context = due.popitem()
            waiting.pace.was_slow()
            try:
                context.run(waiting.watch_now)
            except Exception as exc:  # the others are watched all the same
                self._loop.call_exception_handler(
                    {"message": f"{name_of(waiting.scope)}: not watched", "exception": exc}
                )


_rounds: dict[asyncio.AbstractEventLoop, _Rounds] = {}


def wait_for_watcher(waiting: Waiting, loop: asyncio.AbstractEventLoop) -> Room:
    """Have ``watch_now`` called later, in the present context; or be told to watch ``NOW``."""
    if AT_ONCE in waiting.scope:
        return NOW
    if waiting.pace.at_once > 0:  # two threads may both take the last
        waiting.pace.at_once -= 1
        return NOW
    if (rounds := _rounds.get(loop)) is None:
        for each in list(_rounds):  # other threads have theirs
            if not each.is_running():  # it stopped before its last round, which it may do yet
                _rounds.pop(each, None)
        rounds = _rounds[loop] = _Rounds(loop)
    rounds.room[waiting] = copy_context()
    return rounds.room


def leave(room: Room, waiting: Waiting) -> None:
    """It is over."""
    if room.pop(waiting, None) is not None:
        waiting.pace.was_quick()
