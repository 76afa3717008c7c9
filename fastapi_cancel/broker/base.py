"""What every broker offers, whatever keeps its events."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Self, get_args

from ..events import encode, is_whole
from ..exceptions import InvalidEvent
from ..policy import check_seconds
from ._events import ChannelEvents
from .log import SEP, BrokerUnavailable, Event, Place, Slow, Subscription
from .runs import EARLY_AT_MOST, Runs
from .streams import Streams

__all__ = ["CLOSED", "Broker", "BrokerUnavailable", "check_count", "check_name", "to_publish"]

CLOSED = "the broker has been closed"
_ID = re.compile(rb"(?:^|[\r\n])id(?![^:\r\n])")  # in bytes that somebody has written himself


class Broker(ABC):
    """Channels of events: whoever subscribes, in whatever process, gets what anybody publishes.

    ::

        broker = connect("redis://localhost")       # or connect(): in the memory of this process

        @router.get("/rooms/{room}")
        async def listen(room: str, last: LastEventID):
            return SSEResponse(broker.events(room, after=last))

        @router.post("/rooms/{room}")
        async def say(room: str, text: str):
            await broker.publish(room, text)

    To be opened and closed: ``async with broker``, or in the lifespan (:func:`~fastapi_cancel.lifespan`).

    :param retain: how many events of a channel are kept for those who come back
    :param max_age: seconds that an event is kept; a channel in which nothing happens is forgotten after that
    :raises TypeError: an argument is of the wrong type; the message names it
    :ivar runs: what runs under which key
    :ivar streams: which streams outlive a connection
    :raises ValueError: an argument is out of range; the message names it
    """

    runs: Runs
    streams: Streams

    def __init__(self, *, retain: int = 1000, max_age: float = 3600.0) -> None:
        check_count("retain", retain)
        check_seconds("max_age", max_age)
        self.retain = retain
        self.max_age = max_age

    async def publish(self, channel: str, item: Any) -> str:
        """Send an event to everybody who listens to ``channel``, and keep it for those who come back.

        :param item: all that :func:`~fastapi_cancel.events.encode` takes, without an id: the broker gives one
        :return: its id
        :raises InvalidEvent: it cannot be sent, or has an id
        :raises BrokerUnavailable: the store does not answer; the event may have been published or not
        """
        check_name("channel", channel)
        return str(await self._publish(channel, to_publish(item)))

    def subscribe(
        self, channel: str, after: str | None = None, *, lag: int | None = None, slow: Slow = "skip"
    ) -> AbstractAsyncContextManager[Subscription]:
        """Listen to ``channel``; leaving the ``async with`` has unsubscribed. ::

            async with broker.subscribe("news", after=last) as events:
                async for event in events: ...

        :param after: the id of the last event that was seen: what came after it comes first. ``None``: from now
            on. One that is no id, or older than all that is kept: that, behind a :class:`Gap`. One that is newer
            than all there is, because the store has lost it: what comes now, behind a gap, and nothing twice
        :param lag: how many events may wait for a subscriber that has caught up once; ``None``: all that are kept
        :param slow: what becomes of one that is further behind: ``"skip"``: a :class:`Gap`, and the newest
            ``lag`` events; ``"end"``: it raises :class:`Stalled`
        :raises BrokerUnavailable: the store has been away for too long
        """
        check_name("channel", channel)
        if lag is not None:
            check_count("lag", lag)
        if slow not in get_args(Slow):
            raise ValueError(f"slow must be 'skip' or 'end', not {slow!r}")
        return self._subscribe(channel, after, lag, slow)

    def events(
        self, channel: str, after: str | None = None, *, lag: int | None = None, slow: Slow = "skip"
    ) -> AsyncGenerator[Event, None]:
        """The same as a content for an ``SSEResponse``: the fastest that there is, if nothing is wrapped around it.

        Its first event says nothing but where the channel is, so that a client which has seen no event yet can
        come back as well.
        """
        return ChannelEvents(self.subscribe(channel, after, lag=lag, slow=slow), greet=after is None)

    async def stop(self, key: str, *, run: str | None = None, reason: str = "", early: float = 5.0) -> int:
        """End what runs under ``key``, in whatever process, with the cause ``stop``; see :mod:`~fastapi_cancel.remote`.

        It reaches what runs now, cleanups included, in the order in which Redis is told of starts and stops. A stop
        that has reached none waits for the next run of the key, which does not begin and uses it up; the last of
        several counts. Not so where a run of the key has ended within ``early``: it was meant for that one.

        :param run: only the run with this id; a stop that has reached none waits for it, whatever has ended before
        :param reason: for the token, the farewell and the answer
        :param early: seconds that the stop waits for a run if it has reached none; 0: not at all; 60 at the most
        :return: how many it has reached, those included whose policy does not listen to stops
        :raises BrokerUnavailable: the store does not answer
        """
        check_name("key", key)
        if run is not None:
            check_name("run", run)
        if not isinstance(reason, str):
            raise TypeError(f"reason must be a str, not {reason!r}")
        check_seconds("early", early, zero=True)
        if early > EARLY_AT_MOST:
            raise ValueError(f"early must be {EARLY_AT_MOST:g} seconds at the most, not {early!r}")
        return await self.runs.stop(key, run, reason, early)

    @abstractmethod
    async def _publish(self, channel: str, wire: bytes) -> Place: ...

    @abstractmethod
    def _subscribe(
        self, channel: str, after: str | None, lag: int | None, slow: Slow
    ) -> AbstractAsyncContextManager[Subscription]: ...

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    @abstractmethod
    async def open(self) -> None:
        """Get ready.

        :raises BrokerUnavailable: the store does not answer, or is too old; the message says which
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Let everything go. Harmless to call again."""


def to_publish(item: Any) -> bytes:
    """The wire format of an event that is going to get an id.

    :raises InvalidEvent: it has one already, or is none
    """
    wire, id = encode(item, SEP)
    if id is not None or _ID.search(wire):
        raise InvalidEvent(f"an event gets its id from the broker: {item!r} must not have one")
    if item is None or not is_whole(wire[-4:]):
        raise InvalidEvent(f"{item!r} is no event: what is bytes must end with an empty line")
    return wire


def check_name(name: str, value: object) -> None:
    """Refuse what is no name, naming the argument."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str that is not empty, not {value!r}")
    if not value:
        raise ValueError(f"{name} must be a str that is not empty")


def check_count(name: str, value: object) -> None:
    """Refuse what is no number of things, naming the argument."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, 1 or more, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be a whole number, 1 or more, not {value!r}")
