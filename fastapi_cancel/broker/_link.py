"""A process's connections to Redis: one that listens, and a few for commands, however many clients there are."""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

from ._urls import without_secrets
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

OURS = {"decode_responses", "encoding", "encoding_errors", "health_check_interval", "max_connections", "protocol"}

Result = TypeVar("Result")
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
            # What may have been done already is not done again; and of two tasks that meet an error on the connection
            # that listens, none is to connect anew by itself.
            "retry": Retry(NoBackoff(), 0, supported_errors=()),
            "socket_connect_timeout": COMMAND,
        }
        self.name = without_secrets(url)
        try:
            if taken := OURS & dict(parse_qsl(urlsplit(url).query)).keys():
                raise ValueError(f"{', '.join(sorted(taken))} is not for you to set")
            self._listening = redis.Redis.from_url(url, max_connections=1, socket_timeout=None, **options)
            pool = redis.BlockingConnectionPool.from_url(
                url, max_connections=connections, timeout=COMMAND, socket_timeout=COMMAND, **options
            )
            pool.connection_class(**pool.connection_kwargs)  # which is where redis-py looks at its options
        except (ValueError, TypeError) as exc:
            raise ValueError(f"url {self.name} cannot be used: {exc}") from None
        self._commands = redis.Redis.from_pool(pool)
        self._joined = joined
        self._changed = changed
        self._scripts: dict[str, AsyncScript] = {}
        self._wanted: dict[str, Heard] = {}
        self._waits: dict[str, asyncio.Event] = {}
        self._writing = asyncio.Lock()
        self._heard = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._pubsub: PubSub | None = None
        self._listener: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connect. If that fails, it is to be closed all the same.

        :raises BrokerUnavailable: Redis does not answer, refuses us, is too old, or a cluster or a sentinel
        """
        try:
            info: Mapping[str, Any] = await self._commands.info("server")
        except AWAY as exc:
            raise BrokerUnavailable(f"{self.name}: {exc or type(exc).__name__}") from exc
        mode = info.get("redis_mode") or info.get("server_mode")  # Redis, Valkey
        if fault := _unfit(str(info["redis_version"]), mode):
            raise BrokerUnavailable(f"{self.name}: {fault}")
        self._listener = asyncio.get_running_loop().create_task(self._listen(), name="fastapi_cancel Redis listener")

    async def aclose(self) -> None:
        """Disconnect."""
        if self._listener is not None:
            await end(self._listener)
            self._listener = None
        while self._tasks:
            await asyncio.wait(self._tasks)  # each has its time limit
        await self._commands.aclose()
        await self._commands.connection_pool.disconnect()
        await self._listening.aclose()

    async def _apart(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Do it in a task of its own.

        A cancellation must not end a connection that others use, and redis-py can lose it (``asyncio.wait_for``,
        Python 3.11).
        """
        return await asyncio.shield(self.begin(work))

    def begin(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        """In a task, for which the closing waits. Its error is that of who waits for it; then nobody's."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        _ = task.cancelled() or task.exception()

    # -- commands ----------------------------------------------------------------------------

    async def run(self, script: str, *calls: tuple[Sequence[str], Sequence[Any]]) -> list[Any]:
        """Run ``script`` with each pair of keys and arguments, in one exchange. What it returned.

        :raises BrokerUnavailable: Redis does not answer in time
        """
        if self._listener is None:
            raise RuntimeError(f"{CLOSED}, or not opened: async with broker, or lifespan(broker)")
        if (known := self._scripts.get(script)) is None:
            known = self._scripts[script] = self._commands.register_script(script)
        return await self._apart(self._run(known, calls))

    async def _run(self, known: AsyncScript, calls: Sequence[tuple[Sequence[str], Sequence[Any]]]) -> list[Any]:
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
        await self._apart(self._join(channel))

    async def _join(self, channel: str) -> None:
        with suppress(*AWAY):  # who listens will hear of it as well, and join again
            async with asyncio.timeout(COMMAND), self._writing:
                if self._pubsub is not None:
                    await self._pubsub.subscribe(channel)

    async def leave(self, channel: str) -> None:
        """Undo it. Redis has confirmed that, or is away."""
        del self._wanted[channel]
        await self._apart(self._leave(channel))

    async def _leave(self, channel: str) -> None:
        with suppress(*AWAY):
            async with asyncio.timeout(COMMAND):
                async with self._writing:
                    if self._pubsub is None:
                        return
                    left = self._waits.setdefault(channel, asyncio.Event())
                    await self._pubsub.unsubscribe(channel)
                await left.wait()

    async def _listen(self) -> None:
        wait, longest = BACK_OFF
        away = False
        while True:
            pubsub = self._listening.pubsub()
            reading: asyncio.Task[None] | None = None
            try:
                await pubsub.ping()
                await asyncio.wait_for(pubsub.get_message(timeout=None), COMMAND)
                if away:
                    away = False
                    wait, _ = BACK_OFF
                    logger.warning("back: %s", self.name)
                    self._changed(None)
                names, self._pubsub = list(self._wanted), pubsub  # who joins from here on says so itself
                for start in range(0, len(names), AT_ONCE):
                    await pubsub.subscribe(*names[start : start + AT_ONCE])
                reading = asyncio.get_running_loop().create_task(self._read(pubsub))
                while await self._hears(reading, QUIET) or await self._answers(reading, pubsub):
                    pass
                raise BrokerUnavailable("no answer")
            except Exception as exc:  # whatever redis-py makes of it: nobody else would notice that we are deaf
                reason = f"{self.name}: {exc or type(exc).__name__}"
            finally:
                if reading is not None:
                    await end(reading)
                async with self._writing:
                    self._pubsub = None
                    await pubsub.aclose()  # type: ignore[no-untyped-call]
                while self._waits:  # the connection has gone, and what was asked of it
                    self._waits.popitem()[1].set()
            if not away:
                away = True
                logger.warning("away: %s", reason)
                self._changed(reason)
            await asyncio.sleep(wait * random.uniform(0.5, 1))
            wait = min(2 * wait, longest)

    async def _read(self, pubsub: PubSub) -> None:
        while True:
            message: Any = await pubsub.get_message(timeout=None)
            self._heard += 1
            self._hear(message)

    async def _hears(self, reading: asyncio.Task[None], seconds: float) -> bool:
        """Whether anything has come in that time. What ends the reading is raised."""
        before = self._heard
        await asyncio.wait([reading], timeout=seconds)
        if reading.done():
            reading.result()
        return self._heard > before

    async def _answers(self, reading: asyncio.Task[None], pubsub: PubSub) -> bool:
        await pubsub.ping()
        return await self._hears(reading, COMMAND)

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
        elif (event := self._waits.pop(channel, None)) is not None:
            event.set()


async def end(task: asyncio.Task[None]) -> None:
    """Cancel it until it has ended: while redis-py reconnects, a cancellation can get lost."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=0.1)


def _unfit(version: str, mode: str | None) -> str | None:
    """Why we cannot work with such a server."""
    if mode == "sentinel":
        return "this is a sentinel: give the URL of what it watches (see docs/redis.md)"
    if mode == "cluster":
        return "Redis Cluster is not supported (see docs/redis.md)"
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST:
        return f"Redis {version} is too old, {OLDEST[0]}.{OLDEST[1]} is needed"
    return None
