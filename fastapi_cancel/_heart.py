"""Heartbeats: one timer for all idle streams of an event loop.

A stream is looked at when its heartbeat would be due. If it has sent something since, it is looked at
again when that is old enough, so that sending costs nothing here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from math import ceil
from time import monotonic
from weakref import WeakKeyDictionary

from .ladder import Ladder, Timer

TICK = 0.05  # seconds: heartbeats that are due so close to each other share one wake-up
AT_ONCE = 100  # heartbeats in one turn of the event loop


class Pulse:
    """One stream's place among the heartbeats.

    :param look: given the time, beats if that is due, and says when to look again
    """

    __slots__ = ("look",)

    def __init__(self, look: Callable[[float], float]) -> None:
        self.look: Callable[[float], float] | None = look

    def stop(self) -> None:
        self.look = None


class Heart:
    """Looks at each :class:`Pulse` when it is due.

    :param call_later: of the event loop
    """

    def __init__(self, call_later: Callable[[float, Callable[[], object]], Timer]) -> None:
        self._call_later = call_later
        self._due: list[tuple[float, int, Pulse]] = []
        self._numbers = count()
        self._timer: Timer | None = None
        self._wakes_at = 0.0

    def add(self, pulse: Pulse, when: float) -> None:
        """Look at ``pulse`` then, on the clock of ``time.monotonic``."""
        heappush(self._due, (ceil(when / TICK) * TICK, next(self._numbers), pulse))
        if self._timer is None or when < self._wakes_at - TICK:
            self._sleep()

    def _sleep(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._due and self._due[0][2].look is None:
            heappop(self._due)
        if self._due:
            self._wakes_at = self._due[0][0]
            self._timer = self._call_later(max(0.0, self._wakes_at - monotonic()), self._beat)

    def _beat(self) -> None:
        now = monotonic()
        for _ in range(AT_ONCE):
            if not self._due or self._due[0][0] > now:
                break
            pulse = heappop(self._due)[2]
            if pulse.look is not None:
                heappush(self._due, (ceil(pulse.look(now) / TICK) * TICK, next(self._numbers), pulse))
        self._timer = None
        self._sleep()


_hearts: WeakKeyDictionary[asyncio.AbstractEventLoop, Heart] = WeakKeyDictionary()


def heart_for(ladder: Ladder) -> Heart:
    """That of the running event loop. On Trio, whose timers are tasks, one of the request's own."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return Heart(ladder.call_later)
    if (heart := _hearts.get(loop)) is None:
        heart = _hearts[loop] = Heart(loop.call_later)
    return heart
