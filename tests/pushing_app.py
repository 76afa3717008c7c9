"""A channel in memory, for the real servers."""

from __future__ import annotations

import os

from fastapi import APIRouter, FastAPI, Response
from starlette.middleware import Middleware

from fastapi_cancel import CancellableRoute, SSEResponse, connect, lifespan

from .app import Layer

broker = connect()
router = APIRouter(route_class=CancellableRoute)


@router.get("/news")
async def listen() -> Response:
    return SSEResponse(broker.events("news"), farewell="bye")


@router.get("/say/{number}")
async def say(number: int, size: int = 0) -> str:
    return await broker.publish("news", f"{number} " + "x" * size)


app = FastAPI(lifespan=lifespan(broker), middleware=[Middleware(Layer)] * int(os.environ["LAYERS"]))
app.include_router(router)
