"""A process's connections to Redis: one that listens, and a few for commands, however many clients there are."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import anyio

from .base import CLOSED, BrokerUnavailable

try:
    import redis.asyncio as redis
    from redis.asyncio.client import PubSub
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
    from redis.commands.core import AsyncScript
    from redis.exceptions import RedisError
except ModuleNotFoundError as exc:
    raise ImportError("a broker in Redis needs redis-py: pip install 'fastapi-cancel[redis]'") from exc

logger = logging.getLogger("fastapi_cancel")

OLDEST = (6, 2)
COMMAND = 5.0  # seconds for one command
QUIET = 10.0  # seconds without a word from Redis, until we ask whether it is still there
BACK_OFF = 0.05, 2.0  # seconds between two attempts to connect: the first, the longest
AT_ONCE = 500  # channels that are joined with one command

Heard = Callable[[bytes], None]
AWAY = (RedisError, OSError, asyncio.TimeoutError)


class Link:
    """Listens to Redis' channels, and comes back when the connection is lost.

    :param url: of redis-py
    :param connections: how many may be open for commands, beside the one that listens
    :param joined: called with the name of a channel that is listened to from now on, for the first time or again
    :param changed: called when Redis has gone away, with the reason, and with ``None`` when it is back
    :raises ValueError: the URL is none of Redis'
    """

    def __init__(
        self,
        url: str,
        connections: int,
        joined: Callable[[str], None],
        changed: Callable[[str | None], None],
    ) -> None:
        options: dict[str, Any] = {
            "protocol": 2,
            "retry": Retry(NoBackoff(), 0),  # what may have been done already is not done again
            "socket_connect_timeout": COMMAND,
        }
        self.name = without_secrets(url)
        try:
            self._listening = redis.Redis.from_url(url, max_connections=1, **options)
            pool = redis.BlockingConnectionPool.from_url(
                url, max_connections=connections, timeout=COMMAND, socket_timeout=COMMAND, **options
            )
        except (ValueError, TypeError) as exc:
            raise ValueError(f"url: {self.name} cannot be used: {exc}") from None
        self._commands = redis.Redis.from_pool(pool)
        self._joined = joined
        self._changed = changed
        self._scripts: dict[str, AsyncScript] = {}
        self._wanted: dict[str, Heard] = {}
        self._waits: dict[tuple[str, str], anyio.Event] = {}
        self._pubsub: PubSub | None = None
        self._listener: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connect.

        :raises BrokerUnavailable: Redis does not answer, refuses us, or is too old
        """
        try:
            info: Mapping[str, Any] = await self._commands.info("server")
        except AWAY as exc:
            await self._disconnect()
            raise BrokerUnavailable(f"{self.name}: {exc}") from exc
        version = str(info["redis_version"])
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
            await self._disconnect()
            raise BrokerUnavailable(f"{self.name}: Redis {version} is too old, {OLDEST[0]}.{OLDEST[1]} is needed")
        self._listener = asyncio.get_running_loop().create_task(self._listen(), name="fastapi_cancel Redis listener")

    async def aclose(self) -> None:
        """Disconnect."""
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.wait([self._listener])
            self._listener = None
        await self._disconnect()

    async def _disconnect(self) -> None:
        await self._commands.aclose()
        await self._commands.connection_pool.disconnect()
        await self._listening.aclose()

    # -- commands ----------------------------------------------------------------------------

    async def run(self, script: str, *calls: tuple[Sequence[str], Sequence[Any]]) -> list[Any]:
        """Run ``script`` with each pair of keys and arguments, in one exchange. What it returned.

        :raises BrokerUnavailable: Redis does not answer in time
        """
        if self._listener is None:
            raise RuntimeError(f"{CLOSED}, or not opened: async with broker, or lifespan(broker)")
        if (known := self._scripts.get(script)) is None:
            known = self._scripts[script] = self._commands.register_script(script)
        try:
            if len(calls) == 1:
                return [await known(*calls[0])]
            async with self._commands.pipeline(transaction=False) as pipeline:
                for keys, arguments in calls:
                    await known(keys, arguments, client=pipeline)
                return await pipeline.execute()
        except AWAY as exc:
            raise BrokerUnavailable(f"{self.name}: {exc or type(exc).__name__}") from exc

    # -- channels ----------------------------------------------------------------------------

    async def join(self, channel: str, heard: Heard) -> None:
        """Have ``heard`` called with all that is published there from now on."""
        self._wanted[channel] = heard
        if self._pubsub is not None:
            with suppress(*AWAY):  # who listens will hear of it as well, and join again
                await self._pubsub.subscribe(channel)

    async def leave(self, channel: str) -> None:
        """Undo it. Redis has confirmed that, or is away."""
        del self._wanted[channel]
        if self._pubsub is None:
            return
        left = self._waits.setdefault(("unsubscribe", channel), anyio.Event())
        with suppress(*AWAY):
            await self._pubsub.unsubscribe(channel)
            with anyio.move_on_after(COMMAND):
                await left.wait()
        self._waits.pop(("unsubscribe", channel), None)

    async def _listen(self) -> None:
        wait, longest = BACK_OFF
        away = False
        while True:
            try:
                async with self._listening.pubsub() as self._pubsub:
                    await self._pubsub.ping()
                    names = list(self._wanted)
                    for start in range(0, len(names), AT_ONCE):
                        await self._pubsub.subscribe(*names[start : start + AT_ONCE])
                    while True:
                        message = await self._next(self._pubsub)
                        if away:
                            away = False
                            wait, _ = BACK_OFF
                            logger.warning("%s is back", self.name)
                            self._changed(None)
                        self._hear(message)
            except AWAY as exc:
                reason = f"{self.name}: {exc or type(exc).__name__}"
            finally:
                self._pubsub = None
                for event in self._waits.values():  # the connection has gone, and what was asked of it
                    event.set()
            if not away:
                away = True
                logger.warning("%s is away: %s", self.name, reason)
                self._changed(reason)
            await asyncio.sleep(wait * random.uniform(0.5, 1))
            wait = min(2 * wait, longest)

    async def _next(self, pubsub: PubSub) -> dict[str, Any]:
        message: dict[str, Any] | None = await pubsub.get_message(timeout=QUIET)
        if message is None:
            await pubsub.ping()
            message = await pubsub.get_message(timeout=COMMAND)
            if message is None:
                raise BrokerUnavailable("no answer")
        return message

    def _hear(self, message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind == "pong":
            return
        channel = message["channel"].decode()
        if kind == "message":
            if (heard := self._wanted.get(channel)) is not None:
                heard(message["data"])
        elif kind == "subscribe":
            self._joined(channel)
        elif (event := self._waits.get((kind, channel))) is not None:
            event.set()


def without_secrets(url: str) -> str:
    """``url`` as it may be logged."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"
