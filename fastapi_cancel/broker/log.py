"""A channel's log: numbered events, the newest of them in memory, and readers that each remember a place.

Theory of operation
===================

Every event of a channel has a number; the next one is one higher, always. An id is ``epoch-number``: the epoch
says which life of the channel it belongs to (a log that was forgotten, or lost with its server, begins anew under
another epoch). So whoever comes back with an id knows exactly what is missing, and nothing else needs to be stored
for it: a number that is not the next one *is* a gap.

A reader is a place in the log, not a queue. What it has not read yet waits once for all readers, here or in the
store behind (Redis); a reader that falls behind costs nothing, and reads the store instead of the memory. Only
where the store has forgotten, too, there is a gap, and the reader is told.

======== =================================================================================
_events  the newest events in memory, without a hole
last     the number of the newest event that is known to exist; those between the end of
         ``_events`` and it must be read from the store
======== =================================================================================
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import AsyncIterator
from time import monotonic
from typing import Literal, NamedTuple, Protocol, TypeAlias

import anyio
from pydantic_core import to_json

from ..exceptions import Stalled

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
        lines = [value for name, value in _FIELD.findall(self.frame.decode()) if name == "data"]
        return "\n".join(lines) if lines else None

    @property
    def event(self) -> str | None:
        """Its type, if it has one."""
        return next((value for name, value in _FIELD.findall(self.frame.decode()) if name == "event"), None)

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


Numbered: TypeAlias = tuple[int, Event]
Slow: TypeAlias = Literal["skip", "end"]


class Store(Protocol):
    """What is behind the memory of this process; in the end the memory itself."""

    async def read(self, place: Place) -> list[Numbered]:
        """The next events behind a place; an empty list if there are none."""
        ...

    async def look(self) -> object:
        """Ask for the newest event, and move the log there."""
        ...


class Log:
    """The newest events of one channel.

    :param size: how many are kept in memory
    :param max_age: seconds that one is kept in memory
    :ivar touched: when it was last used, on the clock of ``time.monotonic``
    :ivar failure: raised to the readers that have read all there is
    """

    def __init__(self, place: Place, size: int, max_age: float) -> None:
        self.epoch, self.last = place
        self.failure: Exception | None = None
        self._size = size
        self._max_age = max_age
        self._events: deque[tuple[float, Event]] = deque()
        self._end = self.last
        self._more: anyio.Event | None = None
        self.touched = monotonic()

    @property
    def place(self) -> Place:
        """Behind the newest event."""
        return Place(self.epoch, self.last)

    def append(self, place: Place, event: Event) -> None:
        """An event has come. One that we have already, or that comes out of turn, is left to the store."""
        if place.epoch != self.epoch:
            self.move_to(Place(place.epoch, 0))
        if place.number != self._end + 1:
            if place.number <= self.last:
                return
            self._events.clear()
        self._end = place.number
        self.last = max(self.last, place.number)
        self._events.append((monotonic(), event))
        if len(self._events) > self._size:
            self._events.popleft()
        self.wake()

    def move_to(self, place: Place) -> None:
        """The store says that its newest event is this one."""
        if place.epoch != self.epoch:
            self._events.clear()
            self.epoch, self.last = place
            self._end = self.last
        elif place.number > self.last:
            self.last = place.number
        else:
            return
        self.wake()

    def fail(self, failure: Exception | None) -> None:
        """Have the readers that wait raise it; ``None``: all is well again."""
        self.failure = failure
        self.wake()

    def get(self, number: int) -> Event | None:
        """The event of this number, if it is in memory."""
        index = number - self._end + len(self._events) - 1
        return self._events[index][1] if 0 <= index < len(self._events) else None

    def forget_old(self) -> None:
        """Drop what is too old."""
        oldest = monotonic() - self._max_age
        while self._events and self._events[0][0] < oldest:
            self._events.popleft()

    async def read(self, place: Place) -> list[Numbered]:
        first = self._end - len(self._events) + 1
        return [(first, self._events[0][1])] if self._events and place.number < first else []

    async def look(self) -> None:
        """There is nobody to ask."""

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
        self._epoch, self._number = after or Place(-1, 0)
        self._read: deque[Numbered] = deque()
        self._live = False
        self._failure: Exception | None = None

    @property
    def position(self) -> str:
        """The id of the last event that was read here: what to come back with."""
        return str(Place(self._epoch, self._number))

    def end(self, failure: Exception) -> None:
        """Have it raise ``failure`` once it has read all there is."""
        self._failure = failure
        self._log.wake()

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Event:
        """The next event.

        :raises Stalled: more than ``lag`` events wait, and ``slow`` is ``"end"``
        :raises BrokerUnavailable: the store has been away for too long
        """
        log = self._log
        while True:
            if self._is_elsewhere():
                return await self._start_anew()
            if self._lag is not None and self._live and log.last - self._number > self._lag:
                return self._too_slow(self._lag)
            if (event := self._next()) is not None:
                return event
            if self._number < log.last:
                before = log.place
                self._read.extend(await self._store.read(Place(self._epoch, self._number)))
                if not self._read and log.place == before:
                    return self._skip_to(log.last)
            else:
                self._live = True
                if (failure := self._failure or log.failure) is not None:
                    raise failure
                await log.wait()

    def _next(self) -> Event | None:
        if self._read:
            number, event = self._read[0]
            if number == self._number + 1:
                self._read.popleft()
                self._number = number
                return event
            if number > self._number:
                return self._skip_to(number - 1)
            self._read.clear()
        if (found := self._log.get(self._number + 1)) is not None:
            self._number += 1
        return found

    def _skip_to(self, number: int) -> Gap:
        missed, self._number = number - self._number, number
        return Gap(Place(self._epoch, number), missed)

    def _too_slow(self, lag: int) -> Gap:
        if self._slow == "end":
            raise Stalled(f"more than {lag} events wait for a subscriber")
        self._read.clear()
        return self._skip_to(self._log.last - lag)

    def _is_elsewhere(self) -> bool:
        """Whether its place is none of this log, as far as this process knows."""
        return self._epoch != self._log.epoch or self._number > self._log.last

    async def _start_anew(self) -> Gap | Event:
        """The log has begun anew, or the id is of another one. Or another process has heard of more than this one."""
        await self._store.look()
        if not self._is_elsewhere():
            return await self.__anext__()
        self._epoch, self._number = self._log.epoch, 0
        self._read = deque(await self._store.read(Place(self._epoch, 0)))
        self._number = self._read[0][0] - 1 if self._read else self._log.last
        return Gap(Place(self._epoch, self._number), None)
