"""Code as people write it, with a fault in it, and beside it the same work without: the kit tells them apart.

In process, with the habits of the server on which the fault shows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import anyio
import pytest
import redis.asyncio as redis
from fastapi import APIRouter, BackgroundTasks, FastAPI, Request
from fastapi.sse import EventSourceResponse as NativeEventSourceResponse
from fastapi.sse import ServerSentEvent
from sse_starlette import EventSourceResponse
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_cancel import CancellableRoute, CancellableStreamingResponse, SSEResponse
from fastapi_cancel.testing import Fault, LeavingClient, Moment, Patience, Visit, after_body, after_chunks, at_wait

from .redis_server import RedisServer

pytestmark = pytest.mark.anyio
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])

logger = logging.getLogger("shop")

plain = APIRouter()
cancellable = APIRouter(prefix="/cancellable", route_class=CancellableRoute)


def only(visit: Visit, kind: str) -> Fault:
    """The one fault that the visit has."""
    assert [fault.kind for fault in visit.faults] == [kind], "\n".join(map(str, visit.faults))
    return visit.faults[0]


def waiting_in(function: str, chunks: int = 0) -> Moment:
    return Moment(
        f"waiting in {function}",
        lambda visit: len(visit.chunks) >= chunks and visit.where.endswith(f" in {function}"),
    )


def serving(*routers: APIRouter) -> FastAPI:
    app = FastAPI()
    for router in routers:
        app.include_router(router)
    return app


# -- a handler that goes on ------------------------------------------------------------------


@plain.get("/report")
@cancellable.get("/report")
async def report() -> str:
    pages = []
    for number in range(1000):
        await anyio.sleep(0.01)  # a query
        pages.append(f"page {number}")
    return "\n".join(pages)


@plain.get("/patient-report")
@cancellable.get("/patient-report")
async def patient_report() -> str:
    """Its own timeouts are no news of its client."""
    with anyio.move_on_after(10):
        while True:
            with anyio.move_on_after(0.01):
                await anyio.Event().wait()
    return "too late"


@plain.get("/polling-report")
@cancellable.get("/polling-report")
async def polling_report(request: Request) -> str:
    pages: list[str] = []
    while len(pages) < 1000 and not await request.is_disconnected():
        await anyio.sleep(0.01)
        pages.append("page")
    return "\n".join(pages)


@cancellable.get("/stubborn")
async def stubborn() -> str:
    """Tries again, whatever it was that went wrong."""
    for _ in range(60):
        try:
            await anyio.sleep(0.03)
        except BaseException:
            logger.debug("once more")
    return "at last"


class Timed(BaseHTTPMiddleware):
    """As almost every application has one."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)


@pytest.mark.parametrize("function", ["report", "patient_report"])
@pytest.mark.parametrize("server", ["uvicorn", "gunicorn", "hypercorn", "granian", "daphne", "asgi"])
async def test_a_handler_that_goes_on(server: str, function: str) -> None:
    path = f"/{function.replace('_', '-')}"
    client = LeavingClient(serving(plain, cancellable), server=server)
    visit = await client.get(path, leave=at_wait(2))
    fault = only(visit, "went on")
    assert fault.text.startswith("nobody told it that its client had left, at\n")
    assert fault.text.endswith(f" in {function}")

    visit = await client.get(f"/cancellable{path}", leave=at_wait(2))
    visit.assert_clean()
    assert visit.cause == "disconnect"


async def test_a_poll_that_no_message_reaches() -> None:
    """FastAPI discussion 8805: behind a BaseHTTPMiddleware, ``is_disconnected`` has nothing to say."""
    client = LeavingClient(Timed(serving(plain, cancellable)), patience=Patience(cleanup=0.3))
    visit = await client.get("/polling-report", leave=at_wait(5))
    assert only(visit, "went on").text.endswith(" in polling_report")

    (await client.get("/cancellable/polling-report", leave=at_wait(5))).assert_clean()
    (await LeavingClient(serving(plain)).get("/polling-report", leave=at_wait(5))).assert_clean()


@on_asyncio
async def test_a_handler_that_swallows_its_cancellation() -> None:
    client = LeavingClient(serving(cancellable), patience=Patience(cleanup=0.3))
    visit = await client.get("/cancellable/stubborn", leave=at_wait(1))
    fault = only(visit, "went on")
    assert "it knew that its client had left" in fault.text
    assert fault.text.endswith(" in stubborn")


# -- a cleanup killed at its first await -----------------------------------------------------

closed: list[str] = []


async def cursor() -> AsyncIterator[str]:
    try:
        for number in range(1000):
            yield f"row {number}\n"
            await anyio.sleep(number)
    finally:
        await anyio.sleep(0.001)  # closing the session
        closed.append("cursor")


async def shielded_cursor() -> AsyncIterator[str]:
    """As Trio asks for it."""
    try:
        for number in range(1000):
            yield f"row {number}\n"
            await anyio.sleep(number)
    finally:
        with anyio.move_on_after(1, shield=True):
            await anyio.sleep(0.001)
            closed.append("cursor")


@plain.get("/export")
async def export() -> Response:
    return StreamingResponse(cursor())


@plain.get("/feed")
async def feed() -> Response:
    return EventSourceResponse(cursor())


@plain.get("/native-feed", response_class=NativeEventSourceResponse)
@cancellable.get("/native-feed", response_class=NativeEventSourceResponse)
async def native_feed() -> AsyncIterator[ServerSentEvent]:
    try:
        for number in range(1000):
            yield ServerSentEvent(data=number)
            await anyio.sleep(number)  # the second wait is one in which there is time to leave
    finally:
        await anyio.sleep(0.001)
        closed.append("native_feed")


@plain.get("/guarded")
async def guarded(request: Request) -> str | None:
    """The handler as it stands in many an answer: a task group that watches the client."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        try:
            await anyio.sleep(1)
        finally:
            await anyio.sleep(0.001)
            closed.append("guarded")
        group.cancel_scope.cancel()
        return "done"
    return None


@cancellable.get("/guarded")
async def unguarded() -> str:
    try:
        await anyio.sleep(1)
    finally:
        await anyio.sleep(0.001)
        closed.append("unguarded")
    return "done"


@cancellable.get("/export")
async def cancellable_export() -> Response:
    return CancellableStreamingResponse(cursor())


@cancellable.get("/feed")
async def cancellable_feed() -> Response:
    return SSEResponse(cursor())


@cancellable.get("/shielded-export")
async def shielded_export() -> Response:
    return CancellableStreamingResponse(shielded_cursor())


@on_asyncio
@pytest.mark.parametrize(
    ("path", "function", "leave"),
    [
        ("/export", "cursor", waiting_in("cursor", chunks=2)),
        ("/feed", "cursor", waiting_in("cursor", chunks=2)),
        ("/native-feed", "native_feed", waiting_in("native_feed", chunks=2)),
        ("/guarded", "guarded", at_wait(2)),
    ],
)
async def test_a_cleanup_killed_at_its_first_await(path: str, function: str, leave: Moment) -> None:
    closed.clear()
    client = LeavingClient(serving(plain, cancellable))
    visit = await client.get(path, leave=leave)
    fault = only(visit, "cleanup killed")
    assert fault.text.startswith("interrupted again while it handled an interruption, at\n")
    assert fault.text.endswith(f" in {function}")
    assert closed == []

    visit = await client.get(f"/cancellable{path}", leave=after_chunks(2) if path != "/guarded" else at_wait(1))
    visit.assert_clean()
    assert len(closed) == 1


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_a_cleanup_killed_on_trio() -> None:
    """Where every cleanup that waits must be shielded, whoever cancels."""
    closed.clear()
    client = LeavingClient(serving(cancellable))
    visit = await client.get("/cancellable/export", leave=waiting_in("cursor", chunks=2))
    assert only(visit, "cleanup killed").text.endswith(" in cursor")
    assert closed == []

    (await client.get("/cancellable/shielded-export", leave=after_chunks(2))).assert_clean()
    assert closed == ["cursor"]


# -- a task that nobody awaits ---------------------------------------------------------------


async def count_visits() -> None:
    await asyncio.sleep(10)


@cancellable.get("/counted")
async def counted() -> str:
    asyncio.create_task(count_visits())  # noqa: RUF006
    return "welcome"


@cancellable.get("/ticking")
async def ticking() -> str:
    """Ends its helper, if it comes that far."""
    ticker = asyncio.create_task(count_visits())
    await asyncio.sleep(1)
    ticker.cancel()
    return "tick"


@cancellable.get("/grouped")
async def grouped() -> str:
    async with asyncio.TaskGroup() as group:
        ticker = group.create_task(count_visits())
        await asyncio.sleep(0.001)
        ticker.cancel()
    return "tick"


@on_asyncio
async def test_a_task_that_nobody_awaits() -> None:
    client = LeavingClient(serving(cancellable))
    for path, function, leave in (("counted", "counted", None), ("ticking", "ticking", at_wait(1))):
        visit = await client.get(f"/cancellable/{path}", leave=leave)
        fault = only(visit, "task left")
        created, waits = fault.text.split("\n  waits at\n")
        assert created.startswith("count_visits, created at\n")
        assert created.endswith(f" in {function}")
        assert " in count_visits" in waits

    (await client.get("/cancellable/grouped", leave=at_wait(1))).assert_clean()
    (await client.get("/cancellable/grouped")).assert_clean()


# -- an unclosed generator -------------------------------------------------------------------


async def rows() -> AsyncGenerator[int]:
    try:
        for number in range(1000):
            yield number
            await anyio.sleep(1)
    finally:
        closed.append("rows")


@cancellable.get("/first-match")
async def first_match(wanted: int) -> int | None:
    async for row in rows():
        if row == wanted:
            return row
    return None


@cancellable.get("/rendered")
async def rendered() -> None:
    """Reads to the end, if it comes that far."""
    async for _ in rows():
        await anyio.sleep(1)  # meanwhile the rows stand at their `yield`


@cancellable.get("/closing")
async def closing() -> None:
    async with aclosing(rows()) as found:
        async for _ in found:
            await anyio.sleep(1)


@pytest.mark.parametrize(
    ("path", "function", "leave"),
    [("first-match?wanted=0", "first_match", None), ("rendered", "rendered", waiting_in("rendered"))],
)
async def test_an_unclosed_generator(path: str, function: str, leave: Moment | None) -> None:
    visit = await LeavingClient(serving(cancellable)).get(f"/cancellable/{path}", leave=leave)
    fault = only(visit, "generator left open")
    iterated, waits = fault.text.split("\n  was left to the garbage collector at\n")
    assert iterated.startswith("rows, first iterated at\n")
    assert iterated.endswith(f" in {function}")
    assert waits.endswith(" in rows")


@pytest.mark.parametrize(("path", "function"), [("closing", "closing"), ("first-match?wanted=9", "rows")])
async def test_a_generator_that_is_closed(path: str, function: str) -> None:
    """By its user, or because it was in its own wait when the cancellation came."""
    closed.clear()
    visit = await LeavingClient(serving(cancellable)).get(f"/cancellable/{path}", leave=waiting_in(function))
    visit.assert_clean()
    assert closed == ["rows"]


# -- a Redis connection not returned ---------------------------------------------------------


class News:
    """An application around a Redis client."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.router = APIRouter()
        self.router.get("/news")(self.news)
        self.router.get("/cancellable/news")(self.cancellable_news)

    async def messages(self) -> AsyncIterator[bytes]:
        subscription = self.client.pubsub()
        try:
            await subscription.subscribe("news")
            await self.client.incr("readers")
            async for message in subscription.listen():
                yield repr(message).encode()
        finally:
            await self.client.decr("readers")
            await subscription.aclose()  # type: ignore[no-untyped-call]

    async def news(self) -> Response:
        return StreamingResponse(self.messages())

    async def cancellable_news(self) -> Response:
        return CancellableStreamingResponse(self.messages())


@on_asyncio
async def test_a_redis_connection_not_returned(redis_server: RedisServer) -> None:
    """agno-agi/agno#7318."""
    async with redis.Redis(port=redis_server.port, max_connections=5) as connected:
        client = LeavingClient(serving(News(connected).router), pools=[connected])
        visit = await client.get("/news", leave=after_chunks(1))
        faults = {fault.kind: fault.text for fault in visit.faults}
        assert faults["not returned"] == "1 of Redis"
        assert faults["cleanup killed"].split("\n")[1].endswith(" in News.messages")

        (await client.get("/cancellable/news", leave=after_chunks(1))).assert_clean()


# -- a background task cancelled by a finished response --------------------------------------

sent: list[str] = []


async def send_receipt() -> None:
    for _ in range(100):  # turns of the event loop, not time
        await anyio.sleep(0)
    sent.append("receipt")


@plain.post("/order")
@cancellable.post("/order")
async def order(background: BackgroundTasks) -> str:
    background.add_task(send_receipt)
    return "ordered"


class CancelOnDisconnect:
    """ITISFoundation/osparc-simcore#7279: to uvicorn, a finished response is a disconnect as well."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        messages, incoming = anyio.create_memory_object_stream[Any](10)

        async def read() -> None:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    group.cancel_scope.cancel()
                    return
                await messages.send(message)

        with messages, incoming:
            async with anyio.create_task_group() as group:
                group.start_soon(read)
                await self.app(scope, incoming.receive, send)
                group.cancel_scope.cancel()


async def test_a_background_task_cancelled_by_a_finished_response() -> None:
    sent.clear()
    visit = await LeavingClient(CancelOnDisconnect(serving(plain))).post("/order")
    assert visit.status == 200
    assert only(visit, "background cancelled").text.endswith(" in send_receipt")
    assert sent == []

    (await LeavingClient(CancelOnDisconnect(serving(plain)), server="gunicorn").post("/order")).assert_clean()
    assert sent == ["receipt"]  # there a finished response is none

    (await LeavingClient(serving(cancellable)).post("/cancellable/order")).assert_clean()
    assert sent == ["receipt"] * 2


# -- a log line ------------------------------------------------------------------------------


@cancellable.post("/upload")
async def upload(request: Request) -> int:
    try:
        return len(await request.body())
    except Exception:
        logger.exception("the upload failed")  # at three in the morning
        raise


@cancellable.post("/quiet-upload")
async def quiet_upload(request: Request) -> int:
    try:
        return len(await request.body())
    except ClientDisconnect:
        raise
    except Exception:
        logger.exception("the upload failed")
        raise


async def test_a_log_line() -> None:
    client = LeavingClient(serving(cancellable))
    visit = await client.post("/cancellable/upload", content=b"a" * 100, leave=after_body(50))
    fault = only(visit, "logged")
    assert fault.text.startswith("shop ERROR: the upload failed\nTraceback (most recent call last):\n")
    assert "starlette.requests.ClientDisconnect" in fault.text

    visit = await client.post("/cancellable/quiet-upload", content=b"a" * 100, leave=after_body(50))
    visit.assert_clean()
    assert visit.cause == "disconnect"


# -- a body message stolen by a second reader ------------------------------------------------


def with_cancellation(handler: Callable[[Request], Awaitable[int]]) -> Callable[[Request], Awaitable[int | None]]:
    """The decorator that goes round. It is right where the body has been read before (vllm-project/vllm#11190)."""

    async def listen(request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    async def wrapper(request: Request) -> int | None:
        work = asyncio.ensure_future(handler(request))
        watcher = asyncio.ensure_future(listen(request))
        done, pending = await asyncio.wait([work, watcher], return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.wait([work, watcher])
        return work.result() if work in done else None

    return wrapper


async def size_of_upload(request: Request) -> int:
    size = 0
    async for piece in request.stream():
        size += len(piece)
    return size


plain.post("/size")(with_cancellation(size_of_upload))
cancellable.post("/size")(size_of_upload)
cancellable.post("/wrapped-size")(with_cancellation(size_of_upload))


@plain.post("/impatient-size")
async def impatient_size(request: Request) -> int:
    if await request.is_disconnected():  # not worth beginning
        return 0
    return await size_of_upload(request)


cancellable.post("/impatient-size")(impatient_size)

PIECES = [b"a" * 1000] * 4


@on_asyncio
async def test_a_body_message_stolen_by_a_second_reader() -> None:
    client = LeavingClient(serving(plain, cancellable), patience=Patience(whole=0.3))
    for path in ("/size", "/cancellable/wrapped-size"):
        visit = await client.post(path, content=PIECES)
        fault = next(fault for fault in visit.faults if fault.kind == "body stolen")
        assert fault.text.startswith("two readers at once, at\n")
        assert " in size_of_upload" in fault.text
        assert " in with_cancellation.<locals>.listen" in fault.text

    visit = await client.post("/cancellable/size", content=PIECES)
    visit.assert_clean()
    assert visit.body == b"4000"


@pytest.mark.parametrize("prefix", ["", "/cancellable"])
async def test_a_body_message_taken_by_a_look(prefix: str) -> None:
    """Starlette's ``is_disconnected`` drops the message that it finds: it is for a body that has been read."""
    client = LeavingClient(serving(plain, cancellable))
    visit = await client.post(f"{prefix}/impatient-size", content=PIECES)
    assert visit.body == b"3000"
    fault = only(visit, "body stolen")
    assert fault.text.startswith("is_disconnected() has taken a piece of it, at\n")
    assert fault.text.endswith(" in impatient_size")
