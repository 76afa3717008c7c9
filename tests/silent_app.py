"""A stream with heartbeats, and a handler that sends nothing for as long as it works."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import suppress

import anyio
import sniffio
from fastapi import APIRouter, FastAPI, Request

from fastapi_cancel import CancellableRoute, SSEResponse, Token

from .shutdown_app import mark

app = FastAPI()
router = APIRouter(route_class=CancellableRoute)
SERVERS = {
    "uvicorn": ["uvicorn", "--loop", "asyncio", "--fd", "{fd}"],
    "uvicorn-uvloop": ["uvicorn", "--loop", "uvloop", "--fd", "{fd}"],
    "uvicorn-workers": ["uvicorn", "--workers", "2", "--fd", "{fd}"],
    "gunicorn": ["gunicorn", "-k", "asgi", "-b", "fd://{fd}"],
    "gunicorn-uvicorn": ["gunicorn", "-k", "uvicorn_worker.UvicornWorker", "-b", "fd://{fd}"],
    "hypercorn": ["hypercorn", "-b", "fd://{fd}"],
    "hypercorn-trio": ["hypercorn", "-k", "trio", "-b", "fd://{fd}"],
    "hypercorn-workers": ["hypercorn", "-w", "2", "-b", "fd://{fd}"],
    "daphne": ["daphne", "--fd", "{fd}"],
}
"""How each takes a socket that listens already."""
NAMES = ["TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT", "TCP_NODELAY"]


async def clean_up() -> None:
    # Trio's cancellation is level-triggered: there, a cleanup that awaits needs a shield, here as anywhere.
    with anyio.CancelScope(shield=sniffio.current_async_library() == "trio"):
        await anyio.sleep(0.01)


@router.get("/stream")
async def stream(token: Token) -> SSEResponse:
    async def feed() -> AsyncIterator[str]:
        try:
            yield "first"
            mark("stream open")
            await anyio.sleep_forever()
        finally:
            await clean_up()
            mark(f"stream cleaned: {token.cause}")

    return SSEResponse(feed(), heartbeat=0.5)


@router.get("/handler")
async def handler(token: Token) -> None:
    try:
        mark("handler open")
        await anyio.sleep_forever()
    finally:
        await clean_up()
        mark(f"handler cleaned: {token.cause}")


@app.get("/options")
async def options(request: Request) -> dict[str, int]:
    """The options of the connection that this request came by."""
    assert request.client is not None
    for number in range(3, 256):
        with suppress(OSError), socket.socket(fileno=os.dup(number)) as sock:
            if sock.getpeername()[1:2] == (request.client.port,):
                return {
                    "SO_KEEPALIVE": sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                    **{name: sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in NAMES},
                }
    raise AssertionError(f"no socket to {request.client}")


app.include_router(router)
