"""SSEResponse in process: what it takes, when it sends, how it ends. Disconnects on real servers: test_matrix."""

from __future__ import annotations

import asyncio
import gc
import re
import sys
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, aclosing, asynccontextmanager, nullcontext
from contextvars import ContextVar
from itertools import chain
from time import monotonic, sleep
from typing import Any

import anyio
import pytest
import sniffio
import trio
from fastapi import FastAPI, WebSocket
from fastapi import Response as FastAPIResponse
from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send
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
from fastapi_cancel._feed import MAX_BYTES
from fastapi_cancel._heart import AT_ONCE, Heart, _hearts, current_heart
from fastapi_cancel.exceptions import Stalled
from fastapi_cancel.testing import (
    LeavingClient,
    Moment,
    Visit,
    after_event,
    after_start,
    before_body,
    when,
)

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


@pytest.fixture(params=["asyncio", "asyncio, in a scope", "trio"])
def anyio_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """asyncio also as it is behind a `BaseHTTPMiddleware`."""
    backend, _, scope = str(request.param).partition(", ")
    if scope:
        monkeypatch.setattr(f"{__name__}.around", anyio.CancelScope)
    return backend


around: Callable[[], AbstractContextManager[Any]] = nullcontext


@asynccontextmanager
async def opened(
    app: Any, *faults: str, method: str = "GET", server: str = "uvicorn", **moments: Any
) -> AsyncIterator[Visit]:
    """A visit in which these faults are found, and no other."""

    async def behind(*request: Any) -> None:
        with around():
            await app(*request)

    async with LeavingClient(behind, server=server).visit(method, "/", **moments) as visit:
        yield visit
    found = [[fault for fault in faults if re.match(fault, str(each), re.DOTALL)] for each in visit.faults]
    assert all(found) and set(chain(*found)) == set(faults), visit.faults


async def visited(app: Any, *faults: str, **options: Any) -> Visit:
    async with opened(app, *faults, **options) as visit:
        pass
    return visit


async def sent_by(content: Any, *faults: str, **options: Any) -> Visit:
    """The whole response to a client that stays."""
    return await visited(SSEResponse(content, **options), *faults)


def after(*texts: bytes) -> Moment:
    """Once all of these have come: heartbeats are no events."""
    return Moment(f"after{texts}", lambda visit: all(text in visit.body for text in texts))


# -- what it is, and what it refuses -------------------------------------------------------------


def test_it_is_an_event_source_response() -> None:
    """C19."""
    assert issubclass(SSEResponse, (EventSourceResponse))
    assert issubclass(SSEResponse, StreamingResponse)


async def test_headers() -> None:
    """No `Connection`: HTTP/2 forbids it."""
    visit = await sent_by(words("x"))
    assert dict(visit.headers) == {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-store",
        "x-accel-buffering": "no",
    }
    visit = await sent_by(
        words(), headers={"Cache-Control": "public", "X-A": "b", "Connection": "close"}, status_code=201
    )
    assert visit.status == 201
    assert (visit.headers["cache-control"], visit.headers["x-a"]) == ("public", "b")
    assert "connection" not in visit.headers


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
    visit = await sent_by(words(None, "1", None), cleanup=notes.cleanup)
    assert visit.body == b"data: 1\r\n\r\n"


async def test_separator() -> None:
    visit = await sent_by(words("1", ServerSentEvent("2", sep="\r"), {"data": 3}), sep="\n")
    assert visit.body == b"data: 1\n\ndata: 2\r\rdata: 3\n\n"


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

    visit = await sent_by(content(), "logged")
    assert visit.body == b"data: good\r\n\r\n"
    assert visit.completed
    assert "id must be a str without NUL or line breaks" in str(raised[0])
    (record,) = caplog.records
    assert "id must be" in record.message
    assert record.exc_info is not None and record.exc_info[1] is raised[0]


async def test_content_may_go_on_after_a_bad_event() -> None:
    async def content() -> Events:
        try:
            yield {"dada": 1}
        except InvalidEvent:
            yield "good"

    assert (await sent_by(content())).body == b"data: good\r\n\r\n"


async def test_a_bad_event_of_no_generator_ends_the_stream() -> None:
    visit = await sent_by(["good", {"retry": -1}, "never"], "logged: .*retry must be a whole number")
    assert visit.body == b"data: good\r\n\r\n"
    assert visit.completed


async def test_an_error_of_the_content_comes_out_after_its_events() -> None:
    async def content() -> Events:
        yield "1"
        yield "2"
        raise ZeroDivisionError

    visit = await sent_by(content(), "error: ZeroDivisionError")
    assert visit.body == b"data: 1\r\n\r\ndata: 2\r\n\r\n"
    assert not visit.completed


# -- when it sends -------------------------------------------------------------------------------


async def test_events_that_are_ready_go_out_together() -> None:
    visit = await sent_by(words(*range(1000)))
    assert visit.body == b"".join(b"data: %d\r\n\r\n" % number for number in range(1000))
    assert len(visit.chunks) < 100


async def test_what_goes_out_together_is_bounded() -> None:
    visit = await sent_by(words(*("x" * 1000 for _ in range(1000))))
    assert max(map(len, visit.chunks)) < MAX_BYTES + 2000


async def test_a_burst_does_not_wait_for_what_comes_after_it() -> None:
    feed = Feed("1", "2", "3")
    async with opened(SSEResponse(feed.events())) as visit:
        await visit.until(after_event("3"))
        feed.put("4")
        await visit.until(after_event("4"))
        feed.put("5", StopAsyncIteration)
    assert visit.body == b"".join(b"data: %d\r\n\r\n" % number for number in range(1, 6))
    assert visit.completed


async def test_the_loop_turns_while_content_never_waits() -> None:
    """C17: also when it has nothing to say."""

    async def content() -> Events:
        while True:
            yield None

    async with opened(SSEResponse(content())) as visit:
        await anyio.sleep(0.01)
        visit.leave()


async def test_content_that_never_waits_is_stopped() -> None:
    """C17."""
    notes = Notes()

    async def content() -> Events:
        while True:
            yield "x" * 100

    await visited(SSEResponse(content(), on_disconnect=notes.on_disconnect), leave=after_event("x"))
    assert notes[0].cause == "disconnect"


# -- heartbeats ----------------------------------------------------------------------------------


async def test_heartbeats_on_an_idle_stream() -> None:
    """C20."""
    feed = Feed("1")
    async with opened(SSEResponse(feed.events(), heartbeat=0.05)) as visit:
        await visit.until(after_event("1"))
        await visit.until(after(b": ping - "))
        assert visit.body.count(b"data") == 1
        feed.put("2", StopAsyncIteration)
    assert visit.body.endswith(b"\r\n\r\ndata: 2\r\n\r\n")


@pytest.mark.parametrize("off", [{"heartbeat": None}, {"ping": 0}])
async def test_no_heartbeats(off: dict[str, Any]) -> None:
    """C20, sysid/sse-starlette#206: 0 is never, not always."""
    feed = Feed("1")
    async with opened(SSEResponse(feed.events(), **off)) as visit:
        await feed.waiting.wait()
        await anyio.sleep(0.2)
        feed.put(StopAsyncIteration)
    assert visit.body == b"data: 1\r\n\r\n"


async def test_heartbeats_switched_off_and_on_meanwhile() -> None:
    """sysid/sse-starlette#206: `ping_interval = 0` in the middle of a stream."""
    feed = Feed("1")
    response = SSEResponse(feed.events(), ping=0.05)
    async with opened(response) as visit:
        await visit.until(after(b": ping"))
        response.ping_interval = 0
        before = visit.body.count(b": ping")
        await anyio.sleep(0.3)
        assert visit.body.count(b": ping") <= before + 1
        feed.put(StopAsyncIteration)


async def test_no_heartbeat_while_events_flow() -> None:
    """C20: idle is measured from the last byte sent."""
    feed, idle = Feed(), list[float]()

    def beat() -> bytes:
        idle.append(time.monotonic() - put_at)
        return b": ping\n\n"

    put_at = time.monotonic()
    async with opened(SSEResponse(feed.events(), heartbeat=0.4, ping_message_factory=beat)) as visit:
        for number in range(12):
            put_at = time.monotonic()
            feed.put(number)
            await visit.until(after(b"data: %d\r\n" % number))
            await anyio.sleep(0.05)
        await visit.until(after(b": ping"))
        feed.put(StopAsyncIteration)
    assert min(idle) >= 0.4


async def test_no_heartbeat_inside_an_event() -> None:
    """C20: bytes are the content's own; an event that it has not ended is not broken into."""
    feed = Feed(b"data: a")
    async with opened(SSEResponse(feed.events(), heartbeat=0.05)) as visit:
        await visit.until(after(b"data: a"))
        await anyio.sleep(0.2)
        feed.put(b"b\n\n")
        await visit.until(after(b"\n\n: ping"))
        feed.put(StopAsyncIteration)
    assert visit.body.startswith(b"data: ab\n\n")


@pytest.mark.parametrize("made", [ServerSentEvent(event="ping"), {"event": "ping"}])
async def test_heartbeats_of_ones_own(made: Any) -> None:
    feed = Feed()
    async with opened(SSEResponse(feed.events(), heartbeat=0.05, ping_message_factory=lambda: made)) as visit:
        await visit.until(after(b"event: ping\r\n\r\n"))
        feed.put(StopAsyncIteration)


async def test_a_heartbeat_that_cannot_be_made_ends_the_stream() -> None:
    def factory() -> Any:
        raise ZeroDivisionError

    feed = Feed("1")
    await sent_by(feed.events(), "error: ZeroDivisionError", heartbeat=0.05, ping_message_factory=factory)
    assert feed.closed.is_set()


async def test_time_limits_of_the_content_are_its_own() -> None:
    """PEP 789: a heartbeat that blocks is not hit by a limit that the content has around its wait."""
    passed, limit = anyio.Event(), anyio.CancelScope()

    async def content() -> Events:
        yield "1"
        with limit:
            await anyio.sleep_forever()
        passed.set()
        yield "2"
        yield StopAsyncIteration

    def beat() -> bytes:
        limit.deadline = anyio.current_time() + 0.05
        return b": ping\n\n"

    response = SSEResponse(content(), heartbeat=0.05, ping_message_factory=beat)
    # The next heartbeat blocks.
    async with opened(response, stall=after_event("1"), resume=when(passed)) as visit:
        await visit.until(after(b": ping", b"data: 2"))
        assert visit.body.index(b": ping") < visit.body.index(b"data: 2")


async def test_a_content_that_a_client_is_too_slow_for_ends_as_stalled() -> None:
    """C18: a broker's subscriber with ``slow="end"``. The connection is cut; an ``EventSource`` comes back."""
    notes = Notes()

    async def content() -> Events:
        yield "1"
        raise Stalled("more than 2 events wait for a subscriber")

    await visited(SSEResponse(content(), on_disconnect=notes.on_disconnect), "error: .*complete")
    assert notes[0].cause == "stalled"


async def test_a_heartbeat_that_cannot_be_written_is_a_stalled_client() -> None:
    """C18."""
    notes = Notes()
    feed = Feed("1")
    response = SSEResponse(feed.events(), heartbeat=0.05, send_timeout=0.5, on_disconnect=notes.on_disconnect)
    await visited(response, stall=after_event("1"))
    assert notes[0].cause == "stalled"
    assert feed.closed.is_set()


async def test_a_client_that_leaves_during_a_heartbeat() -> None:
    """On a server whose `send` raises."""
    notes = Notes()
    feed = Feed("1")
    response = SSEResponse(feed.events(), heartbeat=0.05, on_disconnect=notes.on_disconnect)
    async with opened(response, server="asgi", stall=after_event("1")) as visit:
        await visit.until(when(lambda: visit.sending == 2))
        visit.leave()
    assert notes[0].cause == "disconnect"


async def test_an_error_of_send_aside_comes_out() -> None:
    """Of a middleware, say. It ends the stream at once, however long the content waits."""

    feed = Feed("1")

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_no_ping(message: Message) -> None:
            if b"ping" in message.get("body", b""):
                raise ZeroDivisionError
            await send(message)

        await SSEResponse(feed.events(), heartbeat=0.05, farewell="never")(scope, receive, send_no_ping)

    visit = await visited(middleware, "error: ZeroDivisionError")
    assert feed.closed.is_set()
    assert b"never" not in visit.body


async def test_one_at_a_time_sends() -> None:
    """Content that goes on and waits again while a helper sends; what it yielded is not left behind."""
    seen = anyio.Event()

    async def content() -> Events:
        yield "1"
        yield "2"
        visit.stall()
        await anyio.sleep(0.02)  # "2" goes out aside, and blocks
        yield None
        yield "3"
        seen.set()
        await anyio.sleep_forever()

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        sending = anyio.ResourceGuard("sending")

        async def send_alone(message: Message) -> None:
            with sending:
                await send(message)

        await SSEResponse(content())(scope, receive, send_alone)

    async with opened(middleware) as visit:
        await seen.wait()
        await anyio.sleep(0.01)
        visit.resume()
        await visit.until(after_event("3"))
        visit.leave()
    assert visit.body == b"data: 1\r\n\r\ndata: 2\r\n\r\ndata: 3\r\n\r\n"


@pytest.mark.parametrize("policy", [CancelPolicy(causes={"disconnect"}), CancelPolicy(grace=20)])
async def test_an_error_aside_ends_the_stream_whatever_the_policy(policy: CancelPolicy) -> None:
    def factory() -> Any:
        raise ZeroDivisionError

    feed = Feed("1")
    options: dict[str, Any] = {"heartbeat": 0.05, "ping_message_factory": factory, "policy": policy}
    await sent_by(feed.events(), "error: ZeroDivisionError", **options)
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
        async with opened(SSEResponse(feed.events())) as visit:
            await visit.until(after_event("1"))
            await feed.waiting.wait()
            feed.put(StopAsyncIteration)
        loop = asyncio.get_running_loop()
        assert loop in _hearts
        return weakref.ref(loop)

    with ThreadPoolExecutor(1) as thread:  # the client keeps it as long as the thread is there
        ended = thread.submit(asyncio.run, stream()).result()
    gc.collect()
    assert ended() is None


async def test_the_heart_keeps_no_stream_s_context() -> None:
    """It may beat for days, and would hand that of the first stream on from beat to beat."""
    name: ContextVar[str] = ContextVar("name")
    seen: list[str | None] = []

    def look(now: float) -> float:
        seen.append(name.get(None))
        return now

    name.set("a stream's")
    pulse = current_heart().add(look, 0)
    with anyio.fail_after(5):
        while len(seen) < 2:
            await anyio.sleep(0.001)
    pulse.stop()
    assert set(seen) == {None}


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_one_heart_on_trio() -> None:
    """It is no request's own, so the first to ask for it may end, and it sleeps when nobody needs it."""
    first, second = Feed("1"), Feed("2")
    before = trio.lowlevel.current_statistics().tasks_living
    async with opened(SSEResponse(second.events(), heartbeat=0.05)) as lasting:
        async with opened(SSEResponse(first.events(), heartbeat=0.05)) as brief:
            await brief.until(when(lambda: b": ping" in brief.body))
            (heart,) = [heart for key, heart in _hearts.items() if key is trio.lowlevel.current_trio_token()]
            assert len(heart._due) == 3  # theirs, and the look at the listening sockets
            first.put(StopAsyncIteration)
        heard = lasting.body.count(b": ping")
        await lasting.until(when(lambda: lasting.body.count(b": ping") > heard + 1))
        second.put(StopAsyncIteration)
    with anyio.fail_after(5):
        while trio.lowlevel.current_statistics().tasks_living > before:
            await anyio.sleep(0)


# -- ends ----------------------------------------------------------------------------------------


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
    visit = await visited(response, leave=after_event("c"))
    message, info, last = notes
    assert message == {"type": "http.disconnect"}
    assert last == "cleanup"
    assert (info.cause, info.events, info.bytes, info.last_id) == ("disconnect", 3, len(visit.body), "2")
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
    await visited(response)
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
    await visited(response, "logged", leave=after_event("1"))
    assert notes == ["cleanup"]
    assert len([record for record in caplog.records if record.exc_info]) == 2


async def test_hooks_when_the_client_left_before_the_response() -> None:
    """stemdeckapp/stemdeck#513: the generator never started."""
    notes = Notes()
    app = FastAPI()
    app.router.route_class = CancellableRoute

    @app.get("/")
    async def endpoint(request: Request) -> FastAPIResponse:
        response = SSEResponse(words("never"), on_disconnect=notes.on_disconnect, cleanup=notes.cleanup)
        assert (await request.receive())["type"] == "http.request"
        visit.leave()
        with anyio.CancelScope(shield=True):
            assert (await request.receive())["type"] == "http.disconnect"
        return response

    async with opened(app) as visit:
        pass
    info, last = notes
    assert (info.cause, info.events, info.bytes, info.last_id) == ("disconnect", 0, 0, None)
    assert last == "cleanup"
    assert visit.status is None


async def test_head_opens_no_stream() -> None:
    """sysid/sse-starlette#218: the headers of GET, the background task, the cleanup; no content, no sender."""
    notes = Notes()
    begun: list[str] = []

    async def content() -> Events:
        begun.append("content")
        yield "never"

    async def sender() -> None:
        begun.append("sender")

    response = SSEResponse(
        content(),
        cleanup=notes.cleanup,
        data_sender_callable=sender,
        background=BackgroundTask(notes.append, "background"),
    )
    visit = await visited(response, method="HEAD")
    assert begun == []
    assert visit.completed
    assert visit.body == b""
    assert visit.headers["content-type"] == "text/event-stream; charset=utf-8"
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

    async with opened(app) as visit:
        await visit.until(after(b"data: 1", b": ping"))
        visit.leave()
        await anyio.sleep(0.1)
        feed.put("2", "3", StopAsyncIteration)
        await finished.wait()
    assert b"data: 3" not in visit.body


async def test_the_policy_limits_the_time() -> None:
    """Cause `timeout`: the client is still there, so it gets the farewell and a proper end."""
    notes = Notes()
    feed = Feed("1")
    response = SSEResponse(
        feed.events(),
        farewell=lambda info: {"event": "bye", "data": info.cause},
        policy=CancelPolicy(timeout=0.05),
        on_disconnect=notes.on_disconnect,
    )
    visit = await visited(response)
    assert visit.body == b"data: 1\r\n\r\nevent: bye\r\ndata: timeout\r\n\r\n"
    assert visit.completed
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
    async with opened(response) as visit:
        await visit.until(after_event("1"))
        if cause == "disconnect":
            visit.leave()
        elif cause == "shutdown":
            drain()
    assert notes == ["cleanup", "background"]


async def test_a_finished_response_does_not_cancel_its_background_task() -> None:
    """C5, ITISFoundation/osparc-simcore#7279: the client has its answer and leaves."""
    finished: list[str] = []

    async def background() -> None:
        visit.leave()
        await anyio.sleep(0.05)
        finished.append("background")

    async with opened(SSEResponse(words("1"), background=BackgroundTask(background))) as visit:
        pass
    assert finished == ["background"]


@pytest.mark.parametrize("stands_at", ["await", "yield"])
async def test_content_that_holds_a_scope_across_its_yield(stands_at: str) -> None:
    """C11, unslothai/unsloth#6577: closed by another task it would "exit cancel scope in a different task"."""

    async def content() -> Events:
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep_forever)
            try:
                yield "1"
                if stands_at == "yield":
                    visit.stall()
                yield "2"
                await anyio.sleep_forever()
            finally:
                group.cancel_scope.cancel()

    async with opened(SSEResponse(content())) as visit:
        await anyio.sleep(0.05)
        visit.leave()


async def test_an_error_of_the_content_outlives_the_client() -> None:
    """It came first: it is not to vanish because the client left while the events before it went out."""
    raised = anyio.Event()

    async def content() -> Events:
        yield "1"
        yield "2"
        visit.stall()
        await anyio.sleep(0.02)
        raised.set()
        raise ZeroDivisionError

    async with opened(SSEResponse(content()), "error: ZeroDivisionError", leave=when(raised)) as visit:
        pass


async def test_an_error_of_the_content_after_the_client_left() -> None:
    """In its grace. What it yielded cannot be sent any more."""

    async def content() -> Events:
        yield "1"
        while visit.left is None:
            await anyio.sleep(0.001)
        await anyio.sleep(0.01)
        raise ZeroDivisionError

    response = SSEResponse(content(), policy=CancelPolicy(grace=60))
    async with opened(response, "error: ZeroDivisionError", leave=after_event("1")) as visit:
        pass


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_servers_cancellation_goes_before_an_error_of_the_content() -> None:
    """C14."""
    running: Any = None

    async def content() -> Events:
        nonlocal running
        running = asyncio.current_task()
        yield "1"
        yield "2"
        raise ZeroDivisionError

    async with opened(SSEResponse(content()), stall=after_start()) as visit:
        await visit.until(when(lambda: visit.sending))
        running.cancel()
    assert isinstance(visit.error, asyncio.CancelledError)


async def test_no_heartbeat_after_the_farewell() -> None:
    async def content() -> Events:
        try:
            yield "1"
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):  # for Trio
                await anyio.sleep(0.2)

    visit = await drained(SSEResponse(content(), heartbeat=0.05, farewell="bye"))
    assert visit.body.endswith(b"data: bye\r\n\r\n")


async def test_a_client_that_leaves_ends_the_grace() -> None:
    """Whoever the grace was for has gone."""
    feed = Feed("1")
    async with opened(SSEResponse(feed.events(), shutdown_grace_period=60)) as visit:
        await visit.until(after_event("1"))
        drain()
        visit.leave()
    assert feed.closed.is_set()


# -- draining ------------------------------------------------------------------------------------


async def drained(
    response: SSEResponse, *faults: str, text: bytes = b"data: 1", meanwhile: Callable[[], object] = int
) -> Visit:
    """What is sent in all if the server is told to stop after ``text``."""
    async with opened(response, *faults) as visit:
        await visit.until(after(text))
        assert drain() == 1
        meanwhile()
    assert drain() == 0
    return visit


async def test_farewell() -> None:
    """C22."""
    notes = Notes()
    feed = Feed("1")
    visit = await drained(SSEResponse(feed.events(), farewell="bye", retry=5, on_disconnect=notes.on_disconnect))
    assert visit.body == b"retry: 5\r\n\r\ndata: 1\r\n\r\nretry: 5\r\n\r\ndata: bye\r\n\r\n"
    assert visit.completed
    assert feed.closed.is_set()
    assert notes[0].cause == "shutdown"


async def test_no_farewell() -> None:
    feed = Feed("1")
    visit = await drained(SSEResponse(feed.events()))
    assert visit.body == b"data: 1\r\n\r\n"
    assert visit.completed


async def test_the_farewell_is_said_before_a_slow_cleanup() -> None:
    said = anyio.Event()

    async def content() -> Events:
        try:
            yield "1"
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):  # for Trio
                await said.wait()

    async with opened(SSEResponse(content(), farewell="bye")) as visit:
        await visit.until(after_event("1"))
        drain()
        await visit.until(after_event("bye"))
        assert not visit.over
        said.set()
    assert visit.body.count(b"bye") == 1


async def test_the_farewell_is_said_to_content_that_never_waits() -> None:
    async def content() -> Events:
        while True:
            yield "x"

    visit = await drained(SSEResponse(content(), farewell="bye"), text=b"x")
    assert visit.body.endswith(b"data: x\r\n\r\ndata: bye\r\n\r\n")
    assert visit.body.count(b"bye") == 1
    assert visit.completed


async def test_no_farewell_inside_an_event() -> None:
    feed = Feed(b"data: 1")
    visit = await drained(SSEResponse(feed.events(), farewell="bye"))
    assert visit.body == b"data: 1"
    assert visit.completed


async def test_a_farewell_that_cannot_be_made_is_logged() -> None:
    def farewell(info: StreamInfo) -> Any:
        raise ZeroDivisionError

    visit = await drained(SSEResponse(Feed("1").events(), farewell=farewell), "logged: .*ZeroDivisionError")
    assert visit.completed


async def test_a_client_that_does_not_read_does_not_hold_up_the_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastapi_cancel._parting.LOOKS", 1)
    feed = Feed("1")
    async with opened(SSEResponse(feed.events(), farewell="bye"), stall=after_event("1")) as visit:
        await visit.until(after_event("1"))
        feed.put("2")
        await visit.until(when(lambda: visit.sending == 2))
        drain()
    assert b"bye" not in visit.body
    assert feed.closed.is_set()


async def test_a_busy_event_loop_does_not_take_the_farewell() -> None:
    """A thousand streams may end at once: that is not a client that does not read."""
    response = SSEResponse(Feed("1").events(), farewell="bye")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def write(message: Message) -> None:
            if b"bye" in message.get("body", b""):
                for _ in range(8):
                    sleep(0.15)
                    await anyio.sleep(0)
            await send(message)

        await response(scope, receive, write)

    async with opened(app) as visit:
        await visit.until(after_event("1"))
        drain()
    assert visit.body.endswith(b"data: bye\r\n\r\n")
    assert visit.completed


async def test_content_that_watches_the_event_ends_by_itself() -> None:
    """sysid/sse-starlette#167."""
    event = anyio.Event()

    async def content() -> Events:
        yield "1"
        await event.wait()
        await anyio.sleep(0.01)
        yield "2"

    response = SSEResponse(content(), shutdown_event=event, shutdown_grace_period=10, farewell="bye")
    visit = await drained(response)
    assert visit.body == b"data: 1\r\n\r\ndata: 2\r\n\r\ndata: bye\r\n\r\n"


async def test_the_grace_has_an_end() -> None:
    feed = Feed("1")
    visit = await drained(
        SSEResponse(feed.events(), shutdown_grace_period=0.05, farewell="bye"), meanwhile=lambda: feed.put("2")
    )
    assert visit.body == b"data: 1\r\n\r\ndata: 2\r\n\r\ndata: bye\r\n\r\n"
    assert feed.closed.is_set()


async def test_a_policy_may_leave_out_the_shutdown() -> None:
    """sysid/sse-starlette#157."""
    feed = Feed("1")
    response = SSEResponse(
        feed.events(), farewell="never", shutdown_grace_period=0.01, policy=CancelPolicy(causes={"disconnect"})
    )
    visit = await drained(response, meanwhile=lambda: feed.put("2", StopAsyncIteration))
    assert visit.body == b"data: 1\r\n\r\ndata: 2\r\n\r\n"


async def test_draining_as_sse_starlette_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its `AppStatus.should_exit`, set while a stream is open."""
    monkeypatch.setattr(AppStatus, "should_exit", False)
    feed = Feed("1")
    async with opened(SSEResponse(feed.events(), farewell="bye")) as visit:
        await visit.until(after_event("1"))
        AppStatus.should_exit = True
    assert visit.body == b"data: 1\r\n\r\ndata: bye\r\n\r\n"
    # Nobody resets it. It says nothing about streams that come later: sysid/sse-starlette#211.
    feed = Feed("1")
    async with opened(SSEResponse(feed.events(), farewell="never")) as visit:
        await visit.until(after_event("1"))
        await anyio.sleep(2 * shutdown.LOOK)
        feed.put(StopAsyncIteration)
    assert visit.body == b"data: 1\r\n\r\n"


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

    visit = await sent_by(receive, data_sender_callable=sender)
    receive.close()
    assert visit.body == b"data: 1\r\n\r\ndata: 2\r\n\r\n"
    assert ended == ["sender"]


async def test_a_sender_may_end_before_the_stream() -> None:
    feed = Feed()

    async def sender() -> None:
        feed.put("1")

    async with opened(SSEResponse(feed.events(), data_sender_callable=sender)) as visit:
        await visit.until(after_event("1"))
        feed.put("2", StopAsyncIteration)
    assert visit.body == b"data: 1\r\n\r\ndata: 2\r\n\r\n"


async def test_a_sender_that_fails_ends_the_stream() -> None:
    """The error is bare, not in a group."""

    async def sender() -> None:
        await anyio.sleep(0.01)
        raise ZeroDivisionError

    feed = Feed("1")
    await sent_by(feed.events(), "error: ZeroDivisionError", data_sender_callable=sender)
    assert feed.closed.is_set()


async def test_a_sender_that_fails_at_the_end_is_logged() -> None:
    feed = Feed("1")

    async def sender() -> None:
        try:
            feed.put(StopAsyncIteration)
            await anyio.sleep_forever()
        finally:
            raise ZeroDivisionError

    assert (await sent_by(feed.events(), "logged: .*ZeroDivisionError", data_sender_callable=sender)).completed


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

    await sent_by(content(), "error: ZeroDivisionError", data_sender_callable=sender)
    assert cleaned == ["content"]


async def test_a_sender_that_is_not_wanted_before_it_begins() -> None:
    """On Trio this hung for ever."""
    response = SSEResponse(Feed("1").events(), data_sender_callable=anyio.sleep_forever)
    async with opened(response, leave=before_body()):
        while response._ladder is None:
            await anyio.sleep(0)
        response._ladder.signal("stop")


async def test_a_stream_that_is_closed_while_it_waits() -> None:
    """By whoever drives the coroutine, as Python does with one that nobody wants any more."""
    feed = Feed("1")
    running = Ahead(feed.events())
    assert running.poll()
    assert not running.poll()
    waiting: Any = running.wait()
    waiting.send(None)
    waiting.close()
    assert feed.closed.is_set()


async def test_a_sender_that_is_never_begun() -> None:
    """The stream is over before it could."""

    async def sender() -> None: ...

    assert (await sent_by(words("1"), data_sender_callable=sender)).completed


# -- what a second review found ------------------------------------------------------------------


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_a_sender_that_is_cancelled_before_it_begins() -> None:
    """From outside: the shielded wait for its end must not be for ever."""

    async def cancelling(scope: Scope, receive: Receive, send: Send) -> None:
        async def cancel(message: Message) -> None:
            outside.cancel()

        with anyio.CancelScope() as outside:
            await SSEResponse(Feed("1").events(), data_sender_callable=anyio.sleep_forever)(scope, receive, cancel)

    await visited(cancelling, "error: .*complete")


async def test_a_background_task_runs_once_for_nobody() -> None:
    """The client has left, the policy lets the stream go on."""
    notes = Notes()
    feed = Feed("1")
    response = SSEResponse(
        feed.events(),
        policy=CancelPolicy(causes={"shutdown"}),
        background=BackgroundTask(notes.append, "background"),
        heartbeat=0.05,
    )
    async with opened(response) as visit:
        await visit.until(after_event("1"))
        visit.leave()
        await anyio.sleep(0.1)
        feed.put(StopAsyncIteration)
    assert notes == ["background"]


async def test_an_error_of_the_sender_while_the_last_events_go_out() -> None:

    ready = anyio.Event()

    async def sender() -> None:
        await ready.wait()
        await anyio.sleep(0.02)
        raise ZeroDivisionError

    async def content() -> Events:
        yield "1"
        await anyio.sleep(0.02)
        visit.stall()
        ready.set()
        yield "2"

    async with opened(SSEResponse(content(), data_sender_callable=sender), "error: ZeroDivisionError") as visit:
        pass


async def test_an_error_of_the_sender_while_the_stream_parts() -> None:
    """The client gets its end; the error is not lost."""

    async def sender() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise ZeroDivisionError

    response = SSEResponse(Feed("1").events(), data_sender_callable=sender, farewell="bye")
    async with opened(response, "error: ZeroDivisionError") as visit:
        await visit.until(after_event("1"))
        await anyio.sleep(0.02)
        drain()


async def test_the_shutdowns_grace_is_the_senders_too() -> None:
    """One that feeds the content goes on for as long as that does."""
    send, receive = anyio.create_memory_object_stream[str]()

    async def sender() -> None:
        async with send:
            await send.send("1")
            await anyio.sleep(0.1)
            await send.send("2")

    response = SSEResponse(receive, data_sender_callable=sender, shutdown_grace_period=10, farewell="bye")
    visit = await drained(response)
    assert visit.body == b"data: 1\r\n\r\ndata: 2\r\n\r\ndata: bye\r\n\r\n"


async def test_a_finished_stream_does_not_wait_for_its_senders_grace() -> None:
    await sent_by(words("1"), data_sender_callable=anyio.sleep_forever, policy=CancelPolicy(grace=60))


async def test_what_is_made_aside_is_made_for_its_own_request() -> None:
    """A tenant in a context variable, say: not that of whoever asks for the heartbeat, or drains."""
    tenant: ContextVar[str] = ContextVar("tenant", default="nobody")

    def tenants(name: str) -> ASGIApp:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            tenant.set(name)
            await SSEResponse(
                Feed(name).events(),
                heartbeat=0.05,
                ping_message_factory=lambda: {"comment": tenant.get()},
                farewell=lambda info: f"bye {tenant.get()}",
            )(scope, receive, send)

        return app

    async with opened(tenants("ada")) as ada, opened(tenants("bob")) as bob:
        await ada.until(after(b": ada\r\n"))
        await bob.until(after(b": bob\r\n"))
        drain()
    assert ada.body.endswith(b"data: bye ada\r\n\r\n")
    assert bob.body.endswith(b"data: bye bob\r\n\r\n")


async def test_a_forced_content_still_ends_its_response() -> None:
    async def content() -> Events:
        try:
            while True:
                yield "x"
        finally:
            await anyio.sleep_forever()

    policy = CancelPolicy(timeout=0.05, cleanup_timeout=0.1)
    faults = ["logged", "cleanup killed"] if sniffio.current_async_library() == "asyncio" else []
    visit = await sent_by(content(), *faults, farewell="bye", policy=policy)
    assert visit.body.endswith(b"data: bye\r\n\r\n")
    assert visit.completed


async def test_a_client_that_leaves_in_the_grace_of_a_server_that_raises() -> None:
    """C13."""
    response = SSEResponse(Feed("1").events(), shutdown_grace_period=60)
    async with opened(response, server="asgi") as visit:
        await visit.until(after_event("1"))
        drain()
        visit.leave()


async def test_a_response_is_for_one_request() -> None:
    response = SSEResponse(["1"])
    await visited(response)
    await visited(response, "error: RuntimeError.*for one request")


async def test_an_iterator_that_ends_before_it_is_awaited() -> None:
    class Empty:
        def __aiter__(self) -> Empty:
            return self

        def __anext__(self) -> Any:
            raise StopAsyncIteration

    assert (await sent_by(Empty())).completed


async def test_raising_the_token_is_the_one_interruption() -> None:
    """C7: the cleanup after it is left alone."""
    app = FastAPI()
    app.router.route_class = CancellableRoute
    cleaned = anyio.Event()

    @app.get("/")
    @cancel_policy(grace=0.05)
    async def endpoint(token: Token) -> None:
        visit.leave()
        await token.wait()
        try:
            token.raise_if_set()
        finally:
            with anyio.CancelScope(shield=sniffio.current_async_library() == "trio"):
                await anyio.sleep(0.1)
            cleaned.set()

    async with opened(app) as visit:
        pass
    assert cleaned.is_set()


async def test_a_sender_that_begins_when_all_is_over() -> None:
    """It does not, unless Python can start a task at once: then it begins before."""
    notes = Notes()

    async def sender() -> None:
        notes.append("sender")

    await sent_by(words("1"), data_sender_callable=sender, cleanup=notes.cleanup)
    eager = sys.version_info >= (3, 12) and sniffio.current_async_library() == "asyncio"
    assert notes == (["sender"] if eager else []) + ["cleanup"]


async def test_two_errors() -> None:
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

    faults = ("error: ZeroDivisionError", "logged: .*LookupError")
    await sent_by(content(), *faults, data_sender_callable=sender)
