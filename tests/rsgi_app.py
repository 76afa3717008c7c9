"""Whatever the other servers serve, for Granian's RSGI interface. ``APP``: the application, as uvicorn is told it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from typing import Any

import anyio
from fastapi import APIRouter, FastAPI, Request, Response, WebSocket, WebSocketDisconnect
from starlette.background import BackgroundTask
from starlette.responses import StreamingResponse

from fastapi_cancel import CancellableRoute, CancellableStreamingResponse
from fastapi_cancel.rsgi import RSGI

from .app import Observed, cleanup, state


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    if os.environ.get("FAIL"):
        raise ValueError("no database")
    yield {"database": "open"}
    print("[INFO] database closed", flush=True)


more = FastAPI(lifespan=lifespan)
more.add_middleware(Observed)
router = APIRouter(route_class=CancellableRoute)
plain = APIRouter()


@more.get("/seen")
async def seen(request: Request) -> dict[str, Any]:
    return {
        "state": request.state.database,
        "host": request.headers["host"],
        "cookies": request.cookies,
        "version": request.scope["http_version"],
        "client": request.client,
    }


@more.websocket("/echo")
async def echo(websocket: WebSocket) -> None:
    await websocket.accept()
    state["started"] += 1
    try:
        while True:
            await websocket.send_text(websocket.state.database + ": " + await websocket.receive_text())
    except WebSocketDisconnect:
        await cleanup()


@more.websocket("/refused")
async def refused(websocket: WebSocket) -> None:
    await websocket.close()


@more.websocket("/subprotocol")
async def subprotocol(websocket: WebSocket) -> None:
    await websocket.accept("chat")


async def endless() -> AsyncIterator[bytes]:
    state["started"] += 1
    try:
        while True:
            yield b"a"
            await anyio.sleep(0.001)
    finally:
        await cleanup()


async def letters(count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        await anyio.sleep(0)
        yield b"a"
    await anyio.sleep(0.005)
    state["seen"].append("end")


@router.get("/letters")
@plain.get("/plain/letters")
async def some_letters(count: int, length: int | None = None) -> Response:
    headers = {"content-length": str(length)} if length else None
    return StreamingResponse(letters(count), headers=headers, background=BackgroundTask(cleanup))


@router.api_route("/endless", methods=["GET", "HEAD"])
@plain.api_route("/plain/endless", methods=["GET", "HEAD"])
async def endless_letters() -> Response:
    return StreamingResponse(endless())


async def flooding(count: int) -> AsyncIterator[bytes]:
    """At its end it cleans up as it does when it is cancelled, and the client may leave meanwhile."""
    state["started"] += 1
    try:
        for _ in range(count):
            yield b"x" * 65536
    finally:
        with anyio.CancelScope(shield=True):
            await cleanup()


@router.get("/flood")
async def flood() -> Response:
    return CancellableStreamingResponse(flooding(1024), cleanup=[cleanup])


@router.post("/size")
async def size(request: Request) -> int:
    return len(await request.body())


async def two_pieces() -> AsyncIterator[bytes]:
    yield b"first"
    raise ValueError("too late")


@plain.get("/fails")
async def fails() -> None:
    raise ValueError("at once")


@plain.get("/fails-late")
async def fails_late(length: int | None = None) -> Response:
    return StreamingResponse(two_pieces(), headers={"content-length": str(length)} if length else None)


more.include_router(router)
more.include_router(plain)
module, _, name = os.environ.get("APP", "tests.app:app").partition(":")
application = RSGI(getattr(import_module(module), name))
