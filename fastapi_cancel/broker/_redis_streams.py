"""The streams of all processes, in Redis. A worker hears on a channel of its own who reads what it produces."""

from __future__ import annotations

import json
import secrets
from typing import Any, cast

from ._link import Link
from ._names import Names, milliseconds
from ._scripts import ATTEND, CLAIM, DEPART, FIND, FINISH, PRODUCE, RENEW
from .streams import Fate, Found, Streams, ending


class RedisStreams(Streams):
    """Those of all processes with the same Redis and prefix.

    :param retain: how many events of a stream are kept
    :param max_age: seconds that an event, and a stream that nobody hears of, are kept
    """

    def __init__(self, link: Link, names: Names, retain: int, max_age: float) -> None:
        super().__init__()
        self._link = link
        self._names = names
        self._retain = retain
        self._max_age = milliseconds(max_age)
        self._topics = names.producer("")
        self._worker = secrets.token_hex(8)

    async def open(self) -> None:
        await self._link.join(self._topics + self._worker, self._hear)

    async def claim(self, key: str, run: str, lease: float, replace: bool) -> tuple[Found, str | None]:
        arguments = [run, self._worker, milliseconds(lease), int(replace), self._max_age]
        live, epoch, before = await self._run(CLAIM, key, *arguments)
        return Found(live.decode(), int(epoch)), before.decode() if before is not None else None

    async def find(self, key: str) -> Found | None:
        if (found := await self._run(FIND, key)) is None:
            return None
        run, epoch, state, last = found
        return Found(run.decode(), int(epoch), state.decode(), int(last))

    async def produce(self, key: str, run: str, number: int, wire: bytes) -> bool:
        return bool(await self._run(PRODUCE, key, run, number, wire, *self._log(key)))

    async def renew(self, key: str, run: str, lease: float) -> tuple[float | None, int] | None:
        if (seen := await self._run(RENEW, key, run, milliseconds(lease), self._max_age)) is None:
            return None
        idle, at = seen
        return None if idle is None else idle / 1000, at

    async def finish(self, key: str, run: str, state: str, keep: float, *words: bytes) -> bool:
        arguments = [run, state, milliseconds(keep), *self._log(key), *words, ending(state)]
        return bool(await self._run(FINISH, key, *arguments))

    async def attend(self, key: str, run: str, reader: str, at: int, lease: float) -> Fate:
        fate = await self._run(ATTEND, key, run, reader, at, milliseconds(lease), self._topics)
        return cast(Fate, fate.decode())

    async def depart(self, key: str, run: str, reader: str) -> None:
        await self._run(DEPART, key, run, reader, self._topics)

    def _log(self, key: str) -> tuple[int, int, str]:
        """What there is to know for appending: how many to keep, for how long, whom to tell."""
        return self._retain, self._max_age, self._names.topic(self.channel(key))

    async def _run(self, script: str, key: str, *arguments: object) -> Any:
        keys = [self._names.stream(key), self._names.log(self.channel(key))]
        (answer,) = await self._link.run(script, (keys, arguments))
        return answer

    def _hear(self, message: bytes) -> None:
        told = json.loads(message)
        self._tell(told["run"], told["at"] if told["at"] >= 0 else None)
