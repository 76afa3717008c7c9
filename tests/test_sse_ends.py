"""How an event stream ends: what a server's cancellation meets, who is told, what is left. In process."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import anyio
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Scope

from fastapi_cancel import CancelPolicy, SSEResponse, drain
from fastapi_cancel._event_stream import EventStream
from fastapi_cancel._scoped import GroupLadder
from fastapi_cancel.sse import HEARING
from fastapi_cancel.testing import after_chunks, after_event, when

from .test_sse import Events, Feed, Notes, drained, opened, visited

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("around", [nullcontext, anyio.CancelScope])
@pytest.mark.parametrize("first", ["cancellation", "error"])
async def test_the_servers_cancellation_goes_before_an_error_of_the_sender(
    first: str, around: Callable[[], Any]
) -> None:
    """C14: in whatever order they come, in one turn of the event loop. The error is logged."""
    feed = Feed("1")
    running: Any = None

    async def sender() -> None:
        await feed.waiting.wait()
        if first == "cancellation":
            running.cancel()
        else:
            asyncio.get_running_loop().call_soon(running.cancel)
        raise ZeroDivisionError

    async def app(*request: Any) -> None:
        nonlocal running
        running = asyncio.current_task()
        with around():
            await SSEResponse(feed.events(), data_sender_callable=sender)(*request)

    visit = await visited(app, "logged: .*ZeroDivisionError")
    assert isinstance(visit.error, asyncio.CancelledError)
    assert feed.closed.is_set()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize(("cancels", "error"), [(True, asyncio.CancelledError), (False, ZeroDivisionError)])
async def test_an_error_of_the_content_before_a_cause(cancels: bool, error: type[BaseException]) -> None:
    """While what the content yielded before its error goes out, the stream is stopped: that does not hide the error.
    A server that cancels does (C14)."""
    running: Any = None

    async def content() -> Events:
        nonlocal running
        running = asyncio.current_task()
        yield "1"
        yield "2"
        visit.stall()
        raise ZeroDivisionError

    response = SSEResponse(content())
    async with opened(response, *[] if cancels else ["error: ZeroDivisionError"]) as visit:
        await visit.until(when(lambda: visit.sending))
        assert response._ladder is not None
        response._ladder.signal("stop", at_once=True)
        if cancels:
            running.cancel()
    assert isinstance(visit.error, error)


@pytest.mark.parametrize("policy", [CancelPolicy(grace=60), CancelPolicy(causes={"timeout"})])
async def test_the_close_handler_is_for_every_client_that_leaves(policy: CancelPolicy) -> None:
    """In the grace of a shutdown, and also if the stream goes on to its end for nobody."""
    notes = Notes()
    feed = Feed("1")
    response = SSEResponse(feed.events(), client_close_handler_callable=notes.client_close, policy=policy)
    async with opened(response) as visit:
        await visit.until(after_event("1"))
        assert drain() == 1
        visit.leave()
        await visit.until(when(lambda: visit.heard))
        feed.put(StopAsyncIteration)
    assert notes == [{"type": "http.disconnect"}]
    await response.aclose()
    assert len(notes) == 1


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("layers", [1, 5])
@pytest.mark.parametrize("chunks", range(1, 6))
async def test_who_is_told_if_a_middleware_hears_first_that_the_client_has_left(layers: int, chunks: int) -> None:
    """Its ``send`` raises, on a server as ASGI 2.4 describes it; so it cancels us before our ``receive`` tells."""
    notes = Notes()

    async def burst() -> Events:
        while True:
            yield "again"

    async def endpoint(request: Request) -> Response:
        return SSEResponse(burst(), on_disconnect=notes.on_disconnect, client_close_handler_callable=notes.client_close)

    async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)

    around = [Middleware(BaseHTTPMiddleware, dispatch=pass_on)] * layers
    app = Starlette(routes=[Route("/", endpoint)], middleware=around)
    await visited(app, server="asgi", leave=after_chunks(chunks))
    closed, info = notes
    assert closed == {"type": "http.disconnect"}
    assert info.cause == "disconnect"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # on Trio the news ends with the stream
@pytest.mark.parametrize("leaves", [True, False])
async def test_who_is_told_if_the_event_loop_stands_still_until_then(leaves: bool) -> None:
    """It is cancelled first, and the time to hear why has passed when the loop turns again."""
    notes, began, news = Notes(), anyio.Event(), anyio.Event()

    async def receive() -> Message:
        await news.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message.get("body"):
            began.set()

    async def hear_late() -> None:
        await began.wait()
        cancelled.cancel()
        await turns()
        time.sleep(2 * HEARING)
        await turns()  # through the layers of middleware
        if leaves:
            news.set()

    async def turns() -> None:
        for _ in range(9):
            await anyio.sleep(0)

    response = SSEResponse(Feed("1").events(), on_disconnect=notes.on_disconnect)
    async with anyio.create_task_group() as group:
        group.start_soon(hear_late)
        with anyio.CancelScope() as cancelled:
            await response({"type": "http", "method": "GET", "path": "/", "headers": []}, receive, send)
    assert [info.cause for info in notes] == ["disconnect"] * leaves


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_second_cancellation_while_we_wait_to_hear_why_there_was_one() -> None:
    """C14: it goes through at once, and the cleanups run."""
    notes, began, cleaning = Notes(), anyio.Event(), list[str]()

    async def receive() -> Message:
        await anyio.sleep_forever()
        raise AssertionError

    async def send(message: Message) -> None:
        if message.get("body"):
            began.set()

    async def clean() -> None:
        cleaning.append("begun")
        await anyio.sleep(0.001)
        cleaning.append("ended")

    feed = Feed("1")
    response = SSEResponse(feed.events(), on_disconnect=notes.on_disconnect, cleanup=clean)
    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    serving = asyncio.ensure_future(response(scope, receive, send))
    await began.wait()
    for expected in [], ["begun"]:
        serving.cancel()
        for _ in range(9):
            await anyio.sleep(0)
        assert cleaning[:1] == expected
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert feed.closed.is_set()
    assert cleaning == ["begun", "ended"]
    assert notes == []


async def test_the_close_handler_is_not_for_a_client_that_stays() -> None:
    notes = Notes()
    await drained(SSEResponse(Feed("1").events(), client_close_handler_callable=notes.client_close))
    assert notes == []


async def test_events_that_are_ready_may_go_out_one_by_one() -> None:
    """Each is sent before the generator goes on, after a wait as well as in a burst."""
    sent: list[bytes] = []

    async def content() -> Events:
        for number in range(6):
            if number == 3:
                await anyio.sleep(0.001)
            yield number
            sent.append(visit.chunks[-1])

    async with opened(SSEResponse(content(), batch=False)) as visit:
        pass
    assert sent == visit.chunks == [b"data: %d\r\n\r\n" % number for number in range(6)]


@pytest.mark.parametrize("sender", [False, True])
@pytest.mark.parametrize("end", ["finish", "leave", "drain", "leave_before_start"])
async def test_an_event_stream_leaves_no_reference_cycle(end: str, sender: bool) -> None:
    """It is freed at its end, not when the garbage collector comes."""
    finish, left, freed = anyio.Event(), anyio.Event(), anyio.Event()
    ends = {"finish": finish.set, "leave": left.set, "drain": drain}
    body = bytearray()

    async def content() -> Events:
        yield "1"
        await finish.wait()

    async def receive() -> Message:
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if end == "leave_before_start":
            raise OSError
        body.extend(message.get("body", b""))
        if b"data: 1" in body and b": ping" in body:
            ends[end]()

    async def run() -> None:  # without the kit, which keeps what it looks at
        response = SSEResponse(content(), heartbeat=0.01, data_sender_callable=anyio.sleep_forever if sender else None)
        weakref.finalize(response, freed.set)
        await response({"type": "http", "method": "GET", "path": "/", "headers": []}, receive, send)

    gc.collect()
    gc.disable()
    try:
        with anyio.fail_after(5):
            await run()
            await freed.wait()
    finally:
        gc.enable()


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_a_helper_that_begins_when_the_stream_has_been_let_go_of_sends_nothing() -> None:
    """It is on its way for a turn or two. The stream holds neither its content nor the channel any more."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    stream = EventStream(SSEResponse(Feed().events()), GroupLadder(CancelPolicy(), scope), send)
    stream.let_go()
    await stream._aside((b"data: 1\r\n\r\n", 1, None))
    assert sent == []
    assert stream.info.events == 0


async def test_a_heartbeat_that_begins_when_all_is_over() -> None:
    """Made while the client leaves, to be sent two turns later: the cleanup is running by then."""

    def beat() -> str:
        assert response._ladder is not None
        response._ladder.signal("disconnect")
        return "beat"

    async def cleanup() -> None:
        await anyio.sleep(0.01)

    response = SSEResponse(Feed("1").events(), heartbeat=0.01, ping_message_factory=beat, cleanup=cleanup)
    visit = await visited(response, "error: .*complete")
    assert visit.body == b"data: 1\r\n\r\n"
