"""Streams that outlive a connection: who produces the stream of a key, and who reads it.

There is one stream a key: the events are the log of a channel, and this is the record beside it. A *run* produces
it. As long as it is heard of, it is the only one; once it has finished, or has not been heard of for its lease,
the next one may begin, with a new log. The last event of a log is a comment that says how the stream has ended.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Literal, NamedTuple, TypeAlias

from .log import SEP, Event, Log, Place

LIVE, DONE, FAILED = "live", "done", "failed"
_ENDING = re.compile(rb": fastapi-cancel stream (\w+)\r\n\r\n$")
SWEEP = 100  # streams that begin between two looks for those that are to be forgotten

News: TypeAlias = Callable[[int | None], object]
"""Is told how far a reader is; ``None``: the last one has left."""
Fate: TypeAlias = Literal["there", "silent", "replaced", "lost"]
"""What has become of a run: it is heard of, or has ended; it is not heard of; there is another; there is none."""


class Found(NamedTuple):
    """The stream of a key.

    :ivar state: ``"live"``, ``"done"``, ``"failed"``, or the cause of its early end
    :ivar last: once it has ended: the number of its last event
    """

    run: str
    epoch: int
    state: str = LIVE
    last: int = 0


class Streams(ABC):
    """The streams of a broker. Times are seconds."""

    def __init__(self) -> None:
        self._news: dict[str, News] = {}

    @staticmethod
    def channel(key: str) -> str:
        """Where the events of a stream are published. The braces keep it on one node of a Redis Cluster."""
        return f"stream:{{{key}}}"

    @abstractmethod
    async def claim(self, key: str, run: str, lease: float, replace: bool) -> tuple[Found, str | None]:
        """Begin a run, unless there is one. Which one it is now, and which one was replaced.

        Whoever begins it is its first reader, under the name of the run.
        """

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
    async def finish(self, key: str, run: str, state: str, keep: float, *words: bytes) -> bool:
        """Append the last words and the ending, behind whatever there is. False: the run has lost its stream."""

    @abstractmethod
    async def attend(self, key: str, run: str, reader: str, at: int, lease: float) -> Fate:
        """Read the stream, until now as far as ``at``."""

    @abstractmethod
    async def depart(self, key: str, run: str, reader: str) -> None: ...

    def heed(self, run: str, news: News | None) -> None:
        """Have ``news`` told of the readers of a run that is produced in this process; ``None``: no longer."""
        if news is None:
            self._news.pop(run, None)
        else:
            self._news[run] = news

    def _tell(self, run: str, at: int | None) -> None:
        if (news := self._news.get(run)) is not None:
            news(at)


def ending(state: str) -> bytes:
    """The last event of a stream."""
    return f": fastapi-cancel stream {state}{SEP}{SEP}".encode()


def how_ended(frame: bytes) -> str | None:
    """The state in which a stream has ended, if this is its last event."""
    found = _ENDING.search(frame)
    return found[1].decode() if found is not None else None


@dataclass
class _Record:
    found: Found
    readers: dict[str, int]
    ends: float | None = None
    idle: float | None = None


class MemoryStreams(Streams):
    """Those of one process.

    :param log: of a channel
    :param begin_anew: has it begin anew
    :param forget: lets it go
    """

    def __init__(
        self, log: Callable[[str], Log], begin_anew: Callable[[str], Log], forget: Callable[[str], object]
    ) -> None:
        super().__init__()
        self._log = log
        self._begin_anew = begin_anew
        self._forget = forget
        self._records: dict[str, _Record] = {}
        self._claims = 0

    async def claim(self, key: str, run: str, lease: float, replace: bool) -> tuple[Found, str | None]:
        self._claims += 1
        if self._claims % SWEEP == 0:
            for each in list(self._records):
                self._record(each)
        before = self._record(key)
        live = before is not None and before.found.state == LIVE
        if before is not None and live and not replace:
            return before.found, None
        found = Found(run, self._begin_anew(self.channel(key)).epoch)
        self._records[key] = _Record(found, {run: 0})
        return found, before.found.run if before is not None and live else None

    async def find(self, key: str) -> Found | None:
        record = self._record(key)
        return record.found if record is not None else None

    async def produce(self, key: str, run: str, number: int, wire: bytes) -> bool:
        record = self._record(key, run)
        if record is None or record.found.state != LIVE:
            return False
        self._append(record, key, number, wire)
        return True

    async def renew(self, key: str, run: str, lease: float) -> tuple[float | None, int] | None:
        if (record := self._record(key, run)) is None:
            return None
        return None if record.idle is None else monotonic() - record.idle, max(record.readers.values(), default=0)

    async def finish(self, key: str, run: str, state: str, keep: float, *words: bytes) -> bool:
        if (record := self._record(key, run)) is None:
            return False
        if record.found.state != LIVE:
            return True
        last = self._log(self.channel(key)).last
        for wire in (*words, ending(state)):
            last += 1
            self._append(record, key, last, wire)
        record.found = record.found._replace(state=state, last=last)
        record.ends = monotonic() + keep
        return True

    async def attend(self, key: str, run: str, reader: str, at: int, lease: float) -> Fate:
        if (record := self._record(key, run)) is None:
            return "replaced" if key in self._records else "lost"
        record.idle = None
        record.readers[reader] = at
        self._tell(run, at)
        return "there"

    async def depart(self, key: str, run: str, reader: str) -> None:
        if (record := self._record(key, run)) is None:
            return
        record.readers.pop(reader, None)
        if not record.readers and record.idle is None:
            record.idle = monotonic()
            self._tell(run, None)

    def _append(self, record: _Record, key: str, number: int, wire: bytes) -> None:
        place = Place(record.found.epoch, number)
        self._log(self.channel(key)).append(place, Event(str(place), wire))

    def _record(self, key: str, run: str | None = None) -> _Record | None:
        """The record of a key, if it is that of this run, and not to be forgotten by now."""
        record = self._records.get(key)
        if record is not None and record.ends is not None and record.ends < monotonic():
            del self._records[key]
            self._forget(self.channel(key))
            return None
        return record if record is not None and run in (None, record.found.run) else None
