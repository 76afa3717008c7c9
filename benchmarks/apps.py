"""The application under test, as each of the variants: called in process, and served by uvicorn."""

from __future__ import annotations

import asyncio
import gc
import importlib
import os
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from fastapi_cancel import CancellableRoute, CancellableStreamingResponse

from .harness import BASE

OURS = "CancellableRoute"
BARE = "`receive` called twice and closed, and nothing else"
DECORATOR = "fastapi-disconnect decorator"
MIDDLEWARE = "fastapi-disconnect middleware"

try:
    peer: Any = importlib.import_module("fastapi_disconnect")
    PEERS, PEERS_MISSING = [DECORATOR, MIDDLEWARE], ""
except ImportError:
    peer, PEERS = None, []
    PEERS_MISSING = "fastapi-disconnect is not installed (it needs Python ≥ 3.12): its rows are left out."

ROUTES = [BASE, OURS]
VARIANTS = [*ROUTES, *PEERS]

CHUNK = b'{"id": 1234, "name": "a chunk as an export has them"}\n'
CLEANUP = 0.01  # seconds that each cleanup takes

gate: list[asyncio.Future[None]] = []
"""What the requests to /wait are waiting for; whoever measures opens it."""

started: list[float] = []
finished: list[float] = []


class Item(BaseModel):
    name: str
    price: float
    tags: list[str]


class Layer(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)


class BareRoute(APIRoute):
    """The part of a watcher that is the server's: a ``receive`` for the body, and one that waits for the client."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        watching = _twice(receive)
        watching.send(None)
        try:
            await super().handle(scope, receive, send)
        finally:
            watching.close()


async def _twice(receive: Receive) -> None:
    await receive()
    await receive()


CLASSES = {OURS: CancellableRoute, BARE: BareRoute}


def build(variant: str, layers: int = 0) -> FastAPI:
    """The application.

    :param layers: how many ``BaseHTTPMiddleware`` surround it
    """
    app = FastAPI()
    router = APIRouter(route_class=CLASSES.get(variant, APIRoute))
    guard: Callable[[Any], Any] = peer.cancel_on_disconnect if variant == DECORATOR else lambda handler: handler
    answered = 0

    @router.get("/never")
    @guard
    async def never() -> dict[str, str]:
        nonlocal answered
        answered += 1
        return {"hello": "world"}

    @router.get("/turn")
    @guard
    async def turn() -> dict[str, str]:
        nonlocal answered
        await asyncio.sleep(0)
        answered += 1
        return {"hello": "world"}

    @router.get("/wait")
    @router.get("/wait-long")
    @guard
    async def wait() -> dict[str, str]:
        future = asyncio.get_running_loop().create_future()
        gate.append(future)
        await future
        return {"hello": "world"}

    @router.get("/sleep")
    @guard
    async def sleep() -> dict[str, str]:
        nonlocal answered
        await asyncio.sleep(0.001)
        answered += 1
        return {"hello": "world"}

    @router.get("/sleep-long")
    @guard
    async def sleep_long() -> dict[str, str]:
        nonlocal answered
        await asyncio.sleep(0.02)
        answered += 1
        return {"hello": "world"}

    @router.post("/body")
    @guard
    async def body(item: Item) -> Item:
        return item

    @router.get("/hold")
    @guard
    async def hold() -> None:
        started.append(time.monotonic())
        try:
            await asyncio.Event().wait()
        finally:
            await cleanup()

    @router.get("/stream")
    async def stream(chunks: int) -> Response:
        return StreamingResponse(produce(chunks))

    @router.get("/cancellable-stream")
    async def cancellable_stream(chunks: int) -> Response:
        return CancellableStreamingResponse(produce(chunks))

    @router.get("/lines")
    async def lines(chunks: int) -> AsyncIterator[dict[str, int]]:
        for number in range(chunks):
            yield {"number": number}

    @router.get("/idle")
    async def idle() -> Response:
        return StreamingResponse(produce_and_idle())

    @router.get("/cancellable-idle")
    async def cancellable_idle() -> Response:
        return CancellableStreamingResponse(produce_and_idle())

    app.include_router(router)

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        return {"started": len(started), "finished": finished, "tasks": len(asyncio.all_tasks())}

    @app.get("/cost")
    async def cost() -> tuple[float, int]:
        """CPU seconds so far, and the requests that they were for."""
        return time.process_time(), answered

    @app.get("/reset")
    async def reset() -> None:
        gc.collect()
        started.clear()
        finished.clear()

    for _ in range(layers):
        app.add_middleware(Layer)
    if variant == MIDDLEWARE:
        app.add_middleware(peer.CancelOnDisconnectMiddleware)
    return app


async def produce(chunks: int) -> AsyncIterator[bytes]:
    for _ in range(chunks):
        yield CHUNK


async def produce_and_idle() -> AsyncIterator[bytes]:
    started.append(time.monotonic())
    try:
        yield CHUNK
        await asyncio.Event().wait()
    finally:
        await cleanup()


async def cleanup() -> None:
    await asyncio.sleep(CLEANUP)
    finished.append(time.monotonic())


def served() -> FastAPI:
    """For ``uvicorn --factory``."""
    return build(os.environ["BENCH_VARIANT"], int(os.environ["BENCH_LAYERS"]))
