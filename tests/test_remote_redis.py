"""Stop anywhere, when Redis goes away or forgets, and when workers die. In process, with a real Redis."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any

import anyio
import pytest

from fastapi_cancel import Broker, Stoppable, connect
from fastapi_cancel.broker import _redis_runs
from fastapi_cancel.broker._redis_runs import RedisRuns
from fastapi_cancel.broker.runs import Running
from fastapi_cancel.testing import when

from .conftest import DEADLINE
from .redis_server import RedisServer
from .test_remote import Job, client, under, until

pytestmark = pytest.mark.anyio
prefixes = (f"remote {number}:" for number in count())


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def two(server: RedisServer) -> tuple[Broker, Broker]:
    prefix = next(prefixes)
    return connect(server.url, prefix=prefix), connect(server.url, prefix=prefix)


def quiet(app: Any) -> Any:
    """A client that takes no offence at a warning that Redis is away."""
    return client(app, log_level=100)


async def eventually(stop: Callable[[], Awaitable[int]], count: int) -> None:
    with anyio.fail_after(DEADLINE):
        while await stop() != count:
            await anyio.sleep(0.02)


async def test_redis_is_away_at_the_start_and_comes_back(own_redis: RedisServer) -> None:
    """The request begins; once Redis is back, it can be stopped."""
    here, there = two(own_redis)
    async with here:
        own_redis.kill()
        job = Job()
        async with quiet(under(Stoppable(here, "k"), job)).visit("GET", "/jobs/1") as visit:
            await visit.until(when(job.begun))
            assert own_redis.start()
            async with there:
                await eventually(lambda: there.stop("k", early=0, reason="back"), 1)
                await until(lambda: visit.over)
        assert job.reasons == ["back"]


async def test_redis_is_away_at_the_end(own_redis: RedisServer) -> None:
    here, _ = two(own_redis)
    async with here:
        async with quiet(under(Stoppable(here, "k"), lambda: own_redis.kill())).visit("GET", "/jobs/1") as visit:
            await until(lambda: visit.over)
        assert visit.status == 200


async def test_a_redis_that_hangs_keeps_nobody_waiting(own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_redis_runs, "ENTERING", 0.05)
    here, there = two(own_redis)
    async with here, there:
        job = Job()
        with own_redis.client() as outside:
            outside.client_pause(1000)
        async with quiet(under(Stoppable(here, "k"), job)).visit("GET", "/jobs/1") as visit:
            await visit.until(when(job.begun))
            await eventually(lambda: there.stop("k", early=0), 1)
            await until(lambda: visit.over)


async def test_a_stop_while_the_worker_does_not_listen(own_redis: RedisServer) -> None:
    """It reaches it once it listens again."""
    here, there = two(own_redis)
    async with here, there:
        job = Job()
        async with quiet(under(Stoppable(here, "k"), job)).visit("GET", "/jobs/1") as visit:
            await visit.until(when(job.begun))
            with own_redis.client() as outside:
                outside.client_kill_filter(_type="pubsub")
            assert await there.stop("k", reason="anyway") == 1
            await until(lambda: visit.over)
        assert job.reasons == ["anyway"]


async def test_runs_are_registered_again_with_a_redis_that_forgot(
    own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An early stop that came meanwhile reaches them as well."""
    monkeypatch.setattr(_redis_runs, "LEASE", 0.3)
    here, there = two(own_redis)
    async with here, there:
        for reason in ("again", "early"):
            job = Job()
            async with quiet(under(Stoppable(here, "k"), job)).visit("GET", "/jobs/1") as visit:
                await visit.until(when(job.begun))
                with own_redis.client() as outside:
                    outside.flushall()
                if reason == "early":
                    assert await there.stop("k", reason="early") in (0, 1)
                else:
                    await eventually(lambda: there.stop("k", early=0, reason="again"), 1)
                await until(lambda: visit.over)
            assert job.reasons == [reason]


async def test_the_runs_of_a_dead_worker_run_out(own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_redis_runs, "LEASE", 0.3)
    here, there = two(own_redis)
    async with there:
        await here.open()
        assert isinstance(here.runs, RedisRuns)
        await here.runs.enter(Running("k", "1", lambda reason: None))
        assert await there.stop("k", early=0) == 1
        await here.aclose()
        await eventually(lambda: there.stop("k", early=0), 0)
        with own_redis.client() as outside:
            await until(lambda: not outside.keys("*runs:*"))


async def test_a_run_that_left_while_it_entered_again(own_redis: RedisServer) -> None:
    here, there = two(own_redis)
    async with here, there:
        assert isinstance(here.runs, RedisRuns)
        gone = Running("k", "1", lambda reason: None)
        await here.runs._enter([gone])
        assert await there.stop("k", early=0) == 0
        here.runs._hear(b'{"runs": ["unknown"], "reason": ""}')
