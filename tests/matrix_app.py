"""The application of the matrix: those of the other tests in one, and what only the matrix asks for."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator

import anyio
from fastapi import APIRouter, Request
from starlette.types import Receive, Scope, Send

from fastapi_cancel import CancellableRoute, SSEResponse

from . import app as work
from . import sse_app as events
from .app import cleanup, state

router = APIRouter(route_class=CancellableRoute)


@router.post("/upload-at-the-gate")
async def upload_at_the_gate(request: Request) -> dict[str, int]:
    """Reads nothing of the body before the gate is open."""
    await events.pass_gate()
    return await work.upload(request)


async def open_ended() -> AsyncIterator[str]:
    state["started"] += 1
    try:
        yield "first"
        await anyio.sleep_forever()
    finally:
        await cleanup()
        print("[INFO] stream cleaned", flush=True)


@router.get("/farewell")
async def farewell() -> SSEResponse:
    return SSEResponse(open_ended(), retry=1500, farewell={"event": "bye", "data": "come back"})


work.app.include_router(router)


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    of_events = scope["type"] == "http" and scope["path"].startswith(("/route/", "/plain/", "/bare/", "/open-gates"))
    await (events.app if of_events else work.app)(scope, receive, send)


gc.freeze()  # the kit looks for garbage after each request
