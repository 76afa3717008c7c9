"""What is published is sent past the tasks of the streams that wait for it. In process, on asyncio."""

from __future__ import annotations

import asyncio
import gc
import random
import re
import sys
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import anyio
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_cancel import Broker, CancelPolicy, SSEResponse, StreamInfo, connect
from fastapi_cancel._feed import MAX_BYTES
from fastapi_cancel.broker import Event, Subscription
from fastapi_cancel.protect import KEY
from fastapi_cancel.testing import Visit, after_event, when
from fastapi_cancel.testing.live import LiveServer
from fastapi_cancel.testing.servers import SERVERS

from .brokers import NewBroker, its_backend, its_store, new_brokers  # noqa: F401 (fixtures)
from .redis_server import STORES
from .test_sse import opened

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module", params=["memory", *STORES], name="kind")
def a_kind_on_asyncio(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
async def broker(new: NewBroker) -> AsyncIterator[Broker]:
    async with new(retain=100_000) as broker:
        yield broker


@pytest.fixture(name="pulled")
def what_is_pulled(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """The events that came by way of the streams' tasks."""
    events: list[Event] = []
    pull = Subscription.__anext__

    async def note(self: Subscription) -> Event:
        events.append(event := await pull(self))
        return event

    monkeypatch.setattr(Subscription, "__anext__", note)
    return events


def numbers(body: bytes) -> list[int]:
    return [int(number) for number in re.findall(rb"data: (\d+)\b", body)]


class Reader:
    """A client that may stop reading: then its ``send`` waits, as a server's does.

    :ivar got: the numbers that it was sent
    """

    def __init__(self) -> None:
        self.got: list[int] = []
        self.there = anyio.Event()
        self._reads = anyio.Event()
        self._reads.set()
        self._left = anyio.Event()

    def stall(self) -> None:
        if self._reads.is_set():
            self._reads = anyio.Event()

    def resume(self) -> None:
        self._reads.set()

    def leave(self) -> None:
        self._left.set()
        self.resume()

    async def receive(self) -> Message:
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if not self._reads.is_set():
            await self._reads.wait()
        if self._left.is_set():
            return
        self.got += numbers(message.get("body", b""))
        if b"id: " in message.get("body", b""):
            self.there.set()

    async def visit(self, app: ASGIApp) -> None:
        scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""}
        await app(scope, self.receive, self.send)


@asynccontextmanager
async def crowd(app: ASGIApp, size: int) -> AsyncIterator[list[Reader]]:
    """Clients whose streams wait for what is published. In the end they leave, and nothing is left of them."""
    readers = [Reader() for _ in range(size)]
    before = asyncio.all_tasks()
    tasks = [asyncio.create_task(reader.visit(app)) for reader in readers]
    try:
        with anyio.fail_after(60):
            for reader in readers:
                await reader.there.wait()
            await settled()
            yield readers
    finally:
        for reader in readers:
            reader.leave()
        await asyncio.gather(*tasks)
        await settled()
    left = {repr(task.get_coro()) for task in asyncio.all_tasks() - before}
    assert [each for each in left if "Link._read" not in each] == []


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(20):
        while not condition():
            await asyncio.sleep(0.001)


def sse(broker: Broker, **options: Any) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await SSEResponse(broker.events("news"), **options)(scope, receive, send)

    return app


async def publish(broker: Broker, *items: object) -> None:
    for item in items:
        await broker.publish("news", str(item))


async def test_streams_that_wait_are_not_woken(broker: Broker, pulled: list[Event]) -> None:
    async with crowd(sse(broker), 250) as readers:
        pulled.clear()
        for number in range(10):
            await publish(broker, number)
            await until(lambda: all(reader.got[-1:] == [number] for reader in readers))  # noqa: B023
        assert pulled == []
    assert {tuple(reader.got) for reader in readers} == {tuple(range(10))}


async def test_the_event_loop_turns_meanwhile(broker: Broker) -> None:
    at: set[int] = set()

    async def note(send: Send, message: Message) -> None:
        at.add(turns[0])
        await send(message)

    async with turning() as turns, crowd(through(note, sse(broker)), 350) as readers:
        at.clear()
        await publish(broker, 0)
        await until(lambda: all(reader.got == [0] for reader in readers))
    assert len(at) >= 4


async def test_a_push_that_waits_does_not_keep_its_publisher(broker: Broker) -> None:
    class Kept:
        pass

    kept: ContextVar[Kept] = ContextVar("kept")

    async def handler() -> weakref.ref[Kept]:
        kept.set(Kept())
        await publish(broker, 0)
        return weakref.ref(kept.get())

    async with crowd(sse(broker), 1) as (reader,):
        reader.stall()
        published = await asyncio.create_task(handler())
        await until(lambda: bool(workers()))
        await until(lambda: gc.collect() >= 0 and published() is None)
        reader.resume()
        await until(lambda: reader.got == [0])


async def test_who_does_not_read_holds_up_nobody(broker: Broker) -> None:
    """And has everything, in order, once it reads on."""
    async with crowd(sse(broker), 9) as readers:
        slow = readers[1::3]
        for reader in slow:
            reader.stall()
        for number in range(10):
            await publish(broker, number)
            await until(lambda: all(reader.got[-1:] == [number] for reader in readers if reader not in slow))  # noqa: B023
        assert {tuple(reader.got) for reader in slow} == {()}
        for reader in slow:
            reader.resume()
        await until(lambda: all(reader.got[-1:] == [9] for reader in readers))
    assert {tuple(reader.got) for reader in readers} == {tuple(range(10))}


@pytest.mark.parametrize("seed", range(5))
async def test_each_event_once_and_in_order_whatever_happens(broker: Broker, seed: int) -> None:
    """Clients stall, read on and leave while events come one by one, in bursts, and while others are being sent."""
    chance = random.Random(seed)
    count = 0
    async with crowd(sse(broker, heartbeat=0.05), 40) as readers:
        staying = readers[::2]
        for _ in range(200):
            for _ in range(chance.choice([0, 1, 1, 3, 20])):
                await publish(broker, count)
                count += 1
            for reader in chance.sample(readers, 3):
                chance.choice([reader.stall, reader.resume])()
            if chance.random() < 0.1:
                chance.choice(readers[1::2]).leave()
            await asyncio.sleep(chance.choice([0, 0, 0.001]))
        for reader in readers:
            reader.resume()
        await until(lambda: all(reader.got[-1:] == [count - 1] for reader in staying))
    assert {tuple(reader.got) for reader in staying} == {tuple(range(count))}
    for reader in readers[1::2]:
        assert reader.got == list(range(len(reader.got)))


async def test_what_goes_out_together_is_bounded(broker: Broker) -> None:
    bodies: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def note(message: Message) -> None:
            bodies.append(message.get("body", b""))
            await send(message)

        await SSEResponse(broker.events("news"))(scope, receive, note)

    async with crowd(app, 1) as (reader,):
        await asyncio.gather(*[broker.publish("news", f"{number} " + "x" * 1000) for number in range(200)])
        await until(lambda: len(reader.got) == 200)
    assert max(map(len, bodies)) < MAX_BYTES + 2000
    assert len(bodies) < 150


async def test_batch_false_is_each_on_its_own(broker: Broker, pulled: list[Event]) -> None:
    async with crowd(sse(broker, batch=False), 1) as (reader,):
        pulled.clear()
        await publish(broker, 1, 2, 3)
        await until(lambda: reader.got == [1, 2, 3])
        assert len(pulled) == 3


async def test_a_stream_is_as_if_its_task_had_sent_it(broker: Broker) -> None:
    """What it says of itself counts all; a heartbeat comes once it is idle; the farewell goes last."""
    infos: list[StreamInfo] = []

    async def note(info: StreamInfo) -> None:
        infos.append(info)

    response = SSEResponse(broker.events("news"), heartbeat=0.1, farewell="bye", on_disconnect=note)
    async with waiting(response) as visit:
        last = ""
        for number in range(3):
            last = await broker.publish("news", str(number))
            await visit.until(after_event(str(number)))
        await visit.until(when(lambda: b": ping" in visit.chunks[-1]))
        stop(response)
    assert [event.data for event in visit.events] == ["0", "1", "2", "bye"]
    assert [(info.events, info.last_id, info.cause) for info in infos] == [(4, last, "stop")]
    assert infos[0].bytes == len(visit.body)


async def test_a_push_that_waits_ends_with_its_stream(broker: Broker) -> None:
    """A client does not read, and leaves: nothing is left, and nobody else was held up."""
    async with crowd(sse(broker), 1) as (other,), waiting(sse(broker)) as visit:
        await stalled(visit, broker)
        await publish(broker, 1)
        await until(lambda: other.got == [0, 1])
        visit.leave()
    assert (visit.body.count(b"data"), visit.cause) == (0, "disconnect")


async def test_a_push_that_waits_for_too_long(broker: Broker) -> None:
    async with crowd(sse(broker), 1) as (other,), waiting(sse(broker, send_timeout=0.05)) as visit:
        await stalled(visit, broker)
        await until(lambda: visit.over)
        await publish(broker, 1)
        await until(lambda: other.got == [0, 1])
    assert visit.cause == "stalled"


@pytest.mark.parametrize("grace", [0, 10])
async def test_a_stream_that_is_stopped_while_a_push_waits(broker: Broker, grace: float) -> None:
    response = SSEResponse(broker.events("news"), farewell="bye", policy=CancelPolicy(grace=grace))
    async with waiting(response) as visit:
        await stalled(visit, broker)
        stop(response)
        await publish(broker, 1)
        visit.resume()
        if grace:
            await visit.until(after_event("1"))
            assert response._ladder is not None
            response._ladder.signal("stop", at_once=True)
    assert [event.data for event in visit.events] == ["0", *["1"] * bool(grace), "bye"]


@pytest.mark.parametrize("farewell", [None, "bye"])
async def test_nothing_is_pushed_after_the_signal(farewell: str | None) -> None:
    """C16: not even in the turn of the event loop in which the stream is stopped."""
    async with connect() as broker:
        response = SSEResponse(broker.events("news"), farewell=farewell)
        async with waiting(response) as visit:
            await publish(broker, 0)
            stop(response)
    assert [event.data for event in visit.events] == ([farewell] if farewell else [])


def through(sender: Callable[[Send, Message], Awaitable[None]], app: ASGIApp) -> ASGIApp:
    """The application behind a middleware's ``send``."""

    async def around(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, receive, partial(sender, send))

    return around


async def fail(send: Send, message: Message) -> None:
    if b"data" in message.get("body", b""):
        raise ZeroDivisionError
    await send(message)


async def leave(send: Send, message: Message) -> None:
    if b"data" in message.get("body", b""):
        raise OSError
    await send(message)


async def hurry(send: Send, message: Message) -> None:
    async with asyncio.timeout(0.05):
        await send(message)


async def hurry_with_anyio(send: Send, message: Message) -> None:
    with anyio.fail_after(0.05):
        await send(message)


async def cancel(send: Send, message: Message) -> None:
    if b"data" in message.get("body", b""):
        raise asyncio.CancelledError
    await send(message)


@pytest.mark.parametrize(
    ("sender", "fault"),
    [
        (fail, "error: ZeroDivisionError"),
        (cancel, "error: RuntimeError.*was cancelled"),
        (leave, "error: the application returned without a complete"),
        (hurry, ""),  # a TimeoutError is an OSError, too
        (hurry_with_anyio, ""),
    ],
)
async def test_one_whose_send_fails_is_alone(
    broker: Broker, sender: Callable[[Send, Message], Awaitable[None]], fault: str
) -> None:
    """The first, the last and one in between: with its own error, or cancelled by its own time limit."""
    async with crowd(sse(broker), 1) as first:
        async with opened(through(sender, sse(broker)), *[fault] * bool(fault)) as visit:
            await visit.until(when(lambda: len(visit.chunks) == 1))
            async with crowd(sse(broker), 150) as others:
                visit.stall()
                await publish(broker, 0)
                await until(lambda: visit.over)
                await publish(broker, 1)
                await until(lambda: all(reader.got == [0, 1] for reader in [*first, *others]))


async def test_sends_that_wait_do_not_take_a_turn_each(broker: Broker) -> None:
    async def wait(send: Send, message: Message) -> None:
        await asyncio.sleep(0)
        await send(message)

    async with turning() as turns, crowd(through(wait, sse(broker)), 300) as readers:
        await publish(broker, 0)
        while any(not reader.got for reader in readers[:1]):
            await asyncio.sleep(0)
        before = turns[0]
        while any(not reader.got for reader in readers):
            await asyncio.sleep(0)
        assert turns[0] - before < 30


async def test_a_push_that_is_cancelled_ends_its_stream(broker: Broker) -> None:
    """Nobody knows what of it is out: the client is to come back with the last id that it has seen."""
    async with crowd(sse(broker), 1) as (other,), waiting(sse(broker), "error: RuntimeError.*was cancelled") as visit:
        await stalled(visit, broker)
        await until(lambda: other.got == [0])
        for task in workers():
            task.cancel()
        await until(lambda: visit.over)
        await publish(broker, 1)
        await until(lambda: other.got == [0, 1])
    assert visit.events == []


@pytest.mark.parametrize("stream_first", [True, False])
async def test_all_tasks_are_cancelled(broker: Broker, stream_first: bool, caplog: pytest.LogCaptureFixture) -> None:
    """As at the end of ``asyncio.run``, while a push waits: nothing is said of that."""
    reader = Reader()
    stream = asyncio.create_task(reader.visit(sse(broker)))
    await reader.there.wait()
    await settled()
    reader.stall()
    await publish(broker, 0)
    await until(lambda: bool(workers()))
    await settled()
    (push,) = workers()
    tasks = [stream, push] if stream_first else [push, stream]
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert (stream.cancelled(), push.cancelled(), caplog.records) == (True, True, [])


async def test_a_send_that_is_cancelled_once_it_is_through(broker: Broker) -> None:
    """Nothing is sent twice."""

    async def pass_on(send: Send, message: Message) -> None:
        await send(message)
        if b"data" in message.get("body", b""):
            raise asyncio.CancelledError

    async with waiting(through(pass_on, sse(broker)), "error: RuntimeError.*was cancelled") as visit:
        await publish(broker, 0)
        await until(lambda: visit.over)
    assert [event.data for event in visit.events] == ["0"]


@pytest.mark.parametrize("error", [ZeroDivisionError, TypeError])
async def test_a_send_that_is_no_coroutine_function(broker: Broker, error: type[Exception]) -> None:
    """In an endpoint that opted out, where nothing of ours is in between."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        def plain(message: Message) -> Any:
            if b"data" not in message.get("body", b""):
                return send(message)
            if error is TypeError:
                return None
            raise error

        scope[KEY] = None
        await SSEResponse(broker.events("news"))(scope, receive, plain)

    async with crowd(sse(broker), 1) as (other,), waiting(app, f"error: {error.__name__}") as visit:
        await publish(broker, 0)
        await until(lambda: visit.over)
        await publish(broker, 1)
        await until(lambda: other.got == [0, 1])


lost: list[asyncio.Task[None]] = []  # kept: Python has much to say when such a task goes


def test_an_event_loop_after_another() -> None:
    """The first one is closed without a word to whoever waits there."""
    broker = connect()
    first = asyncio.new_event_loop()

    async def listen() -> None:
        reader = Reader()
        lost.append(asyncio.create_task(reader.visit(sse(broker))))
        await reader.there.wait()
        await settled()
        await publish(broker, "lost")

    async def listen_again() -> None:
        await publish(broker, 0)
        async with crowd(sse(broker), 3) as readers:
            await publish(broker, 1)
            await until(lambda: all(reader.got == [1] for reader in readers))

    first.run_until_complete(listen())
    first.close()
    asyncio.run(listen_again())
    assert not lost[0].done()


user: ContextVar[str] = ContextVar("user")


async def test_it_runs_in_the_context_of_the_request(broker: Broker) -> None:
    seen: list[tuple[str, asyncio.Task[None] | None]] = []

    async def note(send: Send, message: Message) -> None:
        seen.append((user.get(), asyncio.current_task()))
        await asyncio.sleep(0)
        seen.append((user.get(), asyncio.current_task()))
        await send(message)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        user.set(name)
        await through(note, sse(broker))(scope, receive, send)

    name = "Ann"
    async with waiting(app) as ann:
        name = "Bob"
        async with waiting(app) as bob:
            seen.clear()
            user.set("Eve")
            await publish(broker, 0)
            for visit in (ann, bob):
                await visit.until(after_event("0"))
                visit.leave()
    names = [name for name, _ in seen]
    assert (names.count("Ann"), names.count("Bob"), len(names)) == (2, 2, 4)
    assert len(set(seen)) == 2  # each had to wait, and stayed in its task


@pytest.mark.parametrize("turns", range(4))
async def test_a_pusher_that_somebody_cancels(broker: Broker, turns: int) -> None:
    """As who cleans up an event loop may do, before its first step or later: the streams see for themselves."""

    async with crowd(sse(broker), 250) as readers:
        for number in range(5):
            await publish(broker, number)
            while not workers() and any(reader.got[-1:] != [number] for reader in readers):
                await asyncio.sleep(0)
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in workers():
                task.cancel()
        await until(lambda: all(reader.got[-1:] == [4] for reader in readers))
    assert {tuple(reader.got) for reader in readers} == {tuple(range(5))}


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.12 has eager tasks")
async def test_where_tasks_are_eager() -> None:
    """Nothing is sent within ``publish``."""
    loop = asyncio.get_running_loop()
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]
    try:
        async with connect() as broker, crowd(sse(broker), 5) as readers:
            for number in range(3):
                await publish(broker, number)
                assert {tuple(reader.got) for reader in readers} == {tuple(range(number))}
                await until(lambda: all(reader.got[-1:] == [number] for reader in readers))  # noqa: B023
    finally:
        loop.set_task_factory(None)


async def test_behind_base_http_middleware(broker: Broker) -> None:
    class Layer(BaseHTTPMiddleware):
        async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
            return await call_next(request)

    async def news(request: Request) -> Response:
        return SSEResponse(broker.events("news"))

    app = Starlette(routes=[Route("/", news)], middleware=[Middleware(Layer)] * 2)
    async with crowd(app, 5) as readers:
        readers[2].stall()
        for number in range(20):
            await publish(broker, number)
            await settled()
        readers[2].resume()
        await until(lambda: all(reader.got[-1:] == [19] for reader in readers))
    assert {tuple(reader.got) for reader in readers} == {tuple(range(20))}


async def test_a_subscriber_that_is_too_slow(broker: Broker) -> None:
    async with crowd(sse(broker), 1) as (other,), waiting(SSEResponse(broker.events("news", lag=3))) as visit:
        await publish(broker, 0)
        await visit.until(after_event("0"))
        await stalled(visit, broker)
        await publish(broker, *range(1, 10))
        await until(lambda: other.got[-1:] == [9])
        visit.resume()
        await visit.until(after_event("9"))
        visit.leave()
    events = [event.data for event in visit.events]
    assert (events[:2], events[-3:]) == (["0", "0"], ["7", "8", "9"])
    assert "missed" in events[-4]


async def test_a_broker_that_is_closed(broker: Broker) -> None:
    async with waiting(sse(broker), "error: BrokerUnavailable.*closed") as visit:
        await publish(broker, 0)
        await visit.until(after_event("0"))
        await broker.aclose()


@pytest.mark.parametrize("layers", [0, 5])
@pytest.mark.parametrize("server", SERVERS)
def test_on_a_real_server(server: str, layers: int) -> None:
    """One client reads nothing until the end, one never, two leave. Under Trio, where nobody pushes, the same."""
    last = b"data: 29 "
    with LiveServer("tests.pushing_app:app", server=server, env={"LAYERS": str(layers)}) as live, ExitStack() as stack:
        clients = [stack.enter_context(live.open("/news", receive_buffer=10_000)) for _ in range(8)]
        for client in clients:
            client.until(b"id: ")
        for number in range(30):
            live.json(f"/say/{number}?size=50_000")
            for client in clients[4:]:
                client.until(b"data: %d " % number)
            if number == 10:
                clients[2].abort()
                clients[3].close()
        assert numbers(clients[0].until(last)) == list(range(30))
        for client in clients:
            client.abort()
        live.assert_clean(len(clients) + 30)


@asynccontextmanager
async def turning() -> AsyncIterator[list[int]]:
    """How often the event loop has turned."""

    async def turn() -> None:
        while True:
            await asyncio.sleep(0)
            turns[0] += 1

    turns = [0]
    task = asyncio.create_task(turn())
    try:
        yield turns
    finally:
        task.cancel()


def workers() -> list[asyncio.Task[Any]]:
    return [task for task in asyncio.all_tasks() if "Pusher._work" in repr(task.get_coro())]


@asynccontextmanager
async def waiting(app: ASGIApp, *faults: str) -> AsyncIterator[Visit]:
    """A visit whose stream waits for what is published."""
    async with opened(app, *faults) as visit:
        await visit.until(when(lambda: len(visit.chunks) == 1))
        await settled()
        yield visit


async def stalled(visit: Visit, broker: Broker) -> None:
    """A push waits for this client."""
    visit.stall()
    await publish(broker, 0)
    await visit.until(when(lambda: visit.sending))


def stop(response: SSEResponse) -> None:
    assert response._ladder is not None
    response._ladder.stop("enough")
