"""SSEResponse in process: what it takes, when it sends, how it ends. Disconnects on real servers: test_sse_drops."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from contextlib import aclosing, nullcontext
from contextvars import ContextVar
from time import monotonic
from typing import Any

import anyio
import pytest
import sniffio
from anyio.to_thread import run_sync
from fastapi import FastAPI, WebSocket
from fastapi import Response as FastAPIResponse
from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.testclient import TestClient
from starlette.types import Message
from starlette.websockets import WebSocketDisconnect

from fastapi_cancel import (
    CancellableRoute,
    CancelPolicy,
    InvalidEvent,
    ServerSentEvent,
    SSEResponse,
    StreamInfo,
    Token,
    cancel_policy,
    drain,
    never_cancel,
    shutdown,
)
from fastapi_cancel._ahead import Ahead
from fastapi_cancel._event_stream import MAX_BYTES
from fastapi_cancel._heart import AT_ONCE, Heart, _hearts

from .asgi import Connection

pytestmark = pytest.mark.anyio

Events = AsyncIterator[Any]


async def words(*items: Any) -> Events:
    """All at once."""
    for item in items:
        yield item


class Feed:
    """A generator that yields what it is told to, when it is told to."""

    def __init__(self, *first: Any) -> None:
        self.items = list(first)
        self.more = anyio.Event()
        self.waiting = anyio.Event()
        self.closed = anyio.Event()
        self.seen: BaseException | None = None

    def put(self, *items: Any) -> None:
        self.items += items
        self.more.set()

    async def events(self) -> AsyncGenerator[Any]:
        try:
            while True:
                while self.items:
                    item = self.items.pop(0)
                    if item is StopAsyncIteration:
                        return
                    if isinstance(item, Exception):
                        raise item
                    yield item
                self.more = anyio.Event()
                self.waiting.set()
                await self.more.wait()
                self.waiting = anyio.Event()
        except BaseException as exc:
            self.seen = exc
            raise
        finally:
            self.closed.set()


class Wire(Connection):
    """A connection on which one can wait for what is sent."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.moved = anyio.Event()

    async def send(self, message: Message) -> None:
        await super().send(message)
        self.moved.set()

    async def until(self, *texts: bytes) -> None:
        with anyio.fail_after(5):
            while not all(text in self.body for text in texts):
                self.moved = anyio.Event()
                await self.moved.wait()

    @property
    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.sent[1:]]

    @property
    def ended(self) -> bool:
        return bool(self.sent) and self.sent[-1].get("more_body") is False


class Notes(list[Any]):
    """What the hooks were called with, in order."""

    async def on_disconnect(self, info: StreamInfo) -> None:
        await anyio.sleep(0.001)
        self.append(info)

    async def cleanup(self) -> None:
        await anyio.sleep(0.001)
        self.append("cleanup")

    async def client_close(self, message: Message) -> None:
        await anyio.sleep(0.001)
        self.append(message)


async def sent_by(content: Any, **options: Any) -> Wire:
    """The whole response to a client that stays."""
    wire = Wire()
    with anyio.fail_after(5):
        await wire.run(SSEResponse(content, **options))
    return wire


# -- what it is, and what it refuses -------------------------------------------------------------


def test_it_is_an_event_source_response() -> None:
    """C19."""
    assert issubclass(SSEResponse, (EventSourceResponse))
    assert issubclass(SSEResponse, StreamingResponse)


async def test_headers() -> None:
    """No `Connection`: HTTP/2 forbids it."""
    wire = await sent_by(words("x"))
    assert dict(wire.sent[0]["headers"]) == {
        b"content-type": b"text/event-stream; charset=utf-8",
        b"cache-control": b"no-store",
        b"x-accel-buffering": b"no",
    }
    wire = await sent_by(
        words(), headers={"Cache-Control": "public", "X-A": "b", "Connection": "close"}, status_code=201
    )
    assert wire.status == 201
    headers = dict(wire.sent[0]["headers"])
    assert (headers[b"cache-control"], headers[b"x-a"]) == (b"public", b"b")
    assert b"connection" not in headers


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"content": 5}, TypeError, "content must be"),
        ({"content": words}, TypeError, "content must be an iterable: call words"),
        ({"heartbeat": 0}, ValueError, "heartbeat must be"),
        ({"heartbeat": "15"}, TypeError, "heartbeat must be"),
        ({"heartbeat": float("nan")}, ValueError, "heartbeat must be"),
        ({"heartbeat": 15, "ping": 15}, TypeError, "heartbeat and ping are two names"),
        ({"ping": -1}, ValueError, "ping must be"),
        ({"ping": "5"}, TypeError, "ping must be"),
        ({"sep": "\n\n"}, ValueError, "sep must be"),
        ({"retry": -1}, ValueError, "retry must be"),
        ({"retry": 1.5}, ValueError, "retry must be"),
        ({"send_timeout": 0}, ValueError, "send_timeout must be"),
        ({"shutdown_grace_period": -1}, ValueError, "shutdown_grace_period must be"),
        ({"cleanup_timeout": -1}, ValueError, "cleanup_timeout must be"),
        ({"on_disconnect": print}, TypeError, "on_disconnect must be an async callable"),
        ({"cleanup": print}, TypeError, "cleanup must be async callables"),
        ({"policy": 5}, TypeError, "policy must be a CancelPolicy"),
        ({"batch": 1}, TypeError, "batch must be True or False, not 1"),
        ({"ping_message_factory": 5}, TypeError, "ping_message_factory must be callable"),
        ({"data_sender_callable": 5}, TypeError, "data_sender_callable must be callable"),
        ({"client_close_handler_callable": 5}, TypeError, "client_close_handler_callable must be callable"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SSEResponse(**{"content": [], **arguments})


def test_it_needs_no_event_loop_to_be_made() -> None:
    """sysid/sse-starlette#59: nor does it keep one."""
    SSEResponse(["x"])


# -- content -------------------------------------------------------------------------------------


class Counter:
    """An iterator that is no generator."""

    def __init__(self) -> None:
        self.count = 0

    def __aiter__(self) -> Counter:
        return self

    async def __anext__(self) -> str:
        self.count += 1
        if self.count > 2:
            raise StopAsyncIteration
        await anyio.sleep(0)
        return str(self.count)


class Bare(Counter):
    """Its ``__anext__`` returns something that is awaitable, and not a coroutine."""

    def __anext__(self) -> Any:
        step = super().__anext__

        class Step:
            def __await__(self) -> Generator[Any, Any, str]:
                return step().__await__()

        return Step()


@pytest.mark.parametrize(
    "content",
    [
        lambda: words("1", "2"),
        lambda: ["1", "2"],
        lambda: iter(("1", "2")),
        lambda: (str(number) for number in (1, 2)),
        Counter,
        Bare,
    ],
)
async def test_any_iterable(content: Callable[[], Any]) -> None:
    assert (await sent_by(content())).body == b"data: 1\r\n\r\ndata: 2\r\n\r\n"


async def test_a_memory_stream_as_content() -> None:
    send, receive = anyio.create_memory_object_stream[str](2)
    send.send_nowait("1")
    send.close()
    assert (await sent_by(receive)).body == b"data: 1\r\n\r\n"
    receive.close()


async def test_none_is_skipped() -> None:
    notes = Notes()
    wire = await sent_by(words(None, "1", None), cleanup=notes.cleanup)
    assert wire.body == b"data: 1\r\n\r\n"


async def test_separator() -> None:
    wire = await sent_by(words("1", ServerSentEvent("2", sep="\r"), {"data": 3}), sep="\n")
    assert wire.body == b"data: 1\n\ndata: 2\r\rdata: 3\n\n"


async def test_retry_goes_first() -> None:
    assert (await sent_by(words("1"), retry=3000)).body == b"retry: 3000\r\n\r\ndata: 1\r\n\r\n"


async def test_a_bad_event_is_raised_where_it_was_made(caplog: pytest.LogCaptureFixture) -> None:
    """The events before it arrive, the response ends as it should, the log shows the `yield`."""
    raised: list[BaseException] = []

    async def content() -> Events:
        yield "good"
        try:
            yield {"data": "bad", "id": "a\nb"}
        except InvalidEvent as exc:
            raised.append(exc)
            raise
        yield "never"

    wire = await sent_by(content())
    assert wire.body == b"data: good\r\n\r\n"
    assert wire.ended
    assert "id must be a str without NUL or line breaks" in str(raised[0])
    (record,) = caplog.records
    assert "id must be" in record.message
    assert record.exc_info is not None and record.exc_info[1] is raised[0]


async def test_content_may_go_on_after_a_bad_event(caplog: pytest.LogCaptureFixture) -> None:
    async def content() -> Events:
        try:
            yield {"dada": 1}
        except InvalidEvent:
            yield "good"

    assert (await sent_by(content())).body == b"data: good\r\n\r\n"
    assert caplog.records == []


async def test_a_bad_event_of_no_generator_ends_the_stream(caplog: pytest.LogCaptureFixture) -> None:
    wire = await sent_by(["good", {"retry": -1}, "never"])
    assert wire.body == b"data: good\r\n\r\n"
    assert wire.ended
    assert "retry must be a whole number" in caplog.text


async def test_an_error_of_the_content_comes_out_after_its_events() -> None:
    async def content() -> Events:
        yield "1"
        yield "2"
        raise ZeroDivisionError

    wire = Wire()
    with pytest.raises(ZeroDivisionError):
        await wire.run(SSEResponse(content()))
    assert wire.body == b"data: 1\r\n\r\ndata: 2\r\n\r\n"
    assert not wire.ended


# -- when it sends -------------------------------------------------------------------------------


async def test_events_that_are_ready_go_out_together() -> None:
    wire = await sent_by(words(*range(1000)))
    assert wire.body == b"".join(b"data: %d\r\n\r\n" % number for number in range(1000))
    assert len(wire.bodies) < 100


async def test_what_goes_out_together_is_bounded() -> None:
    wire = await sent_by(words(*("x" * 1000 for _ in range(1000))))
    assert max(map(len, wire.bodies)) < MAX_BYTES + 2000


async def test_a_burst_does_not_wait_for_what_comes_after_it() -> None:
    feed = Feed("1", "2", "3")
    wire = Wire()
    async with anyio.create_task_group() as group:
        group.start_soon(wire.run, SSEResponse(feed.events()))
        await wire.until(b"data: 3")
        feed.put("4")
        await wire.until(b"data: 4")
        feed.put("5", StopAsyncIteration)
    assert wire.body == b"".join(b"data: %d\r\n\r\n" % number for number in range(1, 6))
    assert wire.ended


async def test_the_loop_turns_while_content_never_waits() -> None:
    """C17: also when it has nothing to say."""

    async def content() -> Events:
        while True:
            yield None

    wire = Wire()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(wire.run, SSEResponse(content()))
            await anyio.sleep(0.01)
            wire.leave()


async def test_content_that_never_waits_is_stopped() -> None:
    """C17."""
    notes = Notes()

    async def content() -> Events:
        while True:
            yield "x" * 100

    wire = Wire()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(wire.run, SSEResponse(content(), on_disconnect=notes.on_disconnect))
            await wire.until(b"x")
            wire.leave()
    assert notes[0].cause == "disconnect"


# -- heartbeats ----------------------------------------------------------------------------------


async def test_heartbeats_on_an_idle_stream() -> None:
    """C20."""
    feed = Feed("1")
    wire = Wire()
    async with anyio.create_task_group() as group:
        group.start_soon(wire.run, SSEResponse(feed.events(), heartbeat=0.05))
        await wire.until(b"data: 1")
        await wire.until(b": ping - ")
        assert wire.body.count(b"data") == 1
        feed.put("2", StopAsyncIteration)
    assert wire.body.endswith(b"\r\n\r\ndata: 2\r\n\r\n")


@pytest.mark.parametrize("off", [{"heartbeat": None}, {"ping": 0}])
async def test_no_heartbeats(off: dict[str, Any]) -> None:
    """C20, sysid/sse-starlette#206: 0 is never, not always."""
    feed = Feed("1")
    wire = Wire()
    async with anyio.create_task_group() as group:
        group.start_soon(wire.run, SSEResponse(feed.events(), **off))
        await feed.waiting.wait()
        await anyio.sleep(0.2)
        feed.put(StopAsyncIteration)
    assert wire.body == b"data: 1\r\n\r\n"


async def test_heartbeats_switched_off_and_on_meanwhile() -> None:
    """sysid/sse-starlette#206: `ping_interval = 0` in the middle of a stream."""
    feed = Feed("1")
    wire = Wire()
    response = SSEResponse(feed.events(), ping=0.05)
    async with anyio.create_task_group() as group:
        group.start_soon(wire.run, response)
        await wire.until(b": ping")
        response.ping_interval = 0
        before = wire.body.count(b": ping")
        await anyio.sleep(0.3)
        assert wire.body.count(b": ping") <= before + 1
        feed.put(StopAsyncIteration)


async def test_no_heartbeat_while_events_flow() -> None:
    """C20: idle is measured from the last byte sent."""
    feed = Feed()
    wire = Wire()
    async with anyio.create_task_group() as group:
        group.start_soon(wire.run, SSEResponse(feed.events(), heartbeat=1))
        for number in range(12):
            feed.put(number)
            await wire.until(b"data: %d\r\n" % number)
            await anyio.sleep(0.1)
        feed.put(StopAsyncIteration)
    assert b"ping" not in wire.body


async def test_no_heartbeat_inside_an_event() -> None:
    """C20: bytes are the content's own; an event that it has not ended is not broken into."""
    feed = Feed(b"data: a")
    wire = Wire()
    async with anyio.create_task_group() as group:
        group.start_soon(wire.run, SSEResponse(feed.events(), heartbeat=0.05))
        await wire.until(b"data: a")
        await anyio.sleep(0.2)
        feed.put(b"b\n\n")
        await wire.until(b"\n\n: ping")
        feed.put(StopAsyncIteration)
    assert wire.body.startswith(b"data: ab\n\n")


@pytest.mark.parametrize("made", [ServerSentEvent(event="ping"), {"event": "ping"}])
async def test_heartbeats_of_ones_own(made: Any) -> None:
    feed = Feed()
    wire = Wire()
    async with anyio.create_task_group() as group:
        group.start_soon(wire.run, SSEResponse(feed.events(), heartbeat=0.05, ping_message_factory=lambda: made))
        await wire.until(b"event: ping\r\n\r\n")
        feed.put(StopAsyncIteration)


async def test_a_heartbeat_that_cannot_be_made_ends_the_stream() -> None:
    def factory() -> Any:
        raise ZeroDivisionError

    feed = Feed("1")
    wire = Wire()
    with pytest.raises(ZeroDivisionError), anyio.fail_after(5):
        await wire.run(SSEResponse(feed.events(), heartbeat=0.05, ping_message_factory=factory))
    assert feed.closed.is_set()


async def test_time_limits_of_the_content_are_its_own() -> None:
    """PEP 789: a heartbeat that blocks is not hit by a limit that the content has around its wait."""
    passed = anyio.Event()

    async def content() -> Events:
        yield "1"
        with anyio.move_on_after(0.3):
            await anyio.sleep_forever()
        passed.set()
        yield "2"
        yield StopAsyncIteration

    wire = Wire()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(wire.run, SSEResponse(content(), heartbeat=0.05))
            await wire.until(b"data: 1")
            wire.unblocked = anyio.Event()  # the next heartbeat blocks
            await passed.wait()
            wire.unblocked.set()
            await wire.until(b": ping", b"data: 2")
            assert wire.body.index(b": ping") < wire.body.index(b"data: 2")


async def test_a_heartbeat_that_cannot_be_written_is_a_stalled_client() -> None:
    """C18."""
    notes = Notes()
    feed = Feed("1")
    wire = Wire()
    response = SSEResponse(feed.events(), heartbeat=0.05, send_timeout=0.1, on_disconnect=notes.on_disconnect)
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(wire.run, response)
            await wire.until(b"data: 1")
            wire.unblocked = anyio.Event()
    assert notes[0].cause == "stalled"
    assert feed.closed.is_set()


async def test_a_client_that_leaves_during_a_heartbeat() -> None:
    """On a server whose `send` raises."""
    notes = Notes()
    feed = Feed("1")
    wire = Wire(raises=True)
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(wire.run, SSEResponse(feed.events(), heartbeat=0.05, on_disconnect=notes.on_disconnect))
            await feed.waiting.wait()
            wire.unblocked = anyio.Event()
            await anyio.sleep(0.2)
            wire.leave()
    assert notes[0].cause == "disconnect"


async def test_an_error_of_send_aside_comes_out() -> None:
    """Of a middleware, say. It ends the stream at once, however long the content waits."""

    class Broken(Wire):
        async def send(self, message: Message) -> None:
            if b"ping" in message.get("body", b""):
                raise ZeroDivisionError
            await super().send(message)

    feed = Feed("1")
    wire = Broken()
    with pytest.raises(ZeroDivisionError), anyio.fail_after(5):
        await wire.run(SSEResponse(feed.events(), heartbeat=0.05, farewell="never"))
    assert feed.closed.is_set()
    assert b"never" not in wire.body


class Slow(Wire):
    """On which it shows when two send at once. ``unblocked`` holds up everything but the start."""

    sending = 0

    async def send(self, message: Message) -> None:
        self.sending += 1
        assert self.sending == 1, "two at once"
        try:
            await super().send(message)
        finally:
            self.sending -= 1


async def test_one_at_a_time_sends() -> None:
    """Content that goes on and waits again while a helper sends; what it yielded is not left behind."""
    wire = Slow()
    seen = anyio.Event()

    async def content() -> Events:
        yield "1"
        yield "2"
        wire.unblocked = anyio.Event()
        await anyio.sleep(0.02)  # "2" goes out aside, and blocks
        yield None
        yield "3"
        seen.set()
        await anyio.sleep_forever()

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(wire.run, SSEResponse(content()))
            await seen.wait()
            await anyio.sleep(0.01)
            wire.unblocked.set()
            await wire.until(b"data: 2", b"data: 3")
            wire.leave()
    assert wire.body == b"data: 1\r\n\r\ndata: 2\r\n\r\ndata: 3\r\n\r\n"


@pytest.mark.parametrize("policy", [CancelPolicy(causes={"disconnect"}), CancelPolicy(grace=20)])
async def test_an_error_aside_ends_the_stream_whatever_the_policy(policy: CancelPolicy) -> None:
    def factory() -> Any:
        raise ZeroDivisionError

    feed = Feed("1")
    with pytest.raises(ZeroDivisionError), anyio.fail_after(5):
        await Wire().run(SSEResponse(feed.events(), heartbeat=0.05, ping_message_factory=factory, policy=policy))
    assert feed.closed.is_set()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_heart_beats_on_when_one_stream_fails(caplog: pytest.LogCaptureFixture) -> None:
    heart = Heart(asyncio.get_running_loop().call_later)
    beat = anyio.Event()

    def fail(now: float) -> float:
        raise ZeroDivisionError

    def well(now: float) -> float:
        beat.set()
        return now + 100

    pulses = [heart.add(fail, 0), heart.add(well, 0)]
    with anyio.fail_after(5):
        await beat.wait()
    assert "ZeroDivisionError" in caplog.text
    for pulse in pulses:
        pulse.stop()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_nothing_is_kept_of_streams_that_ended() -> None:
    """However long their interval. Nor is a loop that ended."""
    heart = Heart(asyncio.get_running_loop().call_later)
    stays = heart.add(lambda now: now + 100, monotonic() + 100)
    for _ in range(10 * AT_ONCE):
        heart.add(lambda now: now + 100, monotonic() + 3600).stop()
    assert len(heart._due) < 3 * AT_ONCE
    stays.stop()
    assert heart._due == []
    assert heart._timer is None

    async def stream() -> weakref.ref[Any]:
        feed = Feed("1")
        wire = Wire()
        async with anyio.create_task_group() as group:
            group.start_soon(wire.run, SSEResponse(feed.events()))
            await wire.until(b"data: 1")
            await feed.waiting.wait()
            feed.put(StopAsyncIteration)
        loop = asyncio.get_running_loop()
        assert loop in _hearts
        return weakref.ref(loop)

    ended = await run_sync(asyncio.run, stream())
    gc.collect()
    assert ended() is None


# -- ends ----------------------------------------------------------------------------------------


async def leave_after(wire: Wire, response: Response, text: bytes) -> None:
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(wire.run, response)
            await wire.until(text)
            wire.leave()


async def test_hooks_after_a_disconnect() -> None:
    notes = Notes()
    feed = Feed({"data": "a", "id": "1"}, {"data": "b", "id": "2"}, "c")
    response = SSEResponse(
        feed.events(),
        on_disconnect=notes.on_disconnect,
        cleanup=notes.cleanup,
        client_close_handler_callable=notes.client_close,
        farewell="never",
    )
    wire = Wire()
    await leave_after(wire, response, b"data: c")
    message, info, last = notes
    assert message == {"type": "http.disconnect"}
    assert last == "cleanup"
    assert (info.cause, info.events, info.bytes, info.last_id) == ("disconnect", 3, len(wire.body), "2")
    assert info.seconds > 0
    assert feed.closed.is_set()
    await response.aclose()
    assert len(notes) == 3


async def test_hooks_after_a_finish() -> None:
    """`on_disconnect` is for early ends."""
    notes = Notes()
    response = SSEResponse(
        words("1"),
        on_disconnect=notes.on_disconnect,
        cleanup=notes.cleanup,
        client_close_handler_callable=notes.client_close,
    )
    await Wire().run(response)
    assert notes == ["cleanup"]
    assert response.info.events == 1
    assert not response.active


async def test_a_hook_that_fails_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    notes = Notes()

    async def fails(_: Any) -> None:
        raise ZeroDivisionError

    feed = Feed("1")
    response = SSEResponse(
        feed.events(), on_disconnect=fails, client_close_handler_callable=fails, cleanup=notes.cleanup
    )
    await leave_after(Wire(), response, b"1")
    assert notes == ["cleanup"]
    assert len([record for record in caplog.records if record.exc_info]) == 2


async def test_hooks_when_the_client_left_before_the_response() -> None:
    """stemdeckapp/stemdeck#513: the generator never started."""
    notes = Notes()
    app = FastAPI()
    app.router.route_class = CancellableRoute
    wire = Wire()

    @app.get("/")
    async def endpoint(request: Request) -> FastAPIResponse:
        response = SSEResponse(words("never"), on_disconnect=notes.on_disconnect, cleanup=notes.cleanup)
        assert (await request.receive())["type"] == "http.request"
        wire.leave()
        with anyio.CancelScope(shield=True):
            assert (await request.receive())["type"] == "http.disconnect"
        return response

    with anyio.fail_after(5):
        await wire.run(app)
    info, last = notes
    assert (info.cause, info.events, info.bytes, info.last_id) == ("disconnect", 0, 0, None)
    assert last == "cleanup"
    assert wire.sent == []


async def test_head_opens_no_stream() -> None:
    """sysid/sse-starlette#218: the headers of GET, the background task, the cleanup; no content, no sender."""
    notes = Notes()
    begun: list[str] = []

    async def content() -> Events:
        begun.append("content")
        yield "never"

    async def sender() -> None:
        begun.append("sender")

    wire = Wire(method="HEAD")
    response = SSEResponse(
        content(),
        cleanup=notes.cleanup,
        data_sender_callable=sender,
        background=BackgroundTask(notes.append, "background"),
    )
    with anyio.fail_after(5):
        await wire.run(response)
    assert begun == []
    assert wire.bodies == [b""]
    assert (b"content-type", b"text/event-stream; charset=utf-8") in wire.sent[0]["headers"]
    assert notes == ["cleanup", "background"]


async def test_websocket_denial() -> None:
    app = FastAPI()

    @app.websocket("/")
    async def deny(socket: WebSocket) -> None:
        await socket.send_denial_response(SSEResponse(words("no"), status_code=403))

    with TestClient(app) as client, pytest.raises(WebSocketDisconnect) as caught:
        with client.websocket_connect("/"):
            pass
    denial: Any = caught.value
    assert (denial.status_code, denial.content) == (403, b"data: no\r\n\r\n")


@pytest.mark.parametrize("way", ["never_cancel", "policy"])
async def test_a_stream_that_runs_to_its_end_for_nobody(way: str) -> None:
    """The endpoint opted out; or the policy leaves out the cause."""
    app = FastAPI()
    app.router.route_class = CancellableRoute
    finished = anyio.Event()
    feed = Feed("1")

    async def content() -> Events:
        async for item in feed.events():
            yield item
        finished.set()

    async def endpoint() -> FastAPIResponse:
        policy = CancelPolicy(causes={"shutdown"}) if way == "policy" else None
        return SSEResponse(content(), heartbeat=0.05, policy=policy)

    app.get("/")(never_cancel(endpoint) if way == "never_cancel" else endpoint)

    wire = Wire()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(wire.run, app)
            await wire.until(b"data: 1", b": ping")
            wire.leave()
            await anyio.sleep(0.1)
            feed.put("2", "3", StopAsyncIteration)
            await finished.wait()
    assert b"data: 3" not in wire.body


async def test_the_policy_limits_the_time() -> None:
    """Cause `timeout`: the client is still there, so it gets the farewell and a proper end."""
    notes = Notes()
    feed = Feed("1")
    wire = Wire()
    response = SSEResponse(
        feed.events(),
        farewell=lambda info: {"event": "bye", "data": info.cause},
        policy=CancelPolicy(timeout=0.05),
        on_disconnect=notes.on_disconnect,
    )
    with anyio.fail_after(5):
        await wire.run(response)
    assert wire.body == b"data: 1\r\n\r\nevent: bye\r\ndata: timeout\r\n\r\n"
    assert wire.ended
    assert notes[0].cause == "timeout"


@pytest.mark.parametrize(("limit", "seconds"), [(0, 0.001), (None, 1e9), (5, 5)])
async def test_cleanup_timeout(limit: float | None, seconds: float) -> None:
    """sysid/sse-starlette#217: as there, 0 is at once and None is no limit."""
    response = SSEResponse(words(), cleanup_timeout=limit)
    assert response._policy_over(CancelPolicy(cleanup_timeout=7)).cleanup_timeout == seconds
    assert SSEResponse(words())._policy_over(CancelPolicy(cleanup_timeout=7)).cleanup_timeout == 7


@pytest.mark.parametrize("cause", ["disconnect", "timeout", "shutdown"])
async def test_background_tasks_run_after_every_end(cause: str) -> None:
    """C12, lsst/daf_butler#1407: once, after the cleanup."""
    notes = Notes()
    response = SSEResponse(
        Feed("1").events(),
        background=BackgroundTask(notes.append, "background"),
        cleanup=notes.cleanup,
        policy=CancelPolicy(timeout=0.05 if cause == "timeout" else None),
    )
    wire = Wire()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(wire.run, response)
            await wire.until(b"data: 1")
            if cause == "disconnect":
                wire.leave()
            elif cause == "shutdown":
                drain()
    assert notes == ["cleanup", "background"]


async def test_a_finished_response_does_not_cancel_its_background_task() -> None:
    """C5, ITISFoundation/osparc-simcore#7279: the client has its answer and leaves."""
    wire = Wire()
    finished: list[str] = []

    async def background() -> None:
        wire.leave()
        await anyio.sleep(0.05)
        finished.append("background")

    with anyio.fail_after(5):
        await wire.run(SSEResponse(words("1"), background=BackgroundTask(background)))
    assert finished == ["background"]


@pytest.mark.parametrize("stands_at", ["await", "yield"])
async def test_content_that_holds_a_scope_across_its_yield(stands_at: str, caplog: pytest.LogCaptureFixture) -> None:
    """C11, unslothai/unsloth#6577: closed by another task it would "exit cancel scope in a different task"."""
    wire = Wire()

    async def content() -> Events:
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep_forever)
            try:
                yield "1"
                if stands_at == "yield":
                    wire.unblocked = anyio.Event()
                yield "2"
                await anyio.sleep_forever()
            finally:
                group.cancel_scope.cancel()

    async def leave() -> None:
        await anyio.sleep(0.05)
        wire.leave()

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(wire.run, SSEResponse(content()))
            group.start_soon(leave)
    assert caplog.records == []


async def test_an_error_of_the_content_outlives_the_client() -> None:
    """It came first: it is not to vanish because the client left while the events before it went out."""
    wire = Wire()
    raised = anyio.Event()

    async def content() -> Events:
        yield "1"
        yield "2"
        wire.unblocked = anyio.Event()
        await anyio.sleep(0.02)
        raised.set()
        raise ZeroDivisionError

    errors: list[Exception] = []

    async def run() -> None:
        try:
            await wire.run(SSEResponse(content()))
        except ZeroDivisionError as exc:
            errors.append(exc)

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(run)
            await raised.wait()
            await anyio.sleep(0.01)
            wire.left.set()
    assert len(errors) == 1


async def test_an_error_of_the_content_after_the_client_left() -> None:
    """In its grace. What it yielded cannot be sent any more."""
    wire = Wire()
    errors: list[Exception] = []

    async def content() -> Events:
        yield "1"
        while not wire.left.is_set():
            await anyio.sleep(0.001)
        await anyio.sleep(0.01)
        raise ZeroDivisionError

    async def run() -> None:
        try:
            await wire.run(SSEResponse(content(), policy=CancelPolicy(grace=60)))
        except ZeroDivisionError as exc:
            errors.append(exc)

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(run)
            await wire.until(b"data: 1")
            wire.leave()
    assert len(errors) == 1


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_servers_cancellation_goes_before_an_error_of_the_content() -> None:
    """C14."""
    wire = Wire()

    async def content() -> Events:
        yield "1"
        yield "2"
        wire.unblocked = anyio.Event()
        raise ZeroDivisionError

    running = asyncio.create_task(wire.run(SSEResponse(content())))
    await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_no_heartbeat_after_the_farewell() -> None:
    async def content() -> Events:
        try:
            yield "1"
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):  # for Trio
                await anyio.sleep(0.2)

    wire = await drained(SSEResponse(content(), heartbeat=0.05, farewell="bye"))
    assert wire.body.endswith(b"data: bye\r\n\r\n")


async def test_a_client_that_leaves_ends_the_grace() -> None:
    """Whoever the grace was for has gone."""
    feed = Feed("1")
    wire = Wire()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(wire.run, SSEResponse(feed.events(), shutdown_grace_period=60))
            await wire.until(b"data: 1")
            drain()
            wire.leave()
    assert feed.closed.is_set()


# -- draining ------------------------------------------------------------------------------------


async def drained(response: SSEResponse, text: bytes = b"data: 1", meanwhile: Callable[[], object] = int) -> Wire:
    """What is sent in all if the server is told to stop after ``text``."""
    wire = Wire()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(wire.run, response)
            await wire.until(text)
            assert drain() == 1
            meanwhile()
    assert drain() == 0
    return wire


async def test_farewell() -> None:
    """C22."""
    notes = Notes()
    feed = Feed("1")
    wire = await drained(SSEResponse(feed.events(), farewell="bye", retry=5, on_disconnect=notes.on_disconnect))
    assert wire.body == b"retry: 5\r\n\r\ndata: 1\r\n\r\nretry: 5\r\n\r\ndata: bye\r\n\r\n"
    assert wire.ended
    assert feed.closed.is_set()
    assert notes[0].cause == "shutdown"


async def test_no_farewell() -> None:
    feed = Feed("1")
    wire = await drained(SSEResponse(feed.events()))
    assert wire.bodies[-1] == b""
    assert wire.body == b"data: 1\r\n\r\n"
    assert wire.ended


async def test_the_farewell_is_said_before_a_slow_cleanup() -> None:
    said = anyio.Event()
    wire: Wire

    async def content() -> Events:
        try:
            yield "1"
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):  # for Trio
                await wire.until(b"data: bye")
                said.set()

    wire = Wire()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(wire.run, SSEResponse(content(), farewell="bye"))
            await wire.until(b"data: 1")
            drain()
    assert said.is_set()
    assert wire.body.count(b"bye") == 1


async def test_the_farewell_is_said_to_content_that_never_waits() -> None:
    async def content() -> Events:
        while True:
            yield "x"

    wire = await drained(SSEResponse(content(), farewell="bye"), b"x")
    assert wire.body.endswith(b"data: x\r\n\r\ndata: bye\r\n\r\n")
    assert wire.body.count(b"bye") == 1
    assert wire.ended


async def test_no_farewell_inside_an_event() -> None:
    feed = Feed(b"data: 1")
    wire = await drained(SSEResponse(feed.events(), farewell="bye"))
    assert wire.body == b"data: 1"
    assert wire.ended


async def test_a_farewell_that_cannot_be_made_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def farewell(info: StreamInfo) -> Any:
        raise ZeroDivisionError

    wire = await drained(SSEResponse(Feed("1").events(), farewell=farewell))
    assert wire.ended
    assert "ZeroDivisionError" in caplog.text


async def test_a_client_that_does_not_read_does_not_hold_up_the_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastapi_cancel._event_stream.PARTING", 0.05)
    feed = Feed("1")
    wire = Wire()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(wire.run, SSEResponse(feed.events(), farewell="bye"))
            await wire.until(b"data: 1")
            wire.unblocked = anyio.Event()
            feed.put("2")
            await anyio.sleep(0.01)
            drain()
    assert b"bye" not in wire.body
    assert feed.closed.is_set()


async def test_content_that_watches_the_event_ends_by_itself() -> None:
    """sysid/sse-starlette#167."""
    event = anyio.Event()

    async def content() -> Events:
        yield "1"
        await event.wait()
        await anyio.sleep(0.01)
        yield "2"

    response = SSEResponse(content(), shutdown_event=event, shutdown_grace_period=10, farewell="bye")
    wire = await drained(response)
    assert wire.body == b"data: 1\r\n\r\ndata: 2\r\n\r\ndata: bye\r\n\r\n"


async def test_the_grace_has_an_end() -> None:
    feed = Feed("1")
    wire = await drained(
        SSEResponse(feed.events(), shutdown_grace_period=0.05, farewell="bye"), meanwhile=lambda: feed.put("2")
    )
    assert wire.body == b"data: 1\r\n\r\ndata: 2\r\n\r\ndata: bye\r\n\r\n"
    assert feed.closed.is_set()


async def test_a_policy_may_leave_out_the_shutdown() -> None:
    """sysid/sse-starlette#157."""
    feed = Feed("1")
    response = SSEResponse(
        feed.events(), farewell="never", shutdown_grace_period=0.01, policy=CancelPolicy(causes={"disconnect"})
    )
    wire = await drained(response, meanwhile=lambda: feed.put("2", StopAsyncIteration))
    assert wire.body == b"data: 1\r\n\r\ndata: 2\r\n\r\n"


async def test_draining_as_sse_starlette_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its `AppStatus.should_exit`, set while a stream is open."""
    monkeypatch.setattr(AppStatus, "should_exit", False)
    feed = Feed("1")
    wire = Wire()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(wire.run, SSEResponse(feed.events(), farewell="bye"))
            await wire.until(b"data: 1")
            AppStatus.should_exit = True
    assert wire.body == b"data: 1\r\n\r\ndata: bye\r\n\r\n"
    # Nobody resets it. It says nothing about streams that come later: sysid/sse-starlette#211.
    async with anyio.create_task_group() as group:
        wire = Wire()
        feed = Feed("1")
        group.start_soon(wire.run, SSEResponse(feed.events(), farewell="never"))
        await wire.until(b"data: 1")
        await anyio.sleep(2 * shutdown.LOOK)
        feed.put(StopAsyncIteration)
    assert wire.body == b"data: 1\r\n\r\n"


# -- a sender beside the stream ------------------------------------------------------------------


async def test_a_sender_runs_beside_the_stream_and_ends_with_it() -> None:
    send, receive = anyio.create_memory_object_stream[str]()
    ended: list[str] = []

    async def sender() -> None:
        try:
            async with send:
                await send.send("1")
                await send.send("2")
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):  # for Trio
                await anyio.sleep(0.001)
            ended.append("sender")

    wire = await sent_by(receive, data_sender_callable=sender)
    receive.close()
    assert wire.body == b"data: 1\r\n\r\ndata: 2\r\n\r\n"
    assert ended == ["sender"]


async def test_a_sender_may_end_before_the_stream() -> None:
    feed = Feed()

    async def sender() -> None:
        feed.put("1")

    wire = Wire()
    async with anyio.create_task_group() as group:
        group.start_soon(wire.run, SSEResponse(feed.events(), data_sender_callable=sender))
        await wire.until(b"data: 1")
        feed.put("2", StopAsyncIteration)
    assert wire.body == b"data: 1\r\n\r\ndata: 2\r\n\r\n"


async def test_a_sender_that_fails_ends_the_stream() -> None:
    """The error is bare, not in a group."""

    async def sender() -> None:
        await anyio.sleep(0.01)
        raise ZeroDivisionError

    feed = Feed("1")
    with pytest.raises(ZeroDivisionError), anyio.fail_after(5):
        await Wire().run(SSEResponse(feed.events(), data_sender_callable=sender))
    assert feed.closed.is_set()


async def test_a_sender_that_fails_at_the_end_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    feed = Feed("1")

    async def sender() -> None:
        try:
            feed.put(StopAsyncIteration)
            await anyio.sleep_forever()
        finally:
            raise ZeroDivisionError

    assert (await sent_by(feed.events(), data_sender_callable=sender)).ended
    assert "ZeroDivisionError" in caplog.text


async def test_a_sender_that_wakes_the_content_and_fails() -> None:
    """The content stands at its `yield` when the error comes: that is its one interruption (C7)."""
    feed = Feed("1")
    cleaned: list[str] = []

    async def content() -> Events:
        try:
            async with aclosing(feed.events()) as events:
                async for item in events:
                    yield item
        finally:
            with anyio.CancelScope(shield=True):  # for Trio
                await anyio.sleep(0.001)
            cleaned.append("content")

    async def sender() -> None:
        await feed.waiting.wait()
        feed.put("2")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), anyio.fail_after(5):
        await Wire().run(SSEResponse(content(), data_sender_callable=sender))
    assert cleaned == ["content"]


async def test_a_sender_that_is_not_wanted_before_it_begins() -> None:
    """On Trio this hung for ever."""
    wire = Wire()
    wire.leave()

    async def sender() -> None:
        await anyio.sleep_forever()

    feed = Feed("1")
    response = SSEResponse(feed.events(), data_sender_callable=sender)

    async def early() -> None:
        while response._ladder is None:
            await anyio.sleep(0)
        response._ladder.signal("stop")

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(wire.run, response)
            group.start_soon(early)


async def test_a_stream_that_is_closed_while_it_waits() -> None:
    """By whoever drives the coroutine, as Python does with one that nobody wants any more."""
    wire = Wire()
    feed = Feed("1")
    running = Ahead(feed.events())
    assert running.poll()
    assert not running.poll()
    waiting: Any = running.wait()
    waiting.send(None)
    waiting.close()
    assert feed.closed.is_set()
    assert wire.sent == []


async def test_a_sender_that_is_never_begun() -> None:
    """The stream is over before it could."""

    async def sender() -> None: ...

    assert (await sent_by(words("1"), data_sender_callable=sender)).ended


# -- what a second review found ------------------------------------------------------------------


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_a_sender_that_is_cancelled_before_it_begins() -> None:
    """From outside: the shielded wait for its end must not be for ever."""
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:

            class Cancelling(Wire):
                async def send(self, message: Message) -> None:
                    group.cancel_scope.cancel()

            group.start_soon(
                Cancelling().run, SSEResponse(Feed("1").events(), data_sender_callable=anyio.sleep_forever)
            )


async def test_a_background_task_runs_once_for_nobody() -> None:
    """The client has left, the policy lets the stream go on."""
    notes = Notes()
    feed = Feed("1")
    wire = Wire()
    response = SSEResponse(
        feed.events(),
        policy=CancelPolicy(causes={"shutdown"}),
        background=BackgroundTask(notes.append, "background"),
        heartbeat=0.05,
    )
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(wire.run, response)
            await wire.until(b"data: 1")
            wire.leave()
            await anyio.sleep(0.1)
            feed.put(StopAsyncIteration)
    assert notes == ["background"]


async def test_an_error_of_the_sender_while_the_last_events_go_out() -> None:
    wire = Wire()

    async def sender() -> None:
        while wire.unblocked.is_set():
            await anyio.sleep(0.001)
        await anyio.sleep(0.02)
        raise ZeroDivisionError

    async def content() -> Events:
        yield "1"
        await anyio.sleep(0.02)
        wire.unblocked = anyio.Event()

    with pytest.raises(ZeroDivisionError), anyio.fail_after(5):
        await wire.run(SSEResponse(content(), data_sender_callable=sender))


async def test_an_error_of_the_sender_while_the_stream_parts(caplog: pytest.LogCaptureFixture) -> None:
    """The client gets its end; the error is not lost."""

    async def sender() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise ZeroDivisionError

    wire = Wire()
    errors: list[Exception] = []

    async def run() -> None:
        try:
            await wire.run(SSEResponse(Feed("1").events(), data_sender_callable=sender, farewell="bye"))
        except ZeroDivisionError as exc:
            errors.append(exc)

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(run)
            await wire.until(b"data: 1")
            await anyio.sleep(0.02)
            drain()
    assert errors or "ZeroDivisionError" in caplog.text


async def test_the_shutdowns_grace_is_the_senders_too() -> None:
    """One that feeds the content goes on for as long as that does."""
    send, receive = anyio.create_memory_object_stream[str]()

    async def sender() -> None:
        async with send:
            await send.send("1")
            await anyio.sleep(0.1)
            await send.send("2")

    response = SSEResponse(receive, data_sender_callable=sender, shutdown_grace_period=10, farewell="bye")
    wire = await drained(response)
    assert wire.body == b"data: 1\r\n\r\ndata: 2\r\n\r\ndata: bye\r\n\r\n"


async def test_a_finished_stream_does_not_wait_for_its_senders_grace() -> None:
    with anyio.fail_after(5):
        await Wire().run(
            SSEResponse(words("1"), data_sender_callable=anyio.sleep_forever, policy=CancelPolicy(grace=60))
        )


async def test_what_is_made_aside_is_made_for_its_own_request() -> None:
    """A tenant in a context variable, say: not that of whoever asks for the heartbeat, or drains."""
    tenant: ContextVar[str] = ContextVar("tenant", default="nobody")
    wires: dict[str, Wire] = {}

    async def serve(name: str) -> None:
        tenant.set(name)
        wires[name] = wire = Wire()
        await wire.run(
            SSEResponse(
                Feed(name).events(),
                heartbeat=0.05,
                ping_message_factory=lambda: {"comment": tenant.get()},
                farewell=lambda info: f"bye {tenant.get()}",
            )
        )

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            for name in ("ada", "bob"):
                group.start_soon(serve, name)
            await anyio.sleep(0.01)
            for name, wire in wires.items():
                await wire.until(f": {name}\r\n".encode())
            drain()
    for name, wire in wires.items():
        assert wire.body.endswith(f"data: bye {name}\r\n\r\n".encode())


async def test_a_forced_content_still_ends_its_response(caplog: pytest.LogCaptureFixture) -> None:
    async def content() -> Events:
        try:
            while True:
                yield "x"
        finally:
            await anyio.sleep_forever()

    wire = Wire()
    with anyio.fail_after(10):
        await wire.run(SSEResponse(content(), farewell="bye", policy=CancelPolicy(timeout=0.05, cleanup_timeout=0.1)))
    assert wire.body.endswith(b"data: bye\r\n\r\n")
    assert wire.ended


async def test_a_client_that_leaves_in_the_grace_of_a_server_that_raises() -> None:
    """C13."""
    wire = Wire(raises=True)
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(wire.run, SSEResponse(Feed("1").events(), shutdown_grace_period=60))
            await wire.until(b"data: 1")
            drain()
            wire.leave()


async def test_a_response_is_for_one_request() -> None:
    response = SSEResponse(["1"])
    await Wire().run(response)
    with pytest.raises(RuntimeError, match="for one request"):
        await Wire().run(response)


async def test_an_iterator_that_ends_before_it_is_awaited() -> None:
    class Empty:
        def __aiter__(self) -> Empty:
            return self

        def __anext__(self) -> Any:
            raise StopAsyncIteration

    assert (await sent_by(Empty())).ended


async def test_raising_the_token_is_the_one_interruption() -> None:
    """C7: the cleanup after it is left alone."""
    app = FastAPI()
    app.router.route_class = CancellableRoute
    cleaned = anyio.Event()
    wire = Wire()

    @app.get("/")
    @cancel_policy(grace=0.05)
    async def endpoint(token: Token) -> None:
        wire.leave()
        await token.wait()
        try:
            token.raise_if_set()
        finally:
            with anyio.CancelScope(shield=sniffio.current_async_library() == "trio"):
                await anyio.sleep(0.1)
            cleaned.set()

    with anyio.fail_after(5):
        await wire.run(app)
    assert cleaned.is_set()


async def test_a_sender_that_begins_when_all_is_over() -> None:
    """It does not."""
    notes = Notes()

    async def sender() -> None:
        notes.append("sender")

    await sent_by(words("1"), data_sender_callable=sender, cleanup=notes.cleanup)
    assert notes == ["cleanup"]


async def test_two_errors(caplog: pytest.LogCaptureFixture) -> None:
    """The content's comes out, the sender's is logged."""
    feed = Feed("1")

    async def content() -> Events:
        try:
            async with aclosing(feed.events()) as events:
                async for item in events:
                    yield item
        except BaseException as exc:
            raise ZeroDivisionError from exc

    async def sender() -> None:
        await feed.waiting.wait()
        raise LookupError

    with pytest.raises(ZeroDivisionError), anyio.fail_after(5):
        await Wire().run(SSEResponse(content(), data_sender_callable=sender))
    assert "LookupError" in caplog.text


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("around", [nullcontext, anyio.CancelScope])
@pytest.mark.parametrize("first", ["cancellation", "error"])
async def test_the_servers_cancellation_goes_before_an_error_of_the_sender(
    first: str, around: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    """C14: in whatever order they come, in one turn of the event loop. The error is logged."""
    feed = Feed("1")

    async def sender() -> None:
        await feed.waiting.wait()
        if first == "cancellation":
            running.cancel()
        else:
            asyncio.get_running_loop().call_soon(running.cancel)
        raise ZeroDivisionError

    async def run() -> None:
        with around():
            await Wire().run(SSEResponse(feed.events(), data_sender_callable=sender))

    running = asyncio.create_task(run())
    with pytest.raises(asyncio.CancelledError):
        await running
    assert feed.closed.is_set()
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_servers_cancellation_goes_before_an_error_of_the_content_after_a_cause() -> None:
    """C14: while what the content yielded before its error goes out, the stream is stopped and the server cancels."""
    wire = Wire()

    async def content() -> Events:
        yield "1"
        yield "2"
        wire.unblocked = anyio.Event()
        raise ZeroDivisionError

    response = SSEResponse(content())
    running = asyncio.create_task(wire.run(response))
    await asyncio.sleep(0.01)
    assert response._ladder is not None
    response._ladder.signal("stop", at_once=True)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


@pytest.mark.parametrize("policy", [CancelPolicy(grace=60), CancelPolicy(causes={"timeout"})])
async def test_the_close_handler_is_for_every_client_that_leaves(policy: CancelPolicy) -> None:
    """In the grace of a shutdown, and also if the stream goes on to its end for nobody."""
    notes = Notes()
    feed = Feed("1")
    response = SSEResponse(feed.events(), client_close_handler_callable=notes.client_close, policy=policy)
    wire = Wire()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(wire.run, response)
            await wire.until(b"data: 1")
            assert drain() == 1
            wire.leave()
            while response._ladder is None or not response._ladder.left:
                await anyio.sleep(0.001)
            feed.put(StopAsyncIteration)
    assert notes == [{"type": "http.disconnect"}]
    await response.aclose()
    assert len(notes) == 1


async def test_the_close_handler_is_not_for_a_client_that_stays() -> None:
    notes = Notes()
    await drained(SSEResponse(Feed("1").events(), client_close_handler_callable=notes.client_close))
    assert notes == []


async def test_events_that_are_ready_may_go_out_one_by_one() -> None:
    """Each is sent before the generator goes on, after a wait as well as in a burst."""
    wire = Wire()
    sent: list[bytes] = []

    async def content() -> Events:
        for number in range(6):
            if number == 3:
                await anyio.sleep(0.001)
            yield number
            sent.append(wire.bodies[-1])

    await wire.run(SSEResponse(content(), batch=False))
    assert sent == [b"data: %d\r\n\r\n" % number for number in range(6)]
    assert wire.body == b"".join(sent)


@pytest.mark.parametrize("sender", [False, True])
@pytest.mark.parametrize("end", ["finish", "leave", "drain", "leave_before_start"])
async def test_an_event_stream_leaves_no_reference_cycle(end: str, sender: bool) -> None:
    """It is freed at its end, not when the garbage collector comes."""
    wire = Wire(raises=end == "leave_before_start")
    finish = anyio.Event()
    ends = {"finish": finish.set, "leave": wire.leave, "drain": drain}
    freed = anyio.Event()

    async def content() -> Events:
        yield "1"
        await finish.wait()

    async def run() -> None:
        response = SSEResponse(content(), heartbeat=0.01, data_sender_callable=anyio.sleep_forever if sender else None)
        weakref.finalize(response, freed.set)
        await wire.run(response)

    gc.collect()
    gc.disable()
    try:
        with anyio.fail_after(5):
            async with anyio.create_task_group() as group:
                if end == "leave_before_start":
                    wire.leave()
                group.start_soon(run)
                if end in ends:
                    await wire.until(b"data: 1", b": ping")
                    ends[end]()
        assert freed.is_set()
    finally:
        gc.enable()


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_a_heartbeat_that_begins_when_all_is_over(caplog: pytest.LogCaptureFixture) -> None:
    """Made while the client leaves, to be sent two turns later: the cleanup is running by then."""

    def beat() -> str:
        assert response._ladder is not None
        response._ladder.signal("disconnect")
        return "beat"

    async def cleanup() -> None:
        await anyio.sleep(0.01)

    wire = Wire()
    response = SSEResponse(Feed("1").events(), heartbeat=0.01, ping_message_factory=beat, cleanup=cleanup)
    with anyio.fail_after(5):
        await wire.run(response)
    assert wire.body == b"data: 1\r\n\r\n"
    assert caplog.records == []
