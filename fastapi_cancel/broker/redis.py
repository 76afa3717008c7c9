"""Channels in Redis: the same for every process that has its URL.

A publisher appends to a Redis stream and publishes on a Redis channel, in one script. A process listens to the
channel, once for all its subscribers, and reads the stream where it must: for those who come back, and for what
was published while the connection was away. What is heard twice, or late, is told by its number (:mod:`.log`).

Races, and why each is harmless:

- *something is published while a channel is being joined*: we join first and look at the stream second. What
  comes in between is heard, and is not newer than what the look says.
- *the look knows more than has been heard*: those events are on their way. Who wants them before they have come
  reads them from the stream; then they come out of turn, and are dropped.
- *the connection goes*: on its return each channel is joined and looked at again; what was missed is read.
- *Redis begins anew without its data*: the look creates the log under another epoch. That is a gap.
- *the last subscriber leaves while another comes*: one lock a channel.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio

from ..policy import check_seconds
from ._link import Link
from ._redis_runs import RedisRuns
from ._redis_streams import RedisStreams
from ._scripts import LOOK, PUBLISH, READ
from .base import CLOSED, Broker, BrokerUnavailable, check_count
from .log import Event, Log, Numbered, Place, Slow, Subscription

PAGE = 100  # events that are read from Redis at once
WINDOW = 100  # events of a channel that are kept in memory as well
LOOKS = 200  # channels that are looked at in one exchange
AGAIN = 0.5  # seconds until a look that failed is tried again
NOWHERE = Place(-1, 0)


class _Channel:
    """A channel that this process listens to.

    :ivar readers: how many subscribers there are, or are about to be
    :ivar joined: whether it is listened to, or will be once Redis is back
    """

    def __init__(self, broker: RedisBroker, name: str) -> None:
        self.readers = 0
        self.joined = False
        self.lock = anyio.Lock()
        self._broker = broker
        self._name = name
        self.forget()

    def forget(self) -> None:
        """Nobody listens: what is known of it is going to be wrong."""
        self.log = Log(NOWHERE, min(WINDOW, self._broker.retain), self._broker.max_age)
        self.log.failure = self._broker.failure

    def hear(self, message: bytes) -> None:
        """Something has been published."""
        id, _, wire = message.partition(b" ")
        place = _place(id)
        if self.log.epoch == NOWHERE.epoch:
            self.log.move_to(Place(place.epoch, place.number - 1))
        self.log.append(place, Event(str(place), wire))

    async def ready(self) -> Log:
        """Wait until it is known where the channel is."""
        while self.log.epoch == NOWHERE.epoch:
            if self.log.failure is not None:
                raise self.log.failure
            await self.log.wait()
        return self.log

    # -- the store of its subscribers --------------------------------------------------------

    async def look(self) -> None:
        self.log.move_to(_place(await self._broker.ask(LOOK, self._name, self._broker.milliseconds)))

    async def read(self, place: Place) -> list[Numbered]:
        newest, entries = await self._broker.ask(READ, self._name, str(place), PAGE, self._broker.milliseconds)
        self.log.move_to(_place(newest))
        found = [(_place(id), wire) for id, (_, _, _, wire) in entries]
        return [(at.number, Event(str(at), wire)) for at, wire in found if at.epoch == place.epoch]


def _place(id: bytes) -> Place:
    epoch, _, number = id.partition(b"-")
    return Place(int(epoch), int(number))


class RedisBroker(Broker):
    """A :class:`Broker` for any number of processes. Needs Redis 6.2 or later, or Valkey; and asyncio.

    :param url: ``redis://``, ``rediss://`` (TLS) or ``unix://``, as redis-py has it
    :param retain: how many events of a channel are kept for those who come back
    :param max_age: seconds that an event is kept; a channel in which nothing happens is forgotten after that
    :param prefix: of all keys and channels in Redis
    :param connections: how many may be open at once for commands; one more listens
    :param patience: seconds that subscribers wait for Redis when it is away; then they raise
        :class:`BrokerUnavailable`. ``None``: for ever
    :raises TypeError: an argument is of the wrong type; the message names it
    :raises ValueError: an argument is out of range, or the URL is none of Redis'
    """

    def __init__(
        self,
        url: str,
        *,
        retain: int = 1000,
        max_age: float = 3600.0,
        prefix: str = "fastapi_cancel:",
        connections: int = 4,
        patience: float | None = 30.0,
    ) -> None:
        super().__init__(retain=retain, max_age=max_age)
        check_count("connections", connections)
        check_seconds("patience", patience, zero=True, none=True)
        if not isinstance(prefix, str):
            raise TypeError(f"prefix must be a str, not {prefix!r}")
        self._link = Link(url, connections, self._joined, self._changed)
        self.runs: RedisRuns = RedisRuns(self._link, prefix)
        self.streams: RedisStreams = RedisStreams(self._link, prefix, retain, max_age)
        self._prefix = prefix
        self._patience = patience
        self.milliseconds = int(max_age * 1000)
        self._channels: dict[str, _Channel] = {}
        self._to_look: set[str] = set()
        self._work = anyio.Event()
        self._looker: asyncio.Task[None] | None = None
        self._losing: asyncio.TimerHandle | None = None
        self.failure: BrokerUnavailable | None = None

    async def open(self) -> None:
        await self._link.open()
        await self.runs.open()
        await self.streams.open()
        self._looker = asyncio.get_running_loop().create_task(self._look(), name="fastapi_cancel Redis looker")

    async def aclose(self) -> None:
        if self._looker is not None:
            self._looker.cancel()
            await asyncio.wait([self._looker])
            self._looker = None
        await self.runs.aclose()
        self._changed(None)
        self._fail(BrokerUnavailable(CLOSED))
        await self._link.aclose()

    # -- publishing --------------------------------------------------------------------------

    async def _publish(self, channel: str, wire: bytes) -> Place:
        id = await self.ask(PUBLISH, channel, wire, self.retain, self.milliseconds, self._topic(channel))
        return _place(id)

    async def ask(self, script: str, channel: str, *arguments: object) -> Any:
        (answer,) = await self._link.run(script, ([self._key(channel)], arguments))
        return answer

    def _key(self, channel: str) -> str:
        return f"{self._prefix}log:{channel}"

    def _topic(self, channel: str) -> str:
        return f"{self._prefix}channel:{channel}"

    # -- subscribing -------------------------------------------------------------------------

    @asynccontextmanager
    async def _subscribe(
        self, channel: str, after: str | None, lag: int | None, slow: Slow
    ) -> AsyncIterator[Subscription]:
        if (here := self._channels.get(channel)) is None:
            here = self._channels[channel] = _Channel(self, channel)
        here.readers += 1
        try:
            async with here.lock:
                if not here.joined:
                    here.joined = True
                    await self._link.join(self._topic(channel), here.hear)
            log = await here.ready()
            yield Subscription(log, here, Place.parse(after) if after is not None else log.place, lag, slow)
        finally:
            here.readers -= 1
            if not here.readers:
                with anyio.CancelScope(shield=True):
                    await self._leave(channel, here)

    async def _leave(self, channel: str, here: _Channel) -> None:
        async with here.lock:
            if here.joined and not here.readers:
                here.joined = False
                here.forget()
                await self._link.leave(self._topic(channel))
        if not here.readers and self._channels.get(channel) is here:
            del self._channels[channel]

    # -- looking -----------------------------------------------------------------------------

    def _joined(self, topic: str) -> None:
        if topic == self.runs.topic:
            self.runs.enter_again()
        elif topic.startswith(self._topic("")):
            self._to_look.add(topic.removeprefix(self._topic("")))
            self._work.set()

    async def _look(self) -> None:
        """Look at what has been joined, and now and then at all channels: what is listened to is not forgotten."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self.max_age / 3):
                    await self._work.wait()
            if not self._work.is_set():
                self._to_look.update(self._channels)
            self._work = anyio.Event()
            while self._to_look:
                names = [self._to_look.pop() for _ in range(min(LOOKS, len(self._to_look)))]
                try:
                    ids = await self._link.run(LOOK, *[([self._key(name)], [self.milliseconds]) for name in names])
                except BrokerUnavailable:
                    self._to_look.update(names)
                    await asyncio.sleep(AGAIN)
                else:
                    for name, id in zip(names, ids, strict=True):
                        if (here := self._channels.get(name)) is not None and here.joined:
                            here.log.move_to(_place(id))

    def _changed(self, reason: str | None) -> None:
        """Redis has gone, or is back."""
        if self._losing is not None:
            self._losing.cancel()
            self._losing = None
        if reason is None:
            self._fail(None)
        elif self._patience is not None:
            loop = asyncio.get_running_loop()
            self._losing = loop.call_later(self._patience, self._fail, BrokerUnavailable(reason))

    def _fail(self, failure: BrokerUnavailable | None) -> None:
        self.failure = failure
        for here in self._channels.values():
            here.log.fail(failure)
