"""A channel's log: numbered events, the newest of them in memory, and readers that each remember a place.

Theory of operation
===================

An id is ``epoch-number``. Within an epoch each event's number is one higher than that of the one before, so
whoever comes back with an id knows exactly what is missing, and nothing else needs to be stored for it: a number
that is not the next one *is* a gap.

An epoch ends when its log is forgotten, or when the server that keeps it begins anew: that one cannot know what it
has lost (the snapshot it began with may be minutes old), and must not give the same id twice. The first event of
the next epoch says *after* which id it came, if there was one. A reader that is just there goes on without a gap;
any other has missed something. Places are compared as they stand: a later epoch is always a higher one.

A reader is a place in the log, not a queue. What it has not read yet waits once for all readers, here or in the
store behind (Redis); a reader that falls behind costs nothing, and reads the store instead of the memory. Only
where the store has forgotten, too, there is a gap, and the reader is told.

======== =================================================================================
_entries the newest events in memory, of one epoch and without a hole
_end     the number of the last of them
place    behind the newest event that is known to exist; those between ``_end`` and it
         must be read from the store
======== =================================================================================

What is heard may come late, twice, or not at all, and an answer of the store may be older than what has been heard
meanwhile; so nothing ever moves a log back, with one exception: an answer that is behind what was known *when it
was asked for* proves that the store has lost something.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import AsyncIterator, Awaitable
from time import monotonic
from typing import Literal, NamedTuple, Protocol, TypeAlias

import anyio
from pydantic_core import to_json

from .._feed import MAX_BYTES, Burst, Offer
from ..exceptions import CancelError, Stalled
from ._push import Pusher

SEP = "\r\n"
_ID = re.compile(r"\d{1,19}-\d{1,19}", re.ASCII)
_FIELD = re.compile(r"(?:(\w+): ?)?([^\r\n]*)(?:\r\n|\r|\n)")


class Place(NamedTuple):
    """A place in the log of a channel: behind the event of this number."""

    epoch: int
    number: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.number}"

    @staticmethod
    def parse(id: str) -> Place | None:
        """The place behind the event with this id; ``None``: no id of ours."""
        if _ID.fullmatch(id) is None:
            return None
        epoch, _, number = id.partition("-")
        return Place(int(epoch), int(number))


class Event:
    """An event of a channel. May be yielded to an ``SSEResponse`` as it is.

    :ivar id: what an SSE client comes back with, as ``Last-Event-ID``
    :ivar frame: the event as server-sent events have it, the id included
    """

    __slots__ = ("frame", "id")

    def __init__(self, id: str, wire: bytes) -> None:
        self.id = id
        self.frame = f"id: {id}{SEP}".encode() + wire

    def to_wire(self, sep: str) -> tuple[bytes, str]:
        """For :func:`~fastapi_cancel.events.encode`."""
        return self.frame, self.id

    @property
    def data(self) -> str | None:
        """Its data, without the lines' ends."""
        lines = [value for name, value in self._fields() if name == "data"]
        return "\n".join(lines) if lines else None

    @property
    def event(self) -> str | None:
        """Its type, if it has one."""
        return next((value for name, value in self._fields() if name == "event"), None)

    def _fields(self) -> list[tuple[str, str]]:
        return _FIELD.findall(self.frame.decode(errors="replace"))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.event or 'message'}: {self.data!r}>"


class Gap(Event):
    """Events are missing here: nobody has them any more. A browser sees an event of the type ``gap``.

    :ivar missed: how many; ``None``: nobody knows
    """

    __slots__ = ("missed",)

    def __init__(self, place: Place, missed: int | None) -> None:
        super().__init__(str(place), b"event: gap\r\ndata: " + to_json({"missed": missed}) + b"\r\n\r\n")
        self.missed = missed


class Here(Event):
    """Nothing has happened: it tells an SSE client where it is, so that it can come back to here."""

    __slots__ = ()

    def __init__(self, place: Place) -> None:
        super().__init__(str(place), SEP.encode())


class BrokerUnavailable(CancelError, ConnectionError):
    """The store behind a broker does not answer, or is none that we can work with."""


class Entry(NamedTuple):
    """An event of a log.

    :ivar after: for the first one of an epoch: where the epoch before has ended
    """

    place: Place
    event: Event
    after: Place | None = None

    def follows(self, place: Place) -> bool:
        """Whether nothing is missing between ``place`` and it."""
        return self.place == (place.epoch, place.number + 1) or self.after == place


Slow: TypeAlias = Literal["skip", "end"]
NOWHERE = Place(0, 0)  # before all logs


class Store(Protocol):
    """What is behind the memory of this process; in the end the memory itself."""

    async def read(self, place: Place) -> tuple[Place, list[Entry]]:
        """Where the log is, to which ours moves, and the next events behind ``place`` (none: there are none)."""
        ...


class Log:
    """The newest events of one channel.

    :param size: how many are kept in memory
    :param max_age: seconds that one is kept in memory
    :ivar touched: when it was last used, on the clock of ``time.monotonic``
    :ivar failure: readers that have read all there is raise :class:`BrokerUnavailable` with these words
    :ivar unheard: behind the last event that came while nobody could hear it: nobody is slow who is not there yet
    """

    def __init__(self, place: Place, size: int, max_age: float) -> None:
        self.place = place
        self.failure: str | None = None
        self._size = size
        self._max_age = max_age
        self._entries: deque[tuple[float, Entry]] = deque()
        self._end = self.unheard = place.number
        self._more: anyio.Event | None = None
        self._joined: tuple[Place, tuple[Place, Burst] | None] | None = None
        self.pusher = Pusher()
        self.touched = monotonic()

    @property
    def epoch(self) -> int:
        return self.place.epoch

    @property
    def last(self) -> int:
        """The number of the newest event."""
        return self.place.number

    def append(self, place: Place, event: Event) -> None:
        """An event has come. One that we have already, or that comes out of turn, is left to the store."""
        if place.epoch > self.place.epoch:
            self._begin(Place(place.epoch, place.number - 1))
        elif place.epoch < self.place.epoch:
            return
        if place.number != self._end + 1:
            if place.number <= self.place.number:
                return
            self._entries.clear()
        self._end = place.number
        entry = Entry(place, event)
        if place > self.place:
            self.place = place
        self._entries.append((monotonic(), entry))
        if len(self._entries) > self._size:
            self._entries.popleft()
        self.wake()

    def move_to(self, place: Place, known: Place = NOWHERE) -> None:
        """The store says that its newest event is this one.

        :param known: where this log was when the store was asked
        """
        if known <= place <= self.place:
            return
        if place.epoch != self.place.epoch or place < known:
            self._begin(place)
        self.place = place
        self.wake()

    def _begin(self, place: Place) -> None:
        self.place = place
        self._entries.clear()
        self._end = self.unheard = place.number

    def fail(self, failure: str | None) -> None:
        """Have the readers that wait fail; ``None``: all is well again."""
        self.failure = failure
        self.wake()

    def check(self) -> None:
        """Fail as it was told to."""
        if self.failure is not None:
            raise BrokerUnavailable(self.failure)

    def behind(self, place: Place) -> Entry | None:
        """The event behind ``place``, if it is in memory."""
        index = place.number - self._end + len(self._entries)
        return self._entries[index][1] if 0 <= index < len(self._entries) and place.epoch == self.place.epoch else None

    def forget_old(self) -> None:
        """Drop what is too old."""
        oldest = monotonic() - self._max_age
        while self._entries and self._entries[0][0] < oldest:
            self._entries.popleft()

    async def read(self, place: Place) -> tuple[Place, list[Entry]]:
        found = [self._entries[0][1]] if self._entries and self._entries[0][1].place > place else []
        return self.place, found

    async def wait(self) -> None:
        """Wait for news."""
        if self._more is None:
            self._more = anyio.Event()
        await self._more.wait()

    def wake(self) -> None:
        """Have the readers that wait look again."""
        if self._more is not None:
            self._more.set()
            self._more = None
        self._joined = None
        self.pusher.push()

    def burst_behind(self, place: Place) -> tuple[Place, Burst] | None:
        """The events behind ``place`` that are in memory, up to a size, joined; and the place behind the last of them.

        Most readers are at the same place: it is remembered.
        """
        if self._joined is None or self._joined[0] != place:
            self._joined = place, self._join(place)
        return self._joined[1]

    def _join(self, place: Place) -> tuple[Place, Burst] | None:
        frames: list[bytes] = []
        size, id = 0, ""
        while size < MAX_BYTES and (entry := self.behind(place)) is not None:
            place, id = entry.place, entry.event.id
            frames.append(entry.event.frame)
            size += len(entry.event.frame)
        return (place, (b"".join(frames), len(frames), id)) if frames else None


class Subscription(AsyncIterator[Event]):
    """The events of a channel, each once and in order; and a :class:`Gap` where some are missing.

    :param after: the place to begin behind; ``None``: an id that says nothing was given
    :param lag: how many events may wait for a reader that has caught up once; ``None``: any number
    :param slow: what becomes of it then
    """

    def __init__(
        self, log: Log, store: Store, after: Place | None, lag: int | None = None, slow: Slow = "skip"
    ) -> None:
        self._log = log
        self._store = store
        self._lag = lag
        self._slow = slow
        self._here = after or NOWHERE
        self._read: deque[Entry] = deque()
        self._live = False
        self._failure: Exception | None = None
        self._offer: Offer | None = None

    @property
    def position(self) -> str:
        """The id of the last event that was read here: what to come back with."""
        return str(self._here)

    def end(self, failure: Exception) -> None:
        """Have it raise ``failure`` once it has read all there is."""
        self._failure = failure
        self._log.wake()

    def follow(self, offer: Offer) -> None:
        """Offer events past whoever waits for them here."""
        self._offer = offer

    def push(self) -> Awaitable[None] | None:
        """While this waits: offer what is there, and wake it for whatever remains."""
        assert self._offer is not None
        log = self._log
        taken: Awaitable[None] | bool = False
        if (self._lag is None or log.last - self._here.number <= self._lag) and (found := log.burst_behind(self._here)):
            place, burst = found
            if taken := self._offer(burst):
                self._here = place
        if self._here != log.place or self._failure is not None or log.failure is not None:
            log.pusher.wake(self)
        return None if isinstance(taken, bool) else taken

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Event:
        """The next event.

        :raises Stalled: more than ``lag`` events wait, and ``slow`` is ``"end"``
        :raises BrokerUnavailable: the store has been away for too long
        """
        log = self._log
        while True:
            if self._lag is not None and self._live and (place := self._too_slow(self._lag)) is not None:
                return self._skip_to(place)
            if (event := self._next()) is not None:
                return event
            if self._here == log.place:
                self._live = True
                if self._failure is not None:
                    raise self._failure
                log.check()
                await (log.wait() if self._offer is None else log.pusher.wait(self))
                continue
            newest, entries = await self._store.read(self._here)
            self._read = deque(entries)
            if not entries and newest != self._here:
                return self._skip_to(newest)  # what was behind it has been forgotten, or lost with the place itself

    def _next(self) -> Event | None:
        if self._read:
            entry = self._read[0]
            if not entry.follows(self._here):
                return self._skip_to(Place(entry.place.epoch, entry.place.number - 1))
            self._read.popleft()
        elif (found := self._log.behind(self._here)) is not None:
            entry = found
        else:
            return None
        self._here = entry.place
        return entry.event

    def _skip_to(self, place: Place) -> Gap:
        missed = place.number - self._here.number
        known = place.epoch == self._here.epoch and missed > 0
        self._here = place
        return Gap(place, missed if known else None)

    def _too_slow(self, lag: int) -> Place | None:
        log = self._log
        if log.epoch != self._here.epoch or log.last - max(self._here.number, log.unheard) <= lag:
            return None
        if self._slow == "end":
            raise Stalled(f"more than {lag} events wait for a subscriber")
        self._read.clear()
        return Place(log.epoch, log.last - lag)
