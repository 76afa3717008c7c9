"""Event streams for the real servers: on a CancellableRoute, on a plain route, and in a bare Starlette app.

Whatever runs leaves its mark in ``state["seen"]``: "1 generator", "1 on_disconnect", "1 cleanup".
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

import anyio
import redis.asyncio
from fastapi import APIRouter, FastAPI, Response
from fastapi.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request as StarletteRequest
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from fastapi_cancel import CancellableRoute, CancellableStreamingResponse, Token
from fastapi_cancel.sse import SSEResponse, StreamInfo

from .app import Layer, Observed, pause, state

Content = Callable[[int], AsyncIterator[Any]]


async def mark(number: int, name: str) -> None:
    await pause()
    state["seen"].append(f"{number} {name}")


async def tell(number: int, info: StreamInfo) -> None:
    await mark(number, "on_disconnect")
    state["info"] = dataclasses.asdict(info)


async def clean(number: int, response: SSEResponse) -> None:
    await mark(number, "cleanup")
    state["last_info"] = dataclasses.asdict(response.info)


# -- contents ------------------------------------------------------------------------------------


async def idle(number: int) -> AsyncIterator[Any]:
    state["started"] += 1
    try:
        yield {"data": "first", "id": f"id-{number}"}
        await anyio.sleep_forever()
    finally:
        await mark(number, "generator")


async def silent(number: int) -> AsyncIterator[Any]:
    state["started"] += 1
    try:
        await anyio.sleep_forever()
        yield "never"
    finally:
        await mark(number, "generator")


async def finite(number: int) -> AsyncIterator[Any]:
    state["started"] += 1
    try:
        for event in range(3):
            yield {"data": f"event {event}", "id": f"id-{event}"}
    finally:
        await mark(number, "generator")


async def burst(number: int) -> AsyncIterator[Any]:
    """Never waits, never ends."""
    state["started"] += 1
    try:
        while True:
            yield "first"
    finally:
        await mark(number, "generator")


async def flood(number: int) -> AsyncIterator[Any]:
    """More than a socket holds, from a content that never waits."""
    async with aclosing(_flooding(number, [65000], pause=False)) as events:
        async for event in events:
            yield event


async def big_then_small(number: int) -> AsyncIterator[Any]:
    """The task sends the big one after the pause, a helper the small one while the content waits."""
    async with aclosing(_flooding(number, [65000, 10])) as events:
        async for event in events:
            yield event


async def small_then_big(number: int) -> AsyncIterator[Any]:
    """The other way round: servers wait before they write, or after."""
    async with aclosing(_flooding(number, [10, 65000])) as events:
        async for event in events:
            yield event


async def _flooding(number: int, sizes: list[int], pause: bool = True) -> AsyncGenerator[Any, None]:
    state["started"] += 1
    try:
        for _ in range(1024):  # more than all buffers on the way, and not too much for a server that takes it all
            if pause:
                await anyio.sleep(0.0005)
            for size in sizes:
                yield "x" * size
    finally:
        await mark(number, "generator")


async def boulder(number: int) -> AsyncIterator[Any]:
    """One event that a socket does not hold, then only heartbeats."""
    state["started"] += 1
    try:
        yield "x" * (8 << 20)
        await anyio.sleep_forever()
    finally:
        await mark(number, "generator")


async def paced(number: int) -> AsyncIterator[Any]:
    """Bursts, and pauses around the length of a heartbeat: the last of them until there has been one."""
    state["started"] += 1
    try:
        for event in range(PACED):
            if event == PACED - 100:
                before = state["beats"]
                while state["beats"] == before:
                    await anyio.sleep(0.001)
            elif event % 100 == 0:
                await anyio.sleep((0, 0.001, 0.045, 0.05, 0.055)[event // 100])
            yield {"data": paced_data(event), "id": event}
    finally:
        await mark(number, "generator")


PACED = 600


def paced_data(event: int) -> str:
    return f"{event} " + "x" * (event * 7919 % 500)


CONTENTS: dict[str, Content] = {
    function.__name__: function
    for function in (idle, silent, finite, burst, flood, big_then_small, small_then_big, boulder, paced)
}


# -- endpoints -----------------------------------------------------------------------------------


class Beating(SSEResponse):
    """Counts its heartbeats."""

    def make_heartbeat(self) -> bytes:
        state["beats"] += 1
        return super().make_heartbeat()


def respond(content: str, heartbeat: float = 0, send_timeout: float | None = None, ping_size: int = 0) -> SSEResponse:
    """The same stream wherever it is served. ``ping_size``: of a heartbeat, in bytes."""
    number = state["opened"] = state.get("opened", 0) + 1
    response = Beating(
        CONTENTS[content](number),
        heartbeat=heartbeat or None,
        send_timeout=send_timeout,
        ping_message_factory=(lambda: {"comment": "x" * ping_size}) if ping_size else None,
        on_disconnect=partial(tell, number),
    )
    response.add_cleanup(clean, number, response)
    return response


gates: list[anyio.Event] = []


async def pass_gate() -> None:
    """Linger until "/open-gates" is asked for; nothing interrupts this."""
    gate = anyio.Event()
    gates.append(gate)
    state["waiting"] = len(gates)
    with anyio.CancelScope(shield=True):
        await gate.wait()


async def open_gates() -> None:
    while gates:
        gates.pop().set()


router = APIRouter(route_class=CancellableRoute)
plain = APIRouter()


@router.get("/late")
async def late_on_route(token: Token) -> Response:
    """Lingers until the client is known to have left, so that the response cannot start."""
    state["waiting"] = 1
    with anyio.CancelScope(shield=True):
        await token.wait()
    return respond("idle")


@plain.get("/late")
async def late_on_plain_route() -> Response:
    await pass_gate()
    return respond("idle")


async def late_in_starlette(request: StarletteRequest) -> Response:
    await pass_gate()
    return respond("idle")


async def endpoint(
    content: str, heartbeat: float = 0, send_timeout: float | None = None, ping_size: int = 0
) -> Response:
    return respond(content, heartbeat, send_timeout, ping_size)


for one in (router, plain):
    one.add_api_route("/{content}", endpoint, methods=["GET", "HEAD"])


async def endpoint_in_starlette(request: StarletteRequest) -> Response:
    query = request.query_params
    return respond(request.path_params["content"], float(query.get("heartbeat", 0)))


async def crowd() -> AsyncIterator[Any]:
    state["started"] += 1
    try:
        yield "first"
        await anyio.sleep_forever()
    finally:
        await anyio.sleep(0.01)
        state["cleaned"] += 1
        state["cleaned_at"] = time.monotonic()


@router.get("/crowd/stream")
async def crowd_stream(heartbeat: float) -> Response:
    return SSEResponse(crowd(), heartbeat=heartbeat)


@plain.get("/crowd/cleaned")
async def crowd_cleaned() -> dict[str, Any]:
    """Less work than "/stats", which looks through all tasks."""
    return {"cleaned": state["cleaned"], "at": state.get("cleaned_at")}


# -- Redis ---------------------------------------------------------------------------------------

database = redis.asyncio.from_url(os.environ.get("REDIS_URL", "redis://"), client_name="app")


async def subscribed() -> AsyncIterator[str]:
    """Holds a connection of the pool while it is open, and has to wait for Redis once more at its end."""
    async with database.pubsub() as pubsub:
        state["started"] += 1
        try:
            await pubsub.subscribe("news")
            async for message in pubsub.listen():
                yield "first" if message["type"] == "subscribe" else message["data"].decode()
        finally:
            await database.incr("ended")


redis_router = APIRouter(route_class=CancellableRoute)


@redis_router.get("/redis/sse")
async def redis_sse() -> Response:
    return SSEResponse(subscribed(), heartbeat=0.05)


@redis_router.get("/redis/stream")
async def redis_stream() -> Response:
    return CancellableStreamingResponse(subscribed())


@redis_router.get("/redis/native", response_class=EventSourceResponse)
async def redis_native() -> AsyncIterator[str]:
    async for news in subscribed():
        yield news


@plain.get("/redis/pool")
async def redis_pool() -> dict[str, int]:
    pool = database.connection_pool
    return {"in_use": len(pool._in_use_connections), "available": len(pool._available_connections)}


# -- the application -----------------------------------------------------------------------------

fastapi = FastAPI()
fastapi.add_api_route("/open-gates", open_gates)
fastapi.include_router(redis_router)
fastapi.include_router(plain, prefix="/plain")
fastapi.include_router(router, prefix="/route")
starlette = Starlette(
    routes=[
        Route("/bare/late", late_in_starlette),
        Route("/bare/{content}", endpoint_in_starlette),
    ]
)
for _ in range(int(os.environ.get("MIDDLEWARE", "0"))):
    fastapi.add_middleware(Layer)
    starlette.add_middleware(Layer)


async def dispatch(scope: Scope, receive: Receive, send: Send) -> None:
    bare = scope["type"] == "http" and scope["path"].startswith("/bare/")
    await (starlette if bare else fastapi)(scope, receive, send)


app = Observed(dispatch)
