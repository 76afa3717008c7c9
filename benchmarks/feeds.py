"""Event streams under test: the same events, at the same pace, through each of the responses."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from fastapi.routing import APIRoute
from fastapi.sse import EventSourceResponse as FastAPIResponse
from fastapi.sse import ServerSentEvent as FastAPIEvent
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import StreamingResponse

from fastapi_cancel import CancellableRoute, SSEResponse

from . import apps

DATA, EVENT, ID = '{"symbol": "ACME", "price": 101.25, "volume": 1200}', "trade", "1234"
ENCODED = f"id: {ID}\r\nevent: {EVENT}\r\ndata: {DATA}\r\n\r\n".encode()

CONTENT: dict[str, Callable[[], Any]] = {
    "bytes": lambda: ENCODED,
    "event": lambda: ServerSentEvent(DATA, event=EVENT, id=ID),
    "model": lambda: FastAPIEvent(raw_data=DATA, event=EVENT, id=ID),
    "text": lambda: DATA,
    "fields": lambda: {"data": DATA, "event": EVENT, "id": ID},
}


async def burst(content: str, events: int) -> AsyncIterator[Any]:
    """Never waits."""
    make = CONTENT[content]
    for _ in range(events):
        yield make()


async def turns(content: str, events: int) -> AsyncIterator[Any]:
    """One event in each turn of the event loop."""
    make = CONTENT[content]
    for _ in range(events):
        await asyncio.sleep(0)
        yield make()


async def waits(content: str, events: int) -> AsyncIterator[Any]:
    """Waits for each event, which somebody else puts into a queue meanwhile."""
    make = CONTENT[content]
    queue: asyncio.Queue[Any] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for _ in range(events):
        loop.call_soon(queue.put_nowait, make())
        yield await queue.get()


async def idle(content: str) -> AsyncIterator[Any]:
    """One event, then none."""
    apps.started.append(time.monotonic())
    try:
        yield CONTENT[content]()
        await asyncio.Event().wait()
    finally:
        await apps.cleanup()


PACES: dict[str, Callable[[str, int], AsyncIterator[Any]]] = {"burst": burst, "turns": turns, "waits": waits}
RESPONSES: dict[str, Callable[..., Response]] = {
    "raw": lambda content, ping: StreamingResponse(content, media_type="text/event-stream"),
    "sse-starlette": EventSourceResponse,
    "ours": SSEResponse,
}


def build(variant: str, layers: int = 0) -> FastAPI:
    """The application of :mod:`.apps`, with the event streams."""
    app = apps.build(variant, layers)
    router = APIRouter(route_class=CancellableRoute if variant == apps.OURS else APIRoute)
    for name, response in RESPONSES.items():
        router.add_api_route(f"/{name}/idle", partial(_idle, response), response_model=None)
        router.add_api_route(f"/{name}/{{pace}}", partial(_paced, response), response_model=None)
    router.add_api_route("/native/idle", idle, response_class=FastAPIResponse)
    for pace, feed in PACES.items():
        router.add_api_route(f"/native/{pace}", feed, response_class=FastAPIResponse)
    app.include_router(router)

    @app.get("/crowd")
    async def crowd() -> dict[str, Any]:
        return {
            "started": len(apps.started),
            "finished": len(apps.finished),
            "last": apps.finished[-1] if apps.finished else 0.0,
            "tasks": len(asyncio.all_tasks()),
        }

    return app


async def _idle(respond: Callable[..., Response], content: str, ping: float = 15) -> Response:
    return respond(idle(content), ping=ping)


async def _paced(respond: Callable[..., Response], pace: str, content: str, events: int) -> Response:
    return respond(PACES[pace](content, events), ping=15)


def served() -> FastAPI:
    """For ``uvicorn --factory``."""
    return build(os.environ["BENCH_VARIANT"], int(os.environ["BENCH_LAYERS"]))
