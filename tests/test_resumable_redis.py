"""Streams that outlive a connection, when Redis goes away or forgets, and when somebody is silent. In process, with a
real Redis."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from fastapi_cancel import BrokerUnavailable, SSEResponse, connect
from fastapi_cancel import _producer as module

from .redis_server import RedisServer
from .test_resumable import Work, Worker, ended, numbers, until, working

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def new(server: RedisServer) -> Any:
    return lambda **options: connect(server.url, **options)


def quiet(*workers: Worker) -> None:
    for worker in workers:
        worker.client.log_level = 100


async def test_redis_begins_again_with_its_data(persistent_redis: RedisServer) -> None:
    """The stream goes on, without loss or duplicate."""
    work = Work(allowed=3)
    async with working(new(persistent_redis), work) as (here, there):
        quiet(here, there)
        async with here.reading() as one, there.reading("/resume") as two:
            await one.has(3)
            await two.has(3)
            persistent_redis.kill()
            work.last = 9
            work.allow(9)
            await anyio.sleep(0.3)
            assert persistent_redis.start()
            await until(lambda: one.visit.over and two.visit.over)
        assert one.data == two.data == numbers(1, 9)
        assert work.ended == 1


async def test_redis_begins_again_without_its_data(own_redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """The readers are told, the work ends, and a new one can begin."""
    work = Work(allowed=3)
    async with working(new(own_redis), work) as (here, there):
        quiet(here, there)
        async with here.reading() as one, there.reading("/resume") as two:
            await one.has(3)
            await two.has(3)
            own_redis.kill()
            assert own_redis.start()
            await until(lambda: one.visit.over and two.visit.over and work.ended)
        assert one.data == two.data == [*numbers(1, 3), ended("lost")]
        here.make = Work(allowed=2, last=2).response
        assert (await here.read()).data == numbers(1, 2)
    assert "stream k has ended, and cannot say so: another run has taken the stream" in caplog.text


async def test_redis_pauses(own_redis: RedisServer) -> None:
    """Longer than a lease: nobody takes anybody for dead."""
    work = Work(allowed=3)
    async with working(new(own_redis), work, lease=0.6, linger=0) as (here, there):
        quiet(here, there)
        async with here.reading() as one, there.reading("/resume") as two:
            await one.has(3)
            await two.has(3)
            with own_redis.client() as outside:
                outside.client_pause(2000)
            work.allow(6)
            await one.has(6)
            await anyio.sleep(1)
            work.last = 9
            work.allow(9)
            await until(lambda: one.visit.over and two.visit.over)
        assert one.data == two.data == numbers(1, 9)


async def test_redis_stays_away(own_redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """Readers and work have their patience, then they end."""
    work = Work(allowed=3)
    async with working(new(own_redis), work, brokers={"patience": 0.2}, patience=0.2) as (here, there):
        quiet(here, there)
        async with here.reading() as one:
            await one.has(3)
            own_redis.kill()
            work.allow(5)
            await until(lambda: one.visit.over and not here.streams._producers)
        assert one.data == [*numbers(1, 3), ended("unavailable")]
        assert (work.ended, work.cleaned) == (1, 1)
        for start in (here.streams.start("k", work.response()), there.streams.resume("k")):
            with pytest.raises(BrokerUnavailable):
                await start
        assert work.cleaned == 2
    assert "stream k failed" in caplog.text
    assert "stream k has ended, and cannot say so" in caplog.text


async def test_shutdown_while_redis_is_away(own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not kept waiting for the patience of a stream."""
    monkeypatch.setattr(module, "FINISHING", 0.1)
    work = Work(allowed=3)
    async with working(new(own_redis), work) as (here, _):
        quiet(here)
        async with here.reading() as one:
            await one.has(3)
        own_redis.kill()
    assert work.cleaned == 1


def silence(worker: Worker, *names: str) -> Any:
    """Redis does not answer this worker's streams. How to undo it."""
    patch = pytest.MonkeyPatch()

    async def fail(*args: Any) -> Any:
        raise BrokerUnavailable("silenced")

    for name in names:
        patch.setattr(worker.streams.broker.streams, name, fail)
    return patch.undo


async def test_a_silent_producer(own_redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """Its readers are told, another one can begin, and it cannot append any more."""
    work = Work(allowed=3)
    async with working(new(own_redis), work, lease=0.3) as (here, there):
        quiet(here, there)
        async with there.reading() as other:
            await other.has(3)
        heard = silence(there, "renew", "produce", "finish")
        async with here.reading() as reading:
            await reading.has(3)
            await until(lambda: reading.visit.over)
        assert reading.data == [*numbers(1, 3), ended("died")]
        here.make = Work(allowed=2).response
        async with here.reading() as next_one:
            await next_one.has(2)
            heard()
            work.allow(5)
            await until(lambda: work.ended)
            assert next_one.data == numbers(1, 2)


async def test_a_stream_that_was_lost_while_its_work_waits(own_redis: RedisServer) -> None:
    work = Work(allowed=3)
    async with working(new(own_redis), work, lease=0.3) as (here, _):
        quiet(here)
        async with here.reading() as reading:
            await reading.has(3)
            with own_redis.client() as outside:
                outside.flushall()
            await until(lambda: work.ended and reading.visit.over)
        assert reading.data == [*numbers(1, 3), ended("lost")]


async def test_silent_readers(own_redis: RedisServer) -> None:
    """Their lease runs out, then the work ends."""
    work = Work(allowed=3)
    async with working(new(own_redis), work, lease=0.3, linger=0) as (here, there):
        quiet(here, there)
        async with there.reading() as reading:
            await reading.has(3)
            silence(there, "attend", "depart")
            await until(lambda: work.ended)


async def test_the_answer_to_an_append_is_lost(own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(allowed=5, last=5)
    async with working(new(own_redis), work) as (here, _):
        quiet(here)
        streams = here.streams.broker.streams
        lost = {"produce": 0, "finish": 0}
        for name in lost:
            real = getattr(streams, name)

            async def half(*args: Any, name: str = name, real: Any = real) -> Any:
                answer = await real(*args)
                lost[name] += 1
                if lost[name] % 2:
                    raise BrokerUnavailable("the answer is lost")
                return answer

            monkeypatch.setattr(streams, name, half)
        assert (await here.read()).data == numbers(1, 5)
        await until(lambda: not here.streams._producers)
        assert lost == {"produce": 10, "finish": 2}


async def test_a_stop_while_an_append_is_under_way(own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows whether it is there. The last words come behind it in any case."""
    work = Work(allowed=2)
    async with working(new(own_redis), work) as (here, there):
        quiet(here)
        here.make = lambda: work.response(farewell="bye")
        async with here.reading() as reading:
            await reading.has(2)
            streams = here.streams.broker.streams
            real, appended = streams.produce, anyio.Event()

            async def slow(*args: Any) -> Any:
                await real(*args)
                appended.set()
                await anyio.sleep_forever()

            monkeypatch.setattr(streams, "produce", slow)
            work.allow(3)
            await appended.wait()
            await there.streams.broker.stop("k")
            await until(lambda: reading.visit.over)
        assert reading.data == ["1", "2", "3", "bye", ended("stop")]


async def test_readers_that_depart_while_they_are_said_to_read(
    own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work(allowed=1)
    async with working(new(own_redis), work, lease=0.3, linger=0) as (here, _):
        async with here.reading() as reading, here.reading("/resume") as other:
            await reading.has(1)
            await other.has(1)
            streams = here.streams.broker.streams
            real, asked, go = streams.attend, anyio.Event(), anyio.Event()

            async def slow(*args: Any) -> Any:
                asked.set()
                await go.wait()
                return await real(*args)

            monkeypatch.setattr(streams, "attend", slow)
            await asked.wait()
        go.set()
        await until(lambda: work.ended)


async def test_news_of_a_run_that_has_ended(own_redis: RedisServer) -> None:
    async with connect(own_redis.url) as broker:
        broker.streams._hear(b'{"run": "unknown", "at": 5}')  # type: ignore[attr-defined]


async def test_a_broker_that_is_closed_too_early(own_redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    work = Work(allowed=1)
    async with working(new(own_redis), work) as (here, _):
        response = await here.streams.start("k", work.response())
        assert isinstance(response, SSEResponse)
        await until(lambda: work.made)
        await here.streams.broker.aclose()
    assert work.cleaned == 1
    assert [record.levelname for record in caplog.records if "cannot say so" in record.message] == ["ERROR"]
