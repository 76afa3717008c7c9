"""Work with and without a fault, for a real server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import anyio
from fastapi import APIRouter, FastAPI
from starlette.responses import StreamingResponse

from fastapi_cancel import CancellableRoute, CancellableStreamingResponse

app = FastAPI()
router = APIRouter(route_class=CancellableRoute)
tasks: set[asyncio.Task[None]] = set()


async def rows() -> AsyncIterator[bytes]:
    try:
        for number in range(1000):
            yield b"row %d\n" % number
            await anyio.sleep(0.005)
    finally:
        await anyio.sleep(0.01)  # gives something back


@router.get("/export")
async def export() -> StreamingResponse:
    return CancellableStreamingResponse(rows())


@app.get("/plain-export")
async def plain_export() -> StreamingResponse:
    return StreamingResponse(rows())


@app.get("/report")
async def report() -> str:
    await anyio.sleep(60)
    return "report"


@router.get("/forgotten")
async def forgotten() -> str:
    task = asyncio.create_task(asyncio.sleep(60))
    tasks.add(task)
    return "started"


@router.get("/chatty")
async def chatty() -> str:
    logging.getLogger("chatty").error("low on fuel")
    return "said"


app.include_router(router)
