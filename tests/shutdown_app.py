"""Streams that are open when the server is told to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import FrameType
from typing import Any

import anyio
from fastapi import APIRouter, FastAPI, Request
from fastapi.sse import EventSourceResponse as NativeSSE
from sse_starlette.sse import AppStatus

from fastapi_cancel import RSGI, CancellableRoute, CancellableStreamingResponse, CancelPolicy, SSEResponse, shutdown

from .app import Layer

marks = os.environ.get("MARKS", os.devnull)
state = {"open": 0, "told": 0}


def mark(text: str) -> None:
    """Leave a line for the test, which reads it when the process has gone."""
    with open(marks, "a") as file:
        file.write(text + "\n")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    if os.environ.get("OWN_HANDLER") or os.environ.get("NO_DRAIN"):
        before = signal.getsignal(signal.SIGTERM)

        def handle(signum: int, frame: FrameType | None) -> None:
            mark("own handler")
            state["told"] += 1
            assert callable(before)
            before(signum, frame)

        signal.signal(signal.SIGTERM, handle)
    if os.environ.get("NO_DRAIN"):
        AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]
    yield
    mark("lifespan shutdown")


app = FastAPI(lifespan=lifespan)
router = APIRouter(route_class=CancellableRoute)
plain = APIRouter()


async def idle(first: Any = "first") -> AsyncIterator[Any]:
    state["open"] += 1
    try:
        yield first
        if os.environ.get("NO_DRAIN"):
            while not state["told"]:
                await anyio.sleep(0.01)
            await anyio.sleep(2 * shutdown.LOOK)
            yield "still here"
            AppStatus.should_exit = True
        await anyio.sleep_forever()
    finally:
        state["open"] -= 1
        mark("closed")
        await anyio.sleep(0.01)
        mark("cleaned")


async def cooperating(event: anyio.Event) -> AsyncIterator[Any]:
    yield "first"
    await event.wait()
    await anyio.sleep(0.05)
    yield "my own end"
    mark("cleaned")


async def ticking() -> AsyncIterator[Any]:
    yield "first"
    while True:
        await anyio.sleep(0.05)
        yield "tick"


@router.get("/events")
@plain.get("/plain/events")
async def events() -> SSEResponse:
    return SSEResponse(idle(), retry=1500, farewell={"event": "bye", "data": "come back"})


@router.get("/cooperating")
async def cooperates() -> SSEResponse:
    event = anyio.Event()
    return SSEResponse(cooperating(event), shutdown_event=event, shutdown_grace_period=30, farewell="bye")


@router.get("/graceful")
async def graceful() -> SSEResponse:
    return SSEResponse(ticking(), shutdown_grace_period=0.3, farewell=lambda info: {"event": "bye", "id": info.events})


@router.get("/uninterrupted")
async def uninterrupted() -> SSEResponse:
    async def work() -> AsyncIterator[str]:
        yield "first"
        await anyio.sleep(1)
        yield "finished"

    return SSEResponse(work(), farewell="never", policy=CancelPolicy(causes={"disconnect", "stalled"}))


@router.get("/native", response_class=NativeSSE)
async def native() -> AsyncIterator[Any]:
    async for item in idle({"first": 1}):
        yield item


@router.get("/cancellable")
async def cancellable() -> CancellableStreamingResponse:
    return CancellableStreamingResponse(idle("data: first\n\n"), media_type="text/event-stream")


@app.get("/stats")
async def stats(request: Request) -> dict[str, Any]:
    return {**state, "pid": os.getpid()}


app.include_router(router)
app.include_router(plain)
for _ in range(int(os.environ.get("MIDDLEWARE", "0"))):
    app.add_middleware(Layer)

rsgi_application = RSGI(app)
