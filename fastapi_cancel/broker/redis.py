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
- *Redis begins anew, with all, with some or with none of its data*: its life has another name. The next event
  opens an epoch, and says what it comes after; who has read more, or less, is told of a gap.
- *the last subscriber leaves while another comes*: one lock a channel.
- *the last subscriber is interrupted while it leaves*: our looker leaves for it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any

import anyio

from ..policy import check_seconds
from ._link import Link, Result, end
from ._names import Names, milliseconds
from ._redis_runs import RedisRuns
from ._redis_streams import RedisStreams
from ._scripts import LOOK, PUBLISH, READ
from .base import CLOSED, Broker, BrokerUnavailable, check_count
from .log import NOWHERE, Entry, Event, Log, Place, Slow, Subscription

PAGE = 100  # events that are read from Redis at once
WINDOW = 100  # events of a channel that are kept in memory as well
LOOKS = 200  # channels that are looked at in one exchange
AGAIN = 0.5  # seconds, at most, until what failed is tried again
SPARE = 1.0  # seconds: it is the connection that listens which tells first that Redis is away


class _Channel:
    """A channel that this process listens to.

    :ivar readers: how many subscribers there are, or are about to be
    :ivar joined: whether it is listened to, or will be once Redis is back
    """

    def __init__(self, broker: RedisBroker, name: str) -> None:
        self.readers = 0
        self.joined = False
        self.lock = anyio.Lock()
        self._readings: dict[Place, asyncio.Task[tuple[Place, list[Entry]]]] = {}
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
        if (place := Place.parse(id.decode(errors="replace"))) is not None:  # else it is none of ours
            self.log.append(place, Event(str(place), wire))

    async def ready(self) -> Log:
        """Wait until it is known where the channel is."""
        with self._broker.patiently():
            while self.log.place == NOWHERE:
                self.log.check()
                await self.log.wait()
        return self.log

    async def read(self, place: Place) -> tuple[Place, list[Entry]]:
        """The store of its subscribers. Those who are at the same place read together: all, after an outage."""
        if (reading := self._readings.get(place)) is None:
            reading = self._readings[place] = self._broker.begin(self._read(place))
        return await asyncio.shield(reading)

    async def _read(self, place: Place) -> tuple[Place, list[Entry]]:
        try:
            log, known = self.log, self.log.place
            answer = await self._broker.ask_patiently(READ, self._name, str(place), PAGE, self._broker.milliseconds)
            newest = _place(answer[0])
            log.move_to(newest, known)
            return newest, [_entry(_place(id), *fields) for id, fields in answer[1]]
        finally:
            del self._readings[place]


def _place(id: bytes) -> Place:
    epoch, _, number = id.partition(b"-")
    return Place(int(epoch), int(number))


def _entry(place: Place, _: bytes, at: bytes, __: bytes, wire: bytes, *after: bytes) -> Entry:
    return Entry(place, Event(str(place), wire), _place(after[1]) if after else None)


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
        self.milliseconds = milliseconds(max_age)
        self._connect = partial(Link, url, connections, self._joined, self._changed)
        self._names = Names(prefix)
        self._patience = patience
        self._begin()

    def _begin(self) -> None:
        """What belongs to one event loop: tests open an application's broker in many, one after the other."""
        self._link = self._connect()
        self.runs = self._runs = RedisRuns(self._link, self._names)
        self.streams = self._streams = RedisStreams(self._link, self._names, self.retain, self.max_age)
        self._channels: dict[str, _Channel] = {}
        self._to_look: set[str] = set()
        self._work = asyncio.Event()
        self._looker: asyncio.Task[None] | None = None
        self._losing: asyncio.TimerHandle | None = None
        self.failure: str | None = None

    async def open(self) -> None:
        if self._looker is not None:
            raise RuntimeError("the broker is open already")
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise RuntimeError("a broker in Redis needs asyncio: redis-py does not work on Trio") from None
        self._begin()
        try:
            await self._link.open()
            await self._runs.open()
            await self._streams.open()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.aclose()
            raise
        self._looker = loop.create_task(self._look(), name="fastapi_cancel Redis looker")

    async def aclose(self) -> None:
        if self._looker is not None:
            await end(self._looker)
            self._looker = None
        await self._runs.aclose()
        self._changed(None)
        self._fail(CLOSED)
        await self._link.aclose()

    # -- publishing --------------------------------------------------------------------------

    async def _publish(self, channel: str, wire: bytes) -> Place:
        id = await self.ask(PUBLISH, channel, wire, self.retain, self.milliseconds, self._names.topic(channel))
        return _place(id)

    async def ask(self, script: str, channel: str, *arguments: object) -> Any:
        (answer,) = await self._link.run(script, ([self._names.log(channel)], arguments))
        return answer

    def begin(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        return self._link.begin(work)

    async def ask_patiently(self, script: str, channel: str, *arguments: object) -> Any:
        """As a subscriber does: Redis may be away for a while."""
        with self.patiently():
            while True:
                if self.failure is not None:
                    raise BrokerUnavailable(self.failure)
                with suppress(BrokerUnavailable):
                    return await self.ask(script, channel, *arguments)
                await asyncio.sleep(AGAIN * random.uniform(0.5, 1))

    @contextmanager
    def patiently(self) -> Iterator[None]:
        """Not longer than subscribers wait."""
        limit = None if self._patience is None else self._patience + SPARE
        try:
            with anyio.fail_after(limit):
                yield
        except TimeoutError:
            raise BrokerUnavailable(f"{self._link.name}: no answer") from None

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
                    await self._link.join(self._names.topic(channel), here.hear)
            log = await here.ready()
            log.forget_old()
            yield Subscription(log, here, Place.parse(after) if after is not None else log.place, lag, slow)
        finally:
            here.readers -= 1
            if not here.readers:
                try:
                    with anyio.CancelScope(shield=True):
                        await self._leave(channel, here)
                except BaseException:
                    self._remember(channel)  # our looker leaves it
                    raise

    async def _leave(self, channel: str, here: _Channel) -> None:
        async with here.lock:
            if here.joined and not here.readers:
                here.joined = False
                here.forget()
                await self._link.leave(self._names.topic(channel))
        if not here.readers and self._channels.get(channel) is here:
            del self._channels[channel]

    # -- looking -----------------------------------------------------------------------------

    def _joined(self, topic: str) -> None:
        if topic == self._runs.topic:
            self._runs.enter_again()
        elif topic.startswith(self._names.topic("")):
            self._remember(topic.removeprefix(self._names.topic("")))

    def _remember(self, channel: str) -> None:
        self._to_look.add(channel)
        self._work.set()

    async def _look(self) -> None:
        """Look at what has been joined, and now and then at all channels: what is listened to is not forgotten."""
        loop = asyncio.get_running_loop()
        due = loop.time() + self.max_age / 3
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._work.wait()
            self._work.clear()
            if loop.time() >= due:
                due = loop.time() + self.max_age / 3
                self._to_look.update(self._channels)
            while self._to_look:
                names = [self._to_look.pop() for _ in range(min(LOOKS, len(self._to_look)))]
                try:
                    await self._look_at({name: self._channels[name] for name in names if name in self._channels})
                except BrokerUnavailable:
                    self._to_look.update(names)
                    await asyncio.sleep(AGAIN * random.uniform(0.5, 1))

    async def _look_at(self, channels: dict[str, _Channel]) -> None:
        logs = {name: (here.log, here.log.place) for name, here in channels.items() if here.joined}
        if logs:
            ids = await self._link.run(LOOK, *[([self._names.log(name)], [self.milliseconds]) for name in logs])
            for (log, known), id in zip(logs.values(), ids, strict=True):
                before = log.place
                log.move_to(_place(id), known)
                if log.place != before:
                    log.unheard = log.last
        for name, here in channels.items():
            if not here.readers:  # the last one was interrupted while it left
                await self._leave(name, here)

    def _changed(self, reason: str | None) -> None:
        """Redis has gone, or is back."""
        if self._losing is not None:
            self._losing.cancel()
            self._losing = None
        if reason is None:
            self._fail(None)
        elif self._patience is not None:
            self._losing = asyncio.get_running_loop().call_later(self._patience, self._fail, reason)

    def _fail(self, failure: str | None) -> None:
        self.failure = failure
        for here in self._channels.values():
            here.log.fail(failure)
