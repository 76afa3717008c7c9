"""Watchers that start a little later than their request begins to wait.

A watcher costs as much as all else that is done here for a request, and most waits are short: a query, a look into
a cache. Whoever leaves in the middle of one saves nobody any work. So a request is watched once it has waited for
``LATER`` seconds to twice that, and for two rounds of the timer that all requests of an event loop share: where the
loop is so busy that its turns are long, a wait that takes but one of them is none to be watched either.
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


class Waiting(Protocol):
    """A request that has begun to wait."""

    scope: Scope

    def watch_now(self) -> None: ...


Room = dict[Waiting, Context]
"""Where a request waits for its watcher; it takes itself out when it is over before."""


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
            try:
                context.run(waiting.watch_now)
            except Exception as exc:  # the others are watched all the same
                self._loop.call_exception_handler(
                    {"message": f"{name_of(waiting.scope)}: not watched", "exception": exc}
                )


_rounds: dict[asyncio.AbstractEventLoop, _Rounds] = {}


def wait_for_watcher(waiting: Waiting, loop: asyncio.AbstractEventLoop) -> Room:
    """Have ``watch_now`` called later, in the present context."""
    if (rounds := _rounds.get(loop)) is None:
        for each in list(_rounds):  # other threads have theirs
            if not each.is_running():  # it stopped before its last round, which it may do yet
                _rounds.pop(each, None)
        rounds = _rounds[loop] = _Rounds(loop)
    rounds.room[waiting] = copy_context()
    return rounds.room
