"""The room: whoever is in it gets everything that happens there, in the same order."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, NamedTuple

import anyio


class Event(NamedTuple):
    """Something that happened: ``welcome``, ``joined``, ``left`` or ``said``."""

    kind: str
    data: dict[str, Any]


class Seat:
    """One person's place in the room, with the events that wait for them.

    :ivar name: what the others call them
    :ivar key: what they show in order to speak; nobody else knows it
    """

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.key = secrets.token_urlsafe(16)
        self._into, self._out_of = anyio.create_memory_object_stream[Event](size)

    def tell(self, event: Event) -> bool:
        """Leave an event for this person; False if too many wait already."""
        try:
            self._into.send_nowait(event)
        except anyio.WouldBlock:
            return False
        return True

    async def next(self) -> Event:
        """The next event.

        :raises anyio.EndOfStream: this person is no longer in the room, and has got all there was
        """
        return await self._out_of.receive()

    def end(self) -> None:
        self._into.close()

    def forget(self) -> None:
        self._into.close()
        self._out_of.close()


class Room:
    """A chat room in the memory of this process.

    :param history: how many messages a newcomer is shown
    :param queue: how many events may wait for one person. Whoever reads so slowly that one more comes
        has left the room: their stream ends, and their browser joins again
    """

    def __init__(self, history: int = 50, queue: int = 100) -> None:
        self._seats: dict[str, Seat] = {}
        self._history: deque[dict[str, Any]] = deque(maxlen=history)
        self.queue = queue

    @property
    def people(self) -> list[str]:
        return [seat.name for seat in self._seats.values()]

    @asynccontextmanager
    async def join(self, name: str) -> AsyncIterator[Seat]:
        """Be in the room. The others see it at once, and when it is over, however it ends."""
        seat = Seat(self._untaken(name), self.queue)
        self._tell_all("joined", name=seat.name)
        self._seats[seat.key] = seat
        seat.tell(
            Event("welcome", {"you": seat.name, "key": seat.key, "people": self.people, "history": [*self._history]})
        )
        try:
            yield seat
        finally:
            self._remove(seat)
            seat.forget()

    def say(self, key: str, text: str) -> bool:
        """Tell everybody; False if nobody in the room has this key."""
        if (seat := self._seats.get(key)) is None:
            return False
        said = self._tell_all("said", name=seat.name, text=text)
        self._history.append(said)
        return True

    def _tell_all(self, kind: str, **data: str) -> dict[str, Any]:
        event = Event(kind, {**data, "at": datetime.now(UTC).isoformat(timespec="seconds")})
        slow = [seat for seat in self._seats.values() if not seat.tell(event)]
        for seat in slow:
            self._remove(seat)
        return event.data

    def _remove(self, seat: Seat) -> None:
        if self._seats.pop(seat.key, None) is not None:
            seat.end()
            self._tell_all("left", name=seat.name)

    def _untaken(self, name: str) -> str:
        """``name``, or "name (2)" and so on: people must be able to tell who is speaking."""
        taken = {each.casefold() for each in self.people}
        number, candidate = 1, name
        while candidate.casefold() in taken:
            number += 1
            candidate = f"{name} ({number})"
        return candidate
