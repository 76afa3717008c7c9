"""Heartbeats: one timer for all idle streams of an event loop.

A stream is looked at when its heartbeat would be due. If it has sent something since, it is looked at
again when that is old enough, so that sending costs nothing here.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from contextvars import Context
from heapq import heapify, heappop, heappush
from itertools import count
from math import ceil
from time import monotonic
from weakref import WeakKeyDictionary, ref

import anyio

from ._scoped import sleep_then
from .ladder import Timer

logger = logging.getLogger("fastapi_cancel")

TICK = 0.05  # seconds: heartbeats that are due so close to each other share one wake-up
AT_ONCE = 100  # heartbeats in one turn of the event loop

Look = Callable[[float], float]
"""Given the time, beats if that is due, and says when to look again."""


class Pulse:
    """One stream's place among the heartbeats."""

    __slots__ = ("_heart", "look")

    def __init__(self, heart: Heart, look: Look) -> None:
        self._heart = heart
        self.look: Look | None = look

    def stop(self) -> None:
        if self.look is not None:
            self.look = None
            self._heart.forget_one()


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
        self._stopped = 0

    def add(self, look: Look, when: float) -> Pulse:
        """Have ``look`` called then, on the clock of ``time.monotonic``, and whenever it says."""
        pulse = Pulse(self, look)
        self._push(pulse, when)
        if self._timer is None or when < self._wakes_at - TICK:
            self._sleep()
        return pulse

    def forget_one(self) -> None:
        """A pulse has stopped. They are removed when they are due, or have become too many, or all there are."""
        self._stopped += 1
        if self._stopped >= len(self._due) or self._stopped > AT_ONCE + len(self._due) // 2:
            self._due = [entry for entry in self._due if entry[2].look is not None]
            heapify(self._due)
            self._stopped = 0
            self._sleep()

    def _push(self, pulse: Pulse, when: float) -> None:
        heappush(self._due, (ceil(when / TICK) * TICK, next(self._numbers), pulse))

    def _sleep(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._due and self._due[0][2].look is None:
            heappop(self._due)
            self._stopped -= 1
        if self._due:
            self._wakes_at = self._due[0][0]
            self._timer = self._call_later(max(0.0, self._wakes_at - monotonic()), self._beat)

    def _beat(self) -> None:
        now = monotonic()
        for _ in range(AT_ONCE):
            if not self._due or self._due[0][0] > now:
                break
            pulse = heappop(self._due)[2]
            if pulse.look is None:
                self._stopped -= 1
                continue
            try:
                self._push(pulse, pulse.look(now))
            except Exception:  # of one, which is not to stop the others
                logger.exception("%r failed", pulse.look)
        self._timer = None
        self._sleep()


_hearts: WeakKeyDictionary[object, Heart] = WeakKeyDictionary()


def current_heart() -> Heart:
    """That of the running event loop."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return _hearts.setdefault(sys.modules["trio"].lowlevel.current_trio_token(), Heart(_call_later_on_trio))
    if (heart := _hearts.get(loop)) is None:
        of = ref(loop)  # or the heart would keep its loop for ever

        def call_later(seconds: float, function: Callable[[], object]) -> asyncio.TimerHandle:
            loop = of()
            assert loop is not None
            # In a context of its own: that of a request would be handed on from beat to beat.
            return loop.call_later(seconds, function, context=Context())

        heart = _hearts[loop] = Heart(call_later)
    return heart


def _call_later_on_trio(seconds: float, function: Callable[[], object]) -> anyio.CancelScope:
    """A system task's: it outlives the request that happens to ask for it."""
    timer = anyio.CancelScope()
    sys.modules["trio"].lowlevel.spawn_system_task(sleep_then, timer, seconds, function)
    return timer
