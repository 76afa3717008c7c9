"""What runs under which key, so that it can be stopped from anywhere.

A *run* is one piece of work under a key: a request, a stream. ``stop`` ends those that run now. If none does, the
stop may be early: the work that it is meant for has been asked for, but has not begun yet. Such a stop waits for
the next run of the key for a few seconds, and is used up by it. But where a run has ended just before, the stop
was meant for that one, and is over as well. Who gives the run an id, and names it when stopping, needs none of
these rules: the stop waits for that run alone.

An id is whatever a client chose, so two runs may have the same; each has a token that is its own.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import monotonic

import anyio

Tell = Callable[[str], object]
"""Ends a run; is called with the reason, perhaps more than once."""
EARLY_AT_MOST = 60.0  # seconds that a stop may wait for a run
LEAVING = 1.0  # seconds that a run which has ended may take to say so


class Running:
    """A run that goes on."""

    def __init__(self, key: str, run: str, tell: Tell) -> None:
        self.key = key
        self.run = run
        self.tell = tell
        self.token = secrets.token_hex(8)


class Runs(ABC):
    """The runs of a broker."""

    @asynccontextmanager
    async def running(self, key: str, run: str, tell: Tell) -> AsyncIterator[None]:
        """Have ``tell`` called when somebody stops the key, or this run of it, or has done so already."""
        this = Running(key, run, tell)
        try:
            await self.enter(this)
            yield
        finally:
            with anyio.move_on_after(LEAVING, shield=True):
                await self.leave(this)

    @abstractmethod
    async def enter(self, this: Running) -> None: ...

    @abstractmethod
    async def leave(self, this: Running) -> None: ...

    @abstractmethod
    async def stop(self, key: str, run: str | None, reason: str, early: float) -> int: ...


class MemoryRuns(Runs):
    """Those of one process."""

    def __init__(self) -> None:
        self._runs: dict[str, dict[str, Running]] = {}
        # The oldest first, to be forgotten first.
        self._early: dict[tuple[str, str | None], tuple[float, str]] = {}
        self._ended: dict[str, float] = {}

    async def enter(self, this: Running) -> None:
        self._runs.setdefault(this.key, {})[this.token] = this
        for early in ((this.key, this.run), (this.key, None)):
            until, reason = self._early.pop(early, (0.0, ""))
            if until > monotonic():
                this.tell(reason)
                break

    async def leave(self, this: Running) -> None:
        runs = self._runs[this.key]
        del runs[this.token]
        if not runs:
            del self._runs[this.key]
        now = monotonic()
        self._ended.pop(this.key, None)
        self._ended[this.key] = now
        while self._ended[oldest := next(iter(self._ended))] < now - EARLY_AT_MOST:
            del self._ended[oldest]

    async def stop(self, key: str, run: str | None, reason: str, early: float) -> int:
        reached = [each for each in self._runs.get(key, {}).values() if run in (None, each.run)]
        for each in reached:
            each.tell(reason)
        now = monotonic()
        if not reached and (run is not None or now - self._ended.get(key, -early) >= early):
            while self._early and self._early[oldest := next(iter(self._early))][0] < now:
                del self._early[oldest]
            self._early.pop((key, run), None)
            self._early[key, run] = now + early, reason
        return len(reached)
