"""Requests that can be stopped from anywhere, and streams that outlive a connection, for several real workers."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator

from fastapi import APIRouter, FastAPI, Response

from fastapi_cancel import (
    CancellableRoute,
    LastEventID,
    Resumable,
    SSEResponse,
    Stoppable,
    connect,
    header,
    lifespan,
)

LEASE = 1.5
broker = connect(os.environ.get("REDIS_URL", "memory://"))
streams = Resumable(broker, linger=0.5, lease=LEASE)
app = FastAPI(lifespan=lifespan(broker, streams))
stoppable = APIRouter(route_class=CancellableRoute.under(Stoppable(broker, "jobs/{job}", run=header("X-Run"))))
router = APIRouter(route_class=CancellableRoute)

begun: set[str] = set()
stopped: dict[str, float] = {}


@stoppable.get("/jobs/{job}/{number}")
async def job(job: str, number: str) -> None:
    begun.add(number)
    try:
        await asyncio.sleep(600)
    finally:
        stopped[number] = time.monotonic()  # the same clock in all processes of a machine
        begun.discard(number)


@router.get("/stop/{job}")
async def stop(job: str, run: str | None = None) -> dict[str, float]:
    now = time.monotonic()
    return {"at": now, "reached": await broker.stop(f"jobs/{job}", run=run, reason="enough", early=30)}


@app.get("/stats")
async def stats() -> Response:
    return Response(json.dumps({"begun": sorted(begun), "stopped": stopped}))


ended: list[str] = []


async def count(key: str, pause: float) -> AsyncIterator[str]:
    try:
        number = 0
        while True:
            number += 1
            yield f"{number}"
            await asyncio.sleep(pause)
    finally:
        ended.append(key)


@router.get("/streams/{key}")
async def stream(key: str, last: LastEventID, pause: float = 0.01) -> Response:
    return await streams.start(key, SSEResponse(count(key, pause), heartbeat=None), after=last)


@app.get("/ended")
async def has_ended() -> list[str]:
    return ended


app.include_router(stoppable)
app.include_router(router)
