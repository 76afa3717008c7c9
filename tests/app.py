"""The application that the real servers serve in the tests. ``MIDDLEWARE``: layers of BaseHTTPMiddleware."""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

import anyio
import sniffio
from anyio.to_thread import run_sync
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Request, Response
from fastapi.sse import EventSourceResponse
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from fastapi_cancel import (
    CancellableFileResponse,
    CancellableRoute,
    CancellableStreamingResponse,
    CancelPolicy,
    Token,
    cancel_policy,
    lifespan,
    never_cancel,
)

logging.basicConfig(format="%(levelname)s %(name)s %(message)s")

state: dict[str, Any] = {}


def reset() -> None:
    state.clear()
    state.update(started=0, cleaned=0, finished_at=[], seen=[], statuses=[], running=0, beats=0)


reset()
app = FastAPI(lifespan=lifespan() if os.environ.get("LIFESPAN") else None)
router = APIRouter(route_class=CancellableRoute)


class Layer(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        state["statuses"].append(response.status_code)
        return response


class Observed:
    """Outermost: counts the requests that the server still waits for, and answers for itself."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path")
        if path == "/reset":
            reset()
        if path in ("/stats", "/reset"):
            waits = [time.monotonic() - began for began in sending]
            observed = {**state, "sending": waits, "tasks": tasks(), "memory": memory()}
            return await JSONResponse(observed)(scope, receive, send)

        async def observed_send(message: Message) -> None:
            began = time.monotonic()
            sending.append(began)
            try:
                await send(message)
            finally:
                sending.remove(began)

        counts = scope["type"] == "http"
        state["running"] += counts
        try:
            await self.app(scope, receive, observed_send)
        finally:
            state["running"] -= counts


sending: list[float] = []
"""Since when each ``send`` to the server waits."""


for _ in range(int(os.environ.get("MIDDLEWARE", "0"))):
    app.add_middleware(Layer)
app.add_middleware(Observed)


def tasks() -> list[str]:
    """Tasks that run code of ours, of the tests or of the frameworks; the servers' own do not count."""
    if sniffio.current_async_library() == "trio":
        import trio

        names = [task.name for task in _descendants(trio.lowlevel.current_root_task())]
    else:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        names = [_function(task) for task in others]
    ours = [name for name in names if name.startswith(("fastapi", "starlette", "tests"))]
    kit = ("fastapi_cancel.rsgi.lifespan", "fastapi_cancel.testing")  # the server's, and the recorder's
    return [name for name in ours if not name.startswith(kit)]


def _function(task: asyncio.Task[Any]) -> str:
    frame = getattr(task.get_coro(), "cr_frame", None)
    return f"{frame.f_globals['__name__']}.{frame.f_code.co_qualname}" if frame is not None else ""


def _descendants(task: Any) -> Iterator[Any]:
    yield task
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            yield from _descendants(child)


def memory() -> int:
    """Resident bytes of this process."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def pause(seconds: float = 0.01) -> None:
    """What a cleanup awaits."""
    # Trio's cancellation is level-triggered: there, a cleanup that awaits needs a shield, here as anywhere.
    with anyio.CancelScope(shield=sniffio.current_async_library() == "trio"):
        await anyio.sleep(seconds)


async def cleanup(seconds: float = 0.01) -> None:
    await pause(seconds)
    state["cleaned"] += 1
    state["finished_at"].append(time.monotonic())


# -- the four kinds of work ----------------------------------------------------------------------


@router.get("/handler")
async def handler() -> None:
    state["started"] += 1
    try:
        await anyio.sleep_forever()
    finally:
        await cleanup()


async def chunks() -> AsyncIterator[str]:
    state["started"] += 1
    try:
        yield "first\n"
        await anyio.sleep_forever()
    finally:
        await cleanup()


@router.get("/stream")
async def stream() -> Response:
    return CancellableStreamingResponse(chunks())


@router.get("/plain-stream")
async def plain_stream() -> Response:
    return StreamingResponse(chunks())


@router.get("/sse", response_class=EventSourceResponse)
async def sse() -> AsyncIterator[str]:
    state["started"] += 1
    try:
        yield "first"
        await anyio.sleep_forever()
    finally:
        await cleanup()


@router.get("/json-lines")
async def json_lines() -> AsyncIterator[str]:
    state["started"] += 1
    try:
        yield "first"
        await anyio.sleep_forever()
    finally:
        await cleanup()


@app.get("/stream-on-plain-route")
async def stream_on_plain_route() -> Response:
    return CancellableStreamingResponse(chunks())


# -- uploads -------------------------------------------------------------------------------------


@router.post("/upload")
async def upload(request: Request, pause: float = 0, stall: float = 0) -> dict[str, int]:
    state["started"] += 1
    size = peak = 0
    try:
        async for chunk in request.stream():
            await anyio.sleep(pause if size else stall)
            size += len(chunk)
            peak = max(peak, memory())
            state["seen"][:] = [size, peak]
    except ClientDisconnect as exc:
        state["seen"][:] = [type(exc).__name__]
        raise
    finally:
        await cleanup()
    return {"size": size, "peak": peak}


@router.post("/upload-then-work")
async def upload_then_work(request: Request) -> None:
    """Takes one piece of the body and then works: the disconnect is behind it in the channel."""
    state["started"] += 1
    try:
        async for _ in request.stream():
            state["seen"].append("chunk")
            await anyio.sleep_forever()
    finally:
        await cleanup()


@router.post("/refuse")
async def refuse() -> Response:
    await anyio.sleep(0.1)
    return PlainTextResponse("too much", 413, headers={"Connection": "close"})


# -- before and after the response ---------------------------------------------------------------


@router.get("/hello")
async def hello() -> str:
    await anyio.sleep(0.001)
    return "hello"


@router.get("/background")
async def background(tasks: BackgroundTasks, seconds: float = 1) -> str:
    tasks.add_task(cleanup, seconds)
    return "done"


@router.get("/background-of-stream")
async def background_of_stream() -> Response:
    tasks = BackgroundTasks()
    tasks.add_task(note, "background")
    return CancellableStreamingResponse(chunks(), background=tasks)


@router.get("/background-of-plain-stream")
async def background_of_plain_stream(tasks: BackgroundTasks) -> Response:
    tasks.add_task(note, "background")
    return StreamingResponse(chunks())


@router.get("/announced")
async def announced() -> Response:
    """More than the credit of an HTTP/2 stream, all of it announced."""

    async def body() -> AsyncIterator[bytes]:
        for _ in range(8):
            yield b"x" * 10_000
        state["seen"].append("all out")

    tasks = BackgroundTasks()
    tasks.add_task(note, "background")
    return CancellableStreamingResponse(body(), headers={"content-length": "80000"}, background=tasks)


async def note(text: str) -> None:
    await anyio.sleep(0.01)
    state["seen"].append(text)


@router.get("/never-started")
async def never_started(token: Token) -> Response:
    """Lingers under a shield until the client is known to have left, so that the body cannot start."""
    with anyio.CancelScope(shield=True):
        state["started"] += 1
        await token.wait()
    return CancellableStreamingResponse(chunks(), cleanup=[cleanup])


@router.get("/flood")
async def flood() -> Response:
    return CancellableStreamingResponse(flooding())


@router.get("/plain-flood")
async def plain_flood() -> Response:
    return StreamingResponse(flooding())


async def flooding() -> AsyncIterator[bytes]:
    state["started"] += 1
    try:
        while True:
            yield b"x" * 65536
    finally:
        await cleanup()


@router.get("/stalled")
async def stalled() -> Response:
    return CancellableStreamingResponse(flooding(), send_timeout=0.3, cleanup=[note_cause])


async def note_cause() -> None:
    state["seen"].append("ended")


@router.get("/file")
async def file(plain: bool = False) -> Response:
    path = big_file()
    if plain:
        return FileResponse(path)
    return CancellableFileResponse(path, cleanup=[cleanup])


_big_file = tempfile.TemporaryFile()  # noqa: SIM115 - it has no name, and goes with its process
_big_file.truncate(64 << 20)


def big_file() -> str:
    return f"/proc/self/fd/{_big_file.fileno()}"


# -- cleanups that go wrong, work that will not stop ---------------------------------------------


@router.get("/swallow")
@cancel_policy(cleanup_timeout=0.3)
async def swallow() -> str:
    state["started"] += 1
    try:
        await anyio.sleep_forever()
    except anyio.get_cancelled_exc_class():
        state["seen"].append("swallowed")
    try:
        await anyio.sleep_forever()
    finally:
        state["seen"].append("forced")
    return "never"


@router.get("/hang")
@cancel_policy(cleanup_timeout=0.3)
async def hang() -> None:
    state["started"] += 1
    try:
        await anyio.sleep_forever()
    finally:
        try:
            await anyio.sleep_forever()
        finally:
            state["seen"].append("forced")


@router.get("/raise")
async def raising() -> None:
    state["started"] += 1
    try:
        await anyio.sleep_forever()
    finally:
        await cleanup()
        raise ValueError("the cleanup failed")


@router.get("/shield")
async def shield(token: Token) -> None:
    state["started"] += 1
    try:
        with anyio.CancelScope(shield=True):
            await token.wait()
            await anyio.sleep(0.01)
            state["seen"].append("committed")
        await anyio.sleep_forever()
    finally:
        await cleanup()


@router.get("/tasks")
async def many_tasks() -> None:
    """Waits for tasks of its own, whose cleanups must not be cancelled a second time."""
    state["started"] += 1

    async def job() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            await pause(0.05)
            state["seen"].append("job")

    try:
        if sniffio.current_async_library() == "trio":
            async with anyio.create_task_group() as group:
                group.start_soon(job)
                group.start_soon(job)
        else:
            await asyncio.gather(job(), asyncio.create_task(job()), return_exceptions=True)
    finally:
        await cleanup()


# -- threads -------------------------------------------------------------------------------------


@router.get("/thread")
def thread(token: Token) -> str:
    state["started"] += 1
    cause = token.wait_in_thread(timeout=20)
    time.sleep(0.1)
    state["seen"].append(cause)
    state["cleaned"] += 1
    return "dropped"


@router.get("/in-thread")
async def in_thread(token: Token) -> None:
    state["started"] += 1

    def work() -> None:
        token.wait_in_thread(timeout=20)
        time.sleep(0.05)
        state["seen"].append("thread finished")

    try:
        await run_sync(work)
        await anyio.sleep_forever()
    finally:
        state["seen"].append("torn down")
        await cleanup()


def sync_chunks() -> Iterator[str]:
    state["started"] += 1
    try:
        while True:
            yield "first\n"
            time.sleep(0.01)
    finally:
        state["seen"].append(threading.current_thread() is not threading.main_thread())
        state["cleaned"] += 1


@router.get("/sync-stream")
async def sync_stream() -> Response:
    return CancellableStreamingResponse(sync_chunks())


@router.get("/plain-sync-stream")
async def plain_sync_stream() -> Response:
    return StreamingResponse(sync_chunks())


@router.get("/sync-sse", response_class=EventSourceResponse)
def sync_sse() -> Iterator[str]:
    yield from sync_chunks()


@router.get("/sync-json-lines")
def sync_json_lines() -> Iterator[str]:
    yield from sync_chunks()


# -- dependencies --------------------------------------------------------------------------------

# No name: a database on the disk that goes with its connection.
database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
database.execute("CREATE TABLE orders (name TEXT)")


async def transaction() -> AsyncIterator[sqlite3.Connection]:
    database.execute("BEGIN")
    try:
        yield database
    except BaseException as exc:
        await pause()
        database.execute("ROLLBACK")
        state["seen"].append(f"rollback: {type(exc).__name__}")
        raise
    else:
        database.execute("COMMIT")
        state["seen"].append("commit")


def sync_transaction() -> Iterator[sqlite3.Connection]:
    database.execute("BEGIN")
    try:
        yield database
    except BaseException as exc:
        database.execute("ROLLBACK")
        state["seen"].append(f"rollback: {type(exc).__name__}")
        raise
    else:
        database.execute("COMMIT")
        state["seen"].append("commit")


@router.post("/order")
async def order(connection: Annotated[sqlite3.Connection, Depends(transaction)], wait: bool = True) -> list[str]:
    connection.execute("INSERT INTO orders VALUES ('async')")
    state["started"] += 1
    if wait:
        await anyio.sleep_forever()
    return [name for (name,) in connection.execute("SELECT name FROM orders")]


@router.post("/sync-order")
async def sync_order(connection: Annotated[sqlite3.Connection, Depends(sync_transaction)]) -> None:
    connection.execute("INSERT INTO orders VALUES ('sync')")
    state["started"] += 1
    await anyio.sleep_forever()


@app.get("/orders")
async def orders() -> list[str]:
    return [name for (name,) in database.execute("SELECT name FROM orders")]


# -- streams that test the server ----------------------------------------------------------------


@router.get("/greedy")
async def greedy(size: int = 10) -> Response:
    return CancellableStreamingResponse(never_waiting(size))


@router.get("/plain-greedy")
async def plain_greedy(size: int = 10) -> Response:
    return StreamingResponse(never_waiting(size))


async def never_waiting(size: int) -> AsyncIterator[bytes]:
    state["started"] += 1
    try:
        while True:
            yield b"x" * size
    finally:
        await cleanup()


# -- policies, tokens, nesting -------------------------------------------------------------------


@router.get("/poll")
@cancel_policy(grace=20)
async def poll(request: Request) -> str:
    state["started"] += 1
    while not await request.is_disconnected():
        await anyio.sleep(0.005)
    state["seen"].append("disconnected")
    await cleanup()
    return "seen"


@router.get("/grace")
@cancel_policy(grace=20)
async def grace(token: Token) -> str:
    state["started"] += 1
    state["seen"].append(await token.wait())
    await cleanup()
    return "finished by itself"


@router.get("/limit")
@cancel_policy(timeout=0.2)
async def limit() -> None:
    state["started"] += 1
    try:
        await anyio.sleep_forever()
    finally:
        await cleanup()


@router.get("/limit-stream")
async def limit_stream() -> Response:
    return CancellableStreamingResponse(chunks(), policy=CancelPolicy(timeout=0.2))


@router.get("/never")
@never_cancel
async def never(token: Token) -> str:
    state["started"] += 1
    await anyio.sleep(0.3)
    state["seen"].append(token.cause)
    await cleanup()
    return "paid"


@router.get("/slow-cleanup")
async def slow_cleanup() -> None:
    state["started"] += 1
    try:
        await anyio.sleep_forever()
    finally:
        state["seen"].append("cleaning")
        await cleanup(0.7)
        print("[INFO] cleaned", flush=True)


app.include_router(router)
app.include_router(router, prefix="/included")
mounted = FastAPI()
mounted.router.route_class = CancellableRoute
mounted.add_api_route("/handler", handler, methods=["GET", "POST", "PUT", "DELETE", "PATCH"])
app.mount("/mounted", mounted)
