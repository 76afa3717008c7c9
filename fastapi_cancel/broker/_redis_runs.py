"""The runs of all processes, in Redis. Each worker has one channel on which it is told what to stop.

A worker that is away when a run of its is stopped learns of it later: all runs enter again now and then, and
whenever the worker listens again. That also registers them with a Redis that has forgotten them, and lets those
of a dead worker run out. While Redis is away, runs go on; nobody can stop them.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from contextlib import suppress

import anyio

from ._link import Link, end
from ._names import Names, milliseconds
from ._scripts import ENTER, LEAVE, STOP
from .base import BrokerUnavailable
from .runs import EARLY_AT_MOST, Running, Runs

LEASE = 30.0  # seconds until a run whose worker has died is forgotten
ENTERING = 1.0  # seconds that a run waits for Redis before it begins
AT_ONCE = 500  # runs that enter again in one exchange


class RedisRuns(Runs):
    """Those of all processes with the same Redis and prefix."""

    def __init__(self, link: Link, names: Names) -> None:
        self._link = link
        self._worker = secrets.token_hex(8)
        self._names = names
        self.topic = names.worker(self._worker)
        self._runs: dict[str, Running] = {}
        self._again = anyio.Event()
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        await self._link.join(self.topic, self._hear)
        self._task = asyncio.get_running_loop().create_task(self._stay(), name="fastapi_cancel Redis runs")

    async def aclose(self) -> None:
        if self._task is not None:
            await end(self._task)
            self._task = None

    async def enter(self, this: Running) -> None:
        self._runs[this.token] = this
        with anyio.move_on_after(ENTERING, shield=True) as scope:  # cut off, it might enter after it has left
            with suppress(BrokerUnavailable):
                await self._enter([this])
        if scope.cancelled_caught:
            self.enter_again()

    async def leave(self, this: Running) -> None:
        del self._runs[this.token]
        with suppress(BrokerUnavailable):  # then it runs out
            await self._leave([this])

    async def stop(self, key: str, run: str | None, reason: str, early: float) -> int:
        arguments = [run or "", reason, milliseconds(early), self._names.worker("")]
        (count,) = await self._link.run(STOP, ([self._names.runs(key)], arguments))
        return int(count)

    def enter_again(self) -> None:
        """Redis may have forgotten our runs, or have had something to say to them."""
        self._again.set()

    async def _stay(self) -> None:
        while True:
            with anyio.move_on_after(LEASE / 3):
                await self._again.wait()
            self._again = anyio.Event()
            runs = list(self._runs.values())
            for start in range(0, len(runs), AT_ONCE):
                with suppress(BrokerUnavailable):
                    await self._enter(runs[start : start + AT_ONCE])

    async def _enter(self, runs: list[Running]) -> None:
        lease = milliseconds(LEASE)
        calls = [([self._names.runs(each.key)], [each.token, each.run, self._worker, lease]) for each in runs]
        for each, reason in zip(runs, await self._link.run(ENTER, *calls), strict=True):
            if reason is not None:
                each.tell(reason.decode())
        if gone := [each for each in runs if each.token not in self._runs]:  # it has left meanwhile
            await self._leave(gone)

    async def _leave(self, runs: list[Running]) -> None:
        calls = [([self._names.runs(each.key)], [each.token, milliseconds(EARLY_AT_MOST)]) for each in runs]
        await self._link.run(LEAVE, *calls)

    def _hear(self, message: bytes) -> None:
        told = json.loads(message)
        for token in told["runs"]:
            if (this := self._runs.get(token)) is not None:
                this.tell(told["reason"])
