"""Streams that outlive a connection: who produces the stream of a key, and who reads it.

There is one stream a key: the events are the log of a channel, and this is the record beside it. A *run* produces
it. As long as it is heard of, it is the only one; once it has finished, or has not been heard of for its lease,
the next one may begin, with a new log.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import NamedTuple

from .log import Event, Log, Place

LIVE = "live"

News = Callable[[int | None], object]
"""Is told how far a reader is; ``None``: the last one has left."""


class Found(NamedTuple):
    """The stream of a key.

    :ivar state: ``"live"``, ``"done"``, ``"failed"``, or the cause of its early end
    :ivar last: once it has ended: the number of its last event
    :ivar heard_of: whether its producer has been heard of within its lease
    """

    run: str
    epoch: int
    state: str = LIVE
    last: int = 0
    heard_of: bool = True


class Streams(ABC):
    """The streams of a broker. Times are seconds."""

    @staticmethod
    def channel(key: str) -> str:
        """Where the events of a stream are published. The braces keep it on one node of a Redis Cluster."""
        return f"stream:{{{key}}}"

    @abstractmethod
    async def claim(self, key: str, run: str, lease: float, replace: bool) -> tuple[Found, str | None]:
        """Begin a run, unless there is one. Which one it is now, and which one was replaced."""

    @abstractmethod
    async def find(self, key: str) -> Found | None: ...

    @abstractmethod
    async def produce(self, key: str, run: str, number: int, wire: bytes) -> bool:
        """Append an event, once however often it is tried. False: the run has lost its stream."""

    @abstractmethod
    async def renew(self, key: str, run: str, lease: float) -> tuple[float | None, int] | None:
        """Be heard of. For how long nobody has read the stream, and how far the quickest reader is.

        ``None``: the run has lost its stream.
        """

    @abstractmethod
    async def finish(self, key: str, run: str, state: str, last: int, keep: float) -> None: ...

    @abstractmethod
    async def attend(self, key: str, run: str, reader: str, at: int, lease: float) -> bool | None:
        """Read the stream, until now as far as ``at``. Whether its producer is heard of; ``None``: it is another's."""

    @abstractmethod
    async def depart(self, key: str, run: str, reader: str) -> None: ...

    @abstractmethod
    def heed(self, run: str, news: News | None) -> None:
        """Have ``news`` told of the readers of a run that is produced in this process; ``None``: no longer."""


@dataclass
class _Record:
    found: Found
    ends: float | None = None
    idle: float | None = field(default_factory=monotonic)
    readers: dict[str, int] = field(default_factory=dict)


class MemoryStreams(Streams):
    """Those of one process.

    :param log: of a channel
    :param begin_anew: has it begin anew
    """

    def __init__(self, log: Callable[[str], Log], begin_anew: Callable[[str], Log]) -> None:
        self._log = log
        self._begin_anew = begin_anew
        self._records: dict[str, _Record] = {}
        self._news: dict[str, News] = {}

    async def claim(self, key: str, run: str, lease: float, replace: bool) -> tuple[Found, str | None]:
        before = self._record(key)
        live = before is not None and before.found.state == LIVE
        if before is not None and live and not replace:
            return before.found, None
        self._records[key] = _Record(Found(run, self._begin_anew(self.channel(key)).epoch))
        return self._records[key].found, before.found.run if before is not None and live else None

    async def find(self, key: str) -> Found | None:
        record = self._record(key)
        return record.found if record is not None else None

    async def produce(self, key: str, run: str, number: int, wire: bytes) -> bool:
        if (record := self._record(key, run)) is None:
            return False
        place = Place(record.found.epoch, number)
        self._log(self.channel(key)).append(place, Event(str(place), wire))
        return True

    async def renew(self, key: str, run: str, lease: float) -> tuple[float | None, int] | None:
        if (record := self._record(key, run)) is None:
            return None
        return None if record.idle is None else monotonic() - record.idle, max(record.readers.values(), default=0)

    async def finish(self, key: str, run: str, state: str, last: int, keep: float) -> None:
        if (record := self._record(key, run)) is not None:
            record.found = record.found._replace(state=state, last=last)
            record.ends = monotonic() + keep

    async def attend(self, key: str, run: str, reader: str, at: int, lease: float) -> bool | None:
        if (record := self._record(key, run)) is None:
            return None
        record.idle = None
        record.readers[reader] = at
        self._tell(run, at)
        return True

    async def depart(self, key: str, run: str, reader: str) -> None:
        if (record := self._record(key, run)) is None:
            return
        record.readers.pop(reader, None)
        if not record.readers:
            record.idle = monotonic()
            self._tell(run, None)

    def heed(self, run: str, news: News | None) -> None:
        if news is None:
            self._news.pop(run, None)
        else:
            self._news[run] = news

    def _tell(self, run: str, at: int | None) -> None:
        if (news := self._news.get(run)) is not None:
            news(at)

    def _record(self, key: str, run: str | None = None) -> _Record | None:
        now = monotonic()
        for each in [each for each, record in self._records.items() if record.ends is not None and record.ends < now]:
            del self._records[each]
        record = self._records.get(key)
        return record if record is not None and run in (None, record.found.run) else None
