"""On every server: how many of five awaiting cleanups run to their end after their client left."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import APIRoute
from fastapi.sse import EventSourceResponse
from starlette.responses import StreamingResponse

from fastapi_cancel import CancellableRoute
from fastapi_cancel.testing.live import LiveServer

from .apps import CLEANUP, PEERS_MISSING, peer
from .harness import Row, Section

SERVERS = ["uvicorn", "uvicorn-h11", "gunicorn", "hypercorn", "granian", "daphne"]
CLIENTS = 5
PATIENCE = 4.0  # seconds: gunicorn cancels by itself after 3

started: Counter[str] = Counter()
cleaned: Counter[str] = Counter()
"""By path: Daphne cancels what is left of one case in the middle of a later one."""


async def work(request: Request) -> None:
    path = request.url.path
    started[path] += 1
    try:
        await asyncio.sleep(3600)
    finally:
        await asyncio.sleep(CLEANUP)
        cleaned[path] += 1


async def chunks(request: Request) -> AsyncIterator[str]:
    yield "first\n"
    await work(request)


def routes(route_class: type[APIRoute]) -> APIRouter:
    router = APIRouter(route_class=route_class)
    router.add_api_route("/handler", work)
    router.add_api_route("/sse", chunks, response_class=EventSourceResponse)

    @router.get("/stream")
    async def stream(request: Request) -> Response:
        return StreamingResponse(chunks(request))

    if peer is not None and route_class is APIRoute:
        router.add_api_route("/peer", peer.cancel_on_disconnect(work))
    return router


app = FastAPI()
app.include_router(routes(APIRoute), prefix="/plain")
app.include_router(routes(CancellableRoute), prefix="/ours")


@app.get("/stats")
async def stats() -> dict[str, Any]:
    return {"started": started, "cleaned": cleaned}


CASES = {
    "/plain/handler": "plain FastAPI handler",
    "/plain/stream": "Starlette `StreamingResponse`",
    "/plain/sse": "FastAPI SSE (`yield`)",
    **({"/plain/peer": "fastapi-disconnect decorator"} if peer is not None else {}),
    "/ours/handler": "`CancellableRoute`: handler",
    "/ours/stream": "`CancellableRoute`: `StreamingResponse`",
    "/ours/sse": "`CancellableRoute`: SSE (`yield`)",
}


def run(quick: bool) -> Section:
    """``quick``: without gunicorn's own cancellation, three seconds later."""
    section = Section(
        "Cleanups on every server",
        f"{CLIENTS} clients leave with a RST; each cleanup is `finally: await asyncio.sleep({CLEANUP}); done += 1`. "
        f"Counted are those that ran to their end within {PATIENCE:.0f} s.",
        notes=[PEERS_MISSING] if PEERS_MISSING else [],
    )
    for server in SERVERS:
        with LiveServer(app, server) as running:
            for path, who in CASES.items():
                clients = [running.open(path) for _ in range(CLIENTS)]
                while running.json("/stats")["started"].get(path) != CLIENTS:
                    time.sleep(0.01)
                since = max(client.abort() for client in clients)
                done, took = 0, 0.0
                while done < CLIENTS and time.monotonic() < since + (1 if quick else PATIENCE):
                    done = running.json("/stats")["cleaned"].get(path, 0)
                    took = time.monotonic() - since
                    time.sleep(0.01)
                when = f" after {took:.0f} s" if took > 1 and done else ""
                ours = path.startswith("/ours")
                verdict = ("PASS" if done == CLIENTS else "over") if ours else ""
                budget = f"{CLIENTS} of {CLIENTS}" if ours else ""
                section.rows.append(Row(server, who, f"{done} of {CLIENTS}{when}", budget, verdict))
            running.stop(signal.SIGKILL)  # the handlers that nobody told would keep it for an hour
    return section
