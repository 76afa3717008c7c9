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
counts = {"came": 0, "open": 0, "cleaned": 0}


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with broker:
        yield


async def clean() -> None:
    await anyio.sleep(0.001)
    counts["open"] -= 1
    counts["cleaned"] += 1


async def news(last: str | None) -> AsyncIterator[Event]:
    async with aclosing(broker.events("news", after=last)) as events:
        async for event in events:
            yield event


@router.get("/news")
async def follow(last: LastEventID) -> Response:
    """Every second stream is pushed to, the others go through a generator of ours."""
    counts["came"] += 1
    counts["open"] += 1
    return SSEResponse(news(last) if counts["came"] % 2 else broker.events("news", after=last), cleanup=clean)


@router.get("/counts")
async def count() -> dict[str, int]:
    return counts


app = FastAPI(lifespan=lifespan)
app.include_router(router)
