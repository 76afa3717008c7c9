"""Channels in the memory of one process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic, time_ns

from .base import CLOSED, Broker
from .log import Event, Log, Place, Slow, Subscription
from .runs import MemoryRuns
from .streams import MemoryStreams

SWEEP = 100  # published events between two looks for channels that are to be forgotten


class MemoryBroker(Broker):
    """A :class:`Broker` for one process, without anything behind it; to be used in one event loop."""

    def __init__(self, *, retain: int = 1000, max_age: float = 3600.0) -> None:
        super().__init__(retain=retain, max_age=max_age)
        self.runs = MemoryRuns()
        self.streams = MemoryStreams(self._log, self._begin_anew, lambda channel: self._logs.pop(channel, None))
        self._logs: dict[str, Log] = {}
        self._readers: dict[str, int] = {}
        self._epoch = 0
        self._published = 0

    async def _publish(self, channel: str, wire: bytes) -> Place:
        self._published += 1
        if self._published % SWEEP == 0:
            self._sweep()
        log = self._log(channel)
        place = Place(log.epoch, log.last + 1)
        log.append(place, Event(str(place), wire))
        return place

    @asynccontextmanager
    async def _subscribe(
        self, channel: str, after: str | None, lag: int | None, slow: Slow
    ) -> AsyncIterator[Subscription]:
        log = self._log(channel)
        self._readers[channel] = self._readers.get(channel, 0) + 1
        try:
            yield Subscription(log, log, Place.parse(after) if after is not None else log.place, lag, slow)
        finally:
            log.touched = monotonic()
            self._readers[channel] -= 1
            if not self._readers[channel]:
                del self._readers[channel]

    def _log(self, channel: str) -> Log:
        if (log := self._logs.get(channel)) is None:
            log = self._logs[channel] = Log(self._new_place(), self.retain, self.max_age)
        log.touched = monotonic()
        log.forget_old()
        return log

    def _begin_anew(self, channel: str) -> Log:
        log = self._log(channel)
        log.move_to(self._new_place())
        return log

    def _new_place(self) -> Place:
        self._epoch = max(self._epoch + 1, time_ns() // 1_000_000)  # no two lives of a channel have the same
        return Place(self._epoch, 0)

    def _sweep(self) -> None:
        """Forget channels that nobody has used for ``max_age``."""
        for channel, log in list(self._logs.items()):
            if channel not in self._readers and log.touched < monotonic() - self.max_age:
                del self._logs[channel]

    async def open(self) -> None:
        pass

    async def aclose(self) -> None:
        for log in self._logs.values():
            log.fail(CLOSED)
        self._logs.clear()
