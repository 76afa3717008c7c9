"""The application that the real servers serve in the tests. ``MIDDLEWARE``: layers of BaseHTTPMiddleware."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import AsyncIterator
from typing import Any

import anyio
import sniffio
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.sse import EventSourceResponse
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.responses import StreamingResponse

from fastapi_cancel import CancellableRoute, CancellableStreamingResponse

state: dict[str, Any] = {}


def reset() -> None:
    state.clear()
    state.update(started=0, cleaned=0, finished=[], errors=[], statuses=[])


reset()


class Layer(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        if request.url.path not in ("/stats", "/reset"):
            state["statuses"].append(response.status_code)
        return response


app = FastAPI()
router = APIRouter(route_class=CancellableRoute)
for _ in range(int(os.environ.get("MIDDLEWARE", "0"))):
    app.add_middleware(Layer)


def tasks() -> int:
    """Tasks of requests, this one's not counted."""
    if sniffio.current_async_library() != "asyncio":
        return -1
    import asyncio

    return sum(
        "fastapi_cancel" in repr(task.get_coro()) or "RequestResponse" in repr(task) for task in asyncio.all_tasks()
    )


@app.get("/stats")
async def stats() -> dict[str, Any]:
    import asyncio

    count = len(asyncio.all_tasks()) if sniffio.current_async_library() == "asyncio" else -1
    return {**state, "tasks": count}


@app.get("/reset")
async def reset_all() -> dict[str, Any]:
    gc.collect()
    reset()
    return await stats()


async def cleanup() -> None:
    await anyio.sleep(0.01)
    state["cleaned"] += 1
    state["finished"].append(time.monotonic())


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
    async for chunk in _closing(chunks()):
        yield chunk


async def _closing(generator: Any) -> AsyncIterator[str]:
    try:
        async for chunk in generator:
            yield chunk
    finally:
        await generator.aclose()


app.include_router(router)
