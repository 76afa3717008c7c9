"""Streams that outlive a connection. In process; a "worker" is a broker, and its streams, of its own where there is
Redis."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import anyio
import pytest
from fastapi import APIRouter, FastAPI
from starlette.responses import Response

from fastapi_cancel import (
    AlreadyRunning,
    Broker,
    CancellableRoute,
    CancelPolicy,
    LastEventID,
    Resumable,
    SSEResponse,
    StreamInfo,
    connect,
)
from fastapi_cancel.broker import streams as broker_streams
from fastapi_cancel.testing import EventReader, LeavingClient, Patience, Visit

from .brokers import NewBroker, a_kind, its_backend, its_store, new_brokers  # noqa: F401 (fixtures)
from .conftest import DEADLINE

pytestmark = pytest.mark.anyio


class Work:
    """The content of a stream: numbers, up to where it is allowed to go; then it waits.

    :ivar made: how many events it has yielded
    :ivar ended: how often its generator has ended
    :ivar cleaned: how often its hook has run: also for a response whose content was not to begin
    """

    def __init__(self, allowed: int = 0, last: int = 10_000) -> None:
        self.allowed, self.last = allowed, last
        self.made = self.ended = self.cleaned = 0
        self._more = anyio.Event()

    def allow(self, number: int) -> None:
        self.allowed = number
        self._more.set()
        self._more = anyio.Event()

    async def events(self) -> AsyncIterator[Any]:
        try:
            while self.made < self.last:
                while self.made >= self.allowed:
                    await self._more.wait()
                self.made += 1
                yield f"{self.made}"
        finally:
            self.ended += 1

    async def clean(self) -> None:
        await anyio.sleep(0)
        self.cleaned += 1

    def response(self, **options: Any) -> SSEResponse:
        return SSEResponse(self.events(), heartbeat=None, cleanup=self.clean, **options)


class Worker:
    """An application with ``GET /start`` and ``GET /resume``, and its streams.

    :ivar make: makes the next work
    """

    def __init__(self, streams: Resumable, make: Callable[[], SSEResponse]) -> None:
        self.streams = streams
        self.make = make
        router = APIRouter(route_class=CancellableRoute)
        router.add_api_route("/start", self._start, methods=["GET", "HEAD"])
        router.add_api_route("/resume", self._resume)
        self.app = FastAPI()
        self.app.include_router(router)
        self.client = LeavingClient(self.app, patience=Patience(untold=5), log_level=logging.ERROR)

    async def _start(self, last: LastEventID) -> Response:
        return await self.streams.start("k", self.make(), after=last)

    async def _resume(self, last: LastEventID) -> Response:
        return await self.streams.resume("k", after=last, heartbeat=None)

    @asynccontextmanager
    async def reading(self, path: str = "/start", after: str | None = None) -> AsyncIterator[Reading]:
        async with self.client.visit("GET", path, headers={"Last-Event-ID": after} if after else {}) as visit:
            await until(lambda: visit.status is not None or visit.over)
            yield Reading(visit)
            visit.leave()
        visit.assert_clean()

    async def read(self, path: str = "/start", after: str | None = None) -> Reading:
        """To its end."""
        async with self.reading(path, after) as reading:
            await until(lambda: reading.visit.over)
        return reading


@dataclass
class Reading:
    visit: Visit

    @property
    def data(self) -> list[str]:
        return [event.data if event.event == "message" else f"{event.event} {event.data}" for event in self._events()]

    @property
    def last_id(self) -> str:
        return EventReader().feed(self.visit.body).last_id

    def _events(self) -> Any:
        return EventReader().feed(self.visit.body).events

    async def has(self, number: int) -> None:
        await until(lambda: len(self.data) >= number)


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(DEADLINE):
        while not condition():
            await anyio.sleep(0.001)


def numbers(first: int, last: int) -> list[str]:
    return [str(number) for number in range(first, last + 1)]


def ended(reason: str) -> str:
    return f'ended {{"reason":"{reason}"}}'


@asynccontextmanager
async def working(
    new: NewBroker, work: Work | None = None, count: int = 2, brokers: dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[list[Worker]]:
    """Workers that make the same work."""
    work = work or Work()
    async with AsyncExitStack() as stack:
        workers = []
        for _ in range(count):
            broker = await stack.enter_async_context(new(**brokers or {}))
            streams = await stack.enter_async_context(Resumable(broker, **{"lease": 1.5, **options}))
            workers.append(Worker(streams, work.response))
        yield workers


# -- reading -------------------------------------------------------------------------------------


async def test_a_stream_from_its_beginning_to_its_end(new: NewBroker) -> None:
    work = Work(allowed=5, last=5)
    async with working(new, work) as (here, there):
        reading = await here.read()
        assert reading.data == numbers(1, 5)
        assert (work.ended, work.cleaned) == (1, 1)
        assert (await there.read("/resume")).data == numbers(1, 5)
        assert (await there.read("/start", after=reading.last_id)).visit.status == 204
        assert (await there.read("/resume", after=reading.last_id)).visit.status == 204
    assert (work.ended, work.cleaned) == (1, 2)


async def test_leaving_and_coming_back_on_another_worker(new: NewBroker) -> None:
    work = Work(allowed=3)
    async with working(new, work) as (here, there):
        async with here.reading() as first:
            await first.has(3)
        work.allow(6)
        async with there.reading(after=first.last_id) as second:
            await second.has(3)
            async with here.reading("/resume", after=first.last_id) as third:
                await third.has(3)
                work.last = 8
                work.allow(8)
                await until(lambda: second.visit.over and third.visit.over)
        assert second.data == third.data == numbers(4, 8)
    assert (work.ended, work.cleaned) == (1, 2)


async def test_several_readers(new: NewBroker) -> None:
    work = Work(allowed=2)
    async with working(new, work) as (here, there):
        async with here.reading() as one, there.reading() as two, there.reading("/resume") as three:
            await one.has(2)
            await three.has(2)
            one.visit.leave()
            work.last = 4
            work.allow(4)
            await until(lambda: two.visit.over and three.visit.over)
        assert one.data == numbers(1, 2)
        assert two.data == three.data == numbers(1, 4)
    assert (work.ended, work.cleaned) == (1, 2)


async def test_nothing_to_resume(new: NewBroker) -> None:
    work = Work()
    async with working(new, work) as (here, _):
        for after in ("5-5", "nonsense"):
            assert (await here.read("/start", after)).visit.status == 204
        assert (await here.read("/resume")).visit.status == 204
    assert (work.made, work.ended, work.cleaned) == (0, 0, 2)


async def test_the_id_of_another_run(new: NewBroker) -> None:
    """From the beginning, behind a gap."""
    async with working(new, Work(allowed=2, last=2)) as (here, there):
        before = await here.read()
        here.make = Work(allowed=2, last=2).response
        await here.read()
        for after in (before.last_id, "nonsense"):
            reading = await there.read(after=after)
            assert reading.data == ['gap {"missed":null}', *numbers(1, 2)]


async def test_events_that_have_been_trimmed_away(new: NewBroker) -> None:
    work = Work(allowed=150)
    async with working(new, work, ahead=100) as (here, there):
        async with here.reading() as first:
            await first.has(150)
        async with there.reading("/resume") as second:
            await second.has(101)
        assert second.data == ['gap {"missed":50}', *numbers(51, 150)]


async def test_a_head_begins_nothing_that_stays(new: NewBroker) -> None:
    work = Work()
    async with working(new, work, linger=0) as (here, _):
        async with here.reading() as reading:
            visit = await here.client.request("HEAD", "/start")
            assert (visit.status, visit.body) == (200, b"")
            work.allow(1)
            await reading.has(1)
        await until(lambda: work.ended)
        work.made = 0
        assert (await here.client.request("HEAD", "/start")).status == 200
        await until(lambda: work.cleaned == 3)


# -- the end of the work -------------------------------------------------------------------------


@pytest.mark.parametrize("linger", [0, 0.05])
async def test_work_that_nobody_reads_is_cancelled(new: NewBroker, linger: float) -> None:
    """Not before its first reader has come; nor while there is another one."""
    work = Work(allowed=1)
    async with working(new, work, linger=linger) as (here, there):
        async with here.reading() as one:
            await one.has(1)
            async with there.reading() as two:
                await two.has(1)
            work.allow(2)
            await one.has(2)
            assert not work.ended
        await until(lambda: work.cleaned == 2)
        await until(lambda: not here.streams._producers)
        assert (await there.read("/resume")).data == [*numbers(1, 2), ended("disconnect")]


async def test_who_starts_a_stream_is_its_first_reader(new: NewBroker) -> None:
    """However long the response takes to begin; and until it has ended, begun or not."""
    work = Work(allowed=1)
    async with working(new, work, linger=0, lease=0.3) as (here, _):
        response = await here.streams.start("k", work.response())
        assert isinstance(response, SSEResponse)
        await until(lambda: work.made)
        await anyio.sleep(0.15)
        assert not work.ended
        await response.aclose()
        await until(lambda: work.ended)


async def test_linger_is_long_enough_to_come_back(new: NewBroker) -> None:
    work = Work(allowed=1)
    async with working(new, work, linger=0.3, lease=0.3) as (here, there):
        async with here.reading() as reading:
            await reading.has(1)
        async with there.reading(after=reading.last_id) as back:
            await anyio.sleep(0.5)
            work.allow(2)
            await back.has(1)
        assert back.data == ["2"]


async def test_a_policy_that_does_not_mind_who_reads(new: NewBroker) -> None:
    work = Work(allowed=1)
    async with working(new, work, linger=0, policy=CancelPolicy(causes={"stop"}), lease=0.1) as (here, there):
        async with here.reading() as reading:
            await reading.has(1)
        await anyio.sleep(0.1)
        work.last = 3
        work.allow(3)
        await until(lambda: work.cleaned)
        await until(lambda: not here.streams._producers)
        assert (await there.read(after=reading.last_id)).data == numbers(2, 3)


async def test_stopping_a_stream(new: NewBroker) -> None:
    work, infos = Work(allowed=2), list[StreamInfo]()

    def farewell(info: StreamInfo) -> str:
        infos.append(info)
        return f"stopped: {info.reason}"

    async with working(new, work) as (here, there):
        here.make = lambda: work.response(farewell=farewell, retry=50)
        async with here.reading() as one, there.reading("/resume") as two:
            await one.has(2)
            await two.has(2)
            assert await there.streams.broker.stop("k", reason="enough") == 1
            await until(lambda: one.visit.over and two.visit.over)
        assert one.data == two.data == ["1", "2", "stopped: enough", ended("stop")]
        assert (infos[0].cause, infos[0].reason, infos[0].events) == ("stop", "enough", 2)
        assert (work.ended, work.cleaned) == (1, 1)
        assert (await there.read(after=two.last_id)).visit.status == 204


async def test_an_early_stop(new: NewBroker) -> None:
    """The content never begins; its hook runs."""
    work = Work(allowed=5)
    async with working(new, work) as (here, there):
        assert await there.streams.broker.stop("k") == 0
        assert (await here.read()).data == [ended("stop")]
        assert (work.made, work.cleaned) == (0, 1)
        async with here.reading() as reading:
            await reading.has(5)


async def test_a_farewell_that_fails(new: NewBroker, caplog: pytest.LogCaptureFixture) -> None:
    work = Work(allowed=1)
    async with working(new, work) as (here, there):
        here.make = lambda: work.response(farewell=lambda info: 1 / 0)
        here.client.log_level = logging.CRITICAL
        async with here.reading() as reading:
            await reading.has(1)
            await there.streams.broker.stop("k")
            await until(lambda: reading.visit.over)
        assert reading.data == ["1", ended("stop")]
    assert "stream k: the farewell failed" in caplog.text


async def test_a_content_that_fails(new: NewBroker, caplog: pytest.LogCaptureFixture) -> None:
    cleaned: list[bool] = []

    async def fails() -> AsyncIterator[str]:
        yield "1"
        raise ValueError("no more")

    async def clean() -> None:
        cleaned.append(True)

    async with working(new) as (here, there):
        here.client.log_level = logging.CRITICAL
        here.make = lambda: SSEResponse(fails(), cleanup=clean)
        reading = await here.read()
        assert reading.data == ["1", ended("failed")]
        assert (await there.read(after=reading.last_id)).visit.status == 204
    assert cleaned == [True]
    assert "stream k failed" in caplog.text and "no more" in caplog.text


async def test_an_event_that_cannot_be_sent(new: NewBroker) -> None:
    async with working(new) as (here, _):
        here.client.log_level = logging.CRITICAL
        here.make = lambda: SSEResponse(iter([{"data": "1"}, {"unknown": 1}, "2"]))
        assert (await here.read()).data == ["1", ended("failed")]


async def test_shutdown(new: NewBroker) -> None:
    """The readers on other workers are told; cleanups are waited for."""
    work, begun, end = Work(allowed=1), anyio.Event(), anyio.Event()

    async def one_that_ends(broker: Broker) -> None:
        async with broker, Resumable(broker) as streams:
            here = Worker(streams, lambda: work.response(farewell="bye"))
            async with here.reading() as reading:
                await reading.has(1)
            begun.set()
            await end.wait()

    async with new() as broker, Resumable(broker) as streams, anyio.create_task_group() as group:
        other = new()
        if other is broker:  # in memory: it is closed twice, but not yet
            other = connect(retain=100)
            other.streams, other.runs, other._subscribe = broker.streams, broker.runs, broker._subscribe  # type: ignore[method-assign]
        group.start_soon(one_that_ends, other)
        await begun.wait()
        async with Worker(streams, work.response).reading("/resume") as reading:
            await reading.has(1)
            end.set()
            await until(lambda: reading.visit.over)
        assert reading.data == ["1", "bye", ended("shutdown")]
        assert (work.ended, work.cleaned) == (1, 1)


async def test_shutdown_just_after_the_start(new: NewBroker) -> None:
    work = Work(allowed=5)
    async with new() as broker:
        async with Resumable(broker) as streams:
            response = await streams.start("k", work.response())
            assert isinstance(response, SSEResponse)
        assert (work.made, work.cleaned) == (0, 1)
        await response.aclose()
        with pytest.raises(RuntimeError, match="not open"):
            await streams.start("k", work.response())


async def test_a_grace(new: NewBroker) -> None:
    """What is made in it is still read."""
    work = Work(allowed=1)
    async with working(new, work, policy=CancelPolicy(grace=DEADLINE)) as (here, there):
        async with here.reading() as reading:
            await reading.has(1)
            await there.streams.broker.stop("k")
            work.last = 3
            work.allow(3)
            await until(lambda: reading.visit.over)
        assert reading.data == [*numbers(1, 3), ended("stop")]


async def test_a_content_that_swallows_its_cancellation(new: NewBroker) -> None:
    async def stubborn() -> AsyncIterator[str]:
        yield "1"
        with suppress(anyio.get_cancelled_exc_class()):
            await anyio.sleep_forever()
        yield "2"
        yield "3"

    async with working(new) as (here, there):
        here.make = lambda: SSEResponse(stubborn())
        async with here.reading() as reading:
            await reading.has(1)
            await there.streams.broker.stop("k")
            await until(lambda: reading.visit.over)
        assert reading.data == ["1", ended("stop")]


# -- one live run a key --------------------------------------------------------------------------


async def test_refuse(new: NewBroker) -> None:
    work = Work(allowed=1)
    async with working(new, work, live="refuse") as (here, there):
        async with here.reading() as reading:
            await reading.has(1)
            refused = await there.client.get("/start")
            assert (refused.status, refused.body) == (409, b'{"detail":"a stream is live under the key \'k\'"}')
            with pytest.raises(AlreadyRunning):
                await there.streams.start("k", work.response())
            assert work.cleaned == 2
            async with there.reading("/resume") as other:
                await other.has(1)


async def test_replace(new: NewBroker) -> None:
    first, second = Work(allowed=1), Work(allowed=2)
    async with working(new, first, live="replace", lease=0.3) as (here, there):
        there.make = second.response
        async with here.reading() as one:
            await one.has(1)
            async with there.reading() as two:
                await two.has(2)
                await until(lambda: first.cleaned and one.visit.over)
                second.allow(3)
                await two.has(3)
        assert one.data == ["1", ended("replaced")]
        assert two.data == numbers(1, 3)
        assert first.ended == 1


async def test_a_run_that_has_lost_its_stream_cannot_append(new: NewBroker) -> None:
    """Each event, once however often it is tried; none of a run that was replaced, or has ended."""
    async with new() as broker:
        streams = broker.streams
        found, before = await streams.claim("k", "one", 5, False)
        assert (found.run, before) == ("one", None)
        assert (await streams.claim("k", "two", 5, False))[0].run == "one"
        for _ in range(2):
            assert await streams.produce("k", "one", 1, b"data: 1\r\n\r\n")
        assert await streams.finish("k", "one", "done", 5, b"data: bye\r\n\r\n")
        assert await streams.finish("k", "one", "done", 5, b"data: bye\r\n\r\n")
        assert await streams.find("k") == ("one", found.epoch, "done", 3)
        later, before = await streams.claim("k", "two", 5, True)
        assert later.epoch > found.epoch and before is None
        assert (await streams.claim("k", "three", 5, True))[1] == "two"
        assert not await streams.produce("k", "two", 1, b"data: 1\r\n\r\n")
        assert not await streams.finish("k", "two", "done", 5)
        assert await streams.renew("k", "two", 5) is None
        assert await streams.attend("k", "two", "reader", 0, 5) == "replaced"
        assert await streams.attend("other", "two", "reader", 0, 5) == "lost"
        await streams.depart("k", "two", "reader")
        async with broker.subscribe(streams.channel("k"), f"{later.epoch}-0") as events:
            assert await streams.produce("k", "three", 1, b"data: 1\r\n\r\n")
            gap = await anext(events)
            assert (await anext(events)).data == "1"
            assert gap.event == "gap"


async def test_what_is_over_is_forgotten(new: NewBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_streams, "SWEEP", 2)
    async with new() as broker:
        streams = broker.streams
        for key in ("a", "b"):
            await streams.claim(key, key, 5, False)
            await streams.finish(key, key, "done", 0.001)
        await anyio.sleep(0.01)
        assert await streams.find("b") is None
        await streams.claim("c", "c", 5, False)
        await streams.claim("d", "d", 5, False)
        assert await streams.find("a") is None


# -- the events ----------------------------------------------------------------------------------


async def test_events_of_all_kinds(new: NewBroker) -> None:
    """They get their ids from the stream; bytes may come in pieces."""
    items: list[Any] = [
        {"data": "own id", "id": "5"},
        b"id: 1\rdata: raw\rid\r\r",
        b"id: 1\ndata: LF\n\n",
        None,
        b"data: in ",
        b"pieces\r\n\r\n",
        b"",
        b"data: never finished",
    ]
    async with working(new) as (here, there):
        here.make = lambda: SSEResponse(iter(items))
        reading = await here.read()
        assert reading.data == ["own id", "raw", "LF", "in pieces"]
        assert reading.visit.body.count(b"id") == 4 + 1  # "own id"
        epoch, _, number = reading.last_id.partition("-")
        assert int(number) == 4
        assert (await there.read("/resume", after=f"{epoch}-2")).data == ["LF", "in pieces"]


async def test_a_producer_waits_for_its_quickest_reader(new: NewBroker) -> None:
    made: list[int] = []

    async def fast() -> AsyncIterator[str]:
        for number in range(200):
            made.append(number)
            yield "x" * 1000

    async with working(new, ahead=20) as (here, there):
        here.make = lambda: SSEResponse(fast())
        response = await here.streams.start("k", here.make())
        assert isinstance(response, SSEResponse)
        await until(lambda: len(made) == 21)
        await anyio.sleep(0.05)
        assert len(made) == 21
        assert len((await there.read("/resume")).data) == 200
        await response.aclose()


async def test_work_that_never_waits_lets_others_work(new: NewBroker) -> None:
    """C17, in memory: nothing else makes it wait."""

    async def busy() -> AsyncIterator[str]:
        while True:
            yield "x"

    async with working(new, ahead=100, linger=0) as (here, _):
        here.make = lambda: SSEResponse(busy())
        async with here.reading() as reading:
            await reading.has(500)
        await until(lambda: not here.streams._producers)


async def test_the_context_is_that_of_the_streams(new: NewBroker) -> None:
    variable: ContextVar[str] = ContextVar("variable", default="none")
    seen: list[str] = []

    async def content() -> AsyncIterator[str]:
        seen.append(variable.get())
        yield "1"

    async with working(new) as (here, _):

        def make() -> SSEResponse:
            variable.set("of the request")
            return SSEResponse(content())

        here.make = make
        await here.read()
    assert seen == ["none"]


# -- arguments -----------------------------------------------------------------------------------


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"broker": "redis://"}, TypeError, "broker must be a Broker, not 'redis://'"),
    ({"linger": -1}, ValueError, "linger must be a finite number of seconds, 0 or more"),
    ({"keep": 0}, ValueError, "keep must be a finite number of seconds, more than 0"),
    ({"keep": 3601}, ValueError, "keep must be 3600 seconds at the most, which the broker keeps events"),
    ({"lease": 3601}, ValueError, "lease must be 3600 seconds at the most"),
    ({"patience": None}, TypeError, "patience must be a finite number of seconds"),
    ({"ahead": 0}, ValueError, "ahead must be a whole number, 1 or more"),
    ({"ahead": 1001}, ValueError, "ahead must be 1000 at the most, which the broker retains, not 1001"),
    ({"live": "maybe"}, ValueError, "live must be one of join, replace, refuse, not 'maybe'"),
    ({"policy": 5}, TypeError, "policy must be a CancelPolicy, not 5"),
]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize(("arguments", "kind_of_error", "message"), BAD)
def test_what_cannot_be_used_is_named(
    arguments: dict[str, Any], kind_of_error: type[Exception], message: str, anyio_backend: str
) -> None:
    with pytest.raises(kind_of_error) as caught:
        Resumable(**{"broker": connect(), **arguments})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_cannot_be_started(anyio_backend: str) -> None:
    async with Resumable(connect()) as streams:
        with pytest.raises(ValueError, match="key must be a str that is not empty"):
            await streams.start("", SSEResponse([]))
        with pytest.raises(TypeError, match="response must be an SSEResponse, not 'x'"):
            await streams.start("k", "x")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="key must be a str"):
            await streams.resume(5)  # type: ignore[arg-type]
