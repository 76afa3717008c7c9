"""What runs under which key, so that it can be stopped from anywhere.

A *run* is one piece of work under a key: a request, a stream. ``stop`` ends those that run now. If none does, the
stop may be early: the work that it is meant for has been asked for, but has not begun yet. Such a stop waits for
the next run of the key for a few seconds, and is used up by it. But where a run has ended just before, the stop
was meant for that one, and is over as well. Who gives the run an id, and names it when stopping, needs none of
these rules: the stop waits for that run alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import monotonic

import anyio

Tell = Callable[[str], object]
"""Ends a run; is called with the reason."""
EARLY_AT_MOST = 60.0  # seconds that a stop may wait for a run
LEAVING = 5.0  # seconds that a run which has ended may take to say so


class Runs(ABC):
    """The runs of a broker."""

    @asynccontextmanager
    async def running(self, key: str, run: str, tell: Tell) -> AsyncIterator[None]:
        """Have ``tell`` called when somebody stops the key, or this run of it, or has done so already."""
        try:
            await self.enter(key, run, tell)
            yield
        finally:
            with anyio.move_on_after(LEAVING, shield=True):
                await self.leave(key, run)

    @abstractmethod
    async def enter(self, key: str, run: str, tell: Tell) -> None: ...

    @abstractmethod
    async def leave(self, key: str, run: str) -> None: ...

    @abstractmethod
    async def stop(self, key: str, run: str | None, reason: str, early: float) -> int: ...


class MemoryRuns(Runs):
    """Those of one process."""

    def __init__(self) -> None:
        self._runs: dict[str, dict[str, Tell]] = {}
        # The oldest first, to be forgotten first.
        self._early: dict[tuple[str, str | None], tuple[float, str]] = {}
        self._ended: dict[str, float] = {}

    async def enter(self, key: str, run: str, tell: Tell) -> None:
        self._runs.setdefault(key, {})[run] = tell
        for early in ((key, run), (key, None)):
            until, reason = self._early.pop(early, (0.0, ""))
            if until > monotonic():
                tell(reason)
                break

    async def leave(self, key: str, run: str) -> None:
        runs = self._runs[key]
        del runs[run]
        if not runs:
            del self._runs[key]
        now = monotonic()
        self._ended.pop(key, None)
        self._ended[key] = now
        while self._ended[oldest := next(iter(self._ended))] < now - EARLY_AT_MOST:
            del self._ended[oldest]

    async def stop(self, key: str, run: str | None, reason: str, early: float) -> int:
        tells = [tell for name, tell in self._runs.get(key, {}).items() if run in (None, name)]
        for tell in tells:
            tell(reason)
        now = monotonic()
        if not tells and (run is not None or now - self._ended.get(key, -early) >= early):
            while self._early and self._early[oldest := next(iter(self._early))][0] < now:
                del self._early[oldest]
            self._early.pop((key, run), None)
            self._early[key, run] = now + early, reason
        return len(tells)
