"""One of several workers that send what is published in Redis."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import anyio
from fastapi import APIRouter, FastAPI, Response

from fastapi_cancel import CancellableRoute, LastEventID, SSEResponse, connect
from fastapi_cancel.broker import Event

broker = connect(os.environ["BROKER_URL"])
router = APIRouter(route_class=CancellableRoute)
counts = {"open": 0, "cleaned": 0}


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with broker:
        yield


async def news(last: str | None) -> AsyncIterator[Event]:
    counts["open"] += 1
    try:
        async with aclosing(broker.events("news", after=last)) as events:
            async for event in events:
                yield event
    finally:
        await anyio.sleep(0.001)
        counts["open"] -= 1
        counts["cleaned"] += 1


@router.get("/news")
async def follow(last: LastEventID) -> Response:
    return SSEResponse(news(last))


@router.get("/counts")
async def count() -> dict[str, int]:
    return counts


app = FastAPI(lifespan=lifespan)
app.include_router(router)
