"""The application that browsers, other clients and proxies meet in the tests: streams that the test writes to."""

from __future__ import annotations

import logging
import socket
import struct
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import anyio
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.sse import ServerSentEvent as FastAPIEvent
from pydantic import BaseModel
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_cancel import JSONServerSentEvent, LastEventID, ServerSentEvent, SSEResponse, StreamInfo, drain

logging.basicConfig(format="%(levelname)s %(name)s %(message)s")

Seen = tuple[str, str, str]
"""What a client makes of an event: its type, data and last id."""


class Model(BaseModel):
    text: str


@dataclass
class Data:
    text: str


EVERYTHING: list[tuple[object, Seen | None]] = [
    ("plain", ("message", "plain", "")),
    ("LF\nCR LF\r\nCR\rend", ("message", "LF\nCR LF\nCR\nend", "")),
    ("\n", ("message", "\n", "")),
    (" indented", ("message", " indented", "")),
    ("id: no field", ("message", "id: no field", "")),
    (": no comment", ("message", ": no comment", "")),
    ("a\u2028b\u2029c\x85d\x0be\x0cf\x1cg", ("message", "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg", "")),
    ("naïve 日本語 😀 \ufeff", ("message", "naïve 日本語 😀 \ufeff", "")),
    ("x" * 100_000, ("message", "x" * 100_000, "")),
    (None, None),
    (7, ("message", "7", "")),
    (b"data: bytes\n\n", ("message", "bytes", "")),
    (bytearray(b"event: named\ndata: bytearray\n\n"), ("named", "bytearray", "")),
    (memoryview(b"data: memory\ndata: view\n\n"), ("message", "memory\nview", "")),
    ({"comment": "nothing\nat all"}, None),
    ({"event": "named", "data": ""}, ("named", "", "")),
    ({"event": "événement 😀", "data": "dict", "id": "1"}, ("événement 😀", "dict", "1")),
    ("the id stays", ("message", "the id stays", "1")),
    ({"id": "nur für später 😀"}, None),
    ("and changes", ("message", "and changes", "nur für später 😀")),
    (ServerSentEvent("sse\nstarlette", event="named", id="2", comment="c"), ("named", "sse\nstarlette", "2")),
    (JSONServerSentEvent({"text": "ü"}), ("message", '{"text":"ü"}', "2")),
    (FastAPIEvent(data={"text": "fast"}, event="named", id="3", retry=2000), ("named", '{"text":"fast"}', "3")),
    (FastAPIEvent(raw_data="raw"), ("message", "raw", "3")),
    (Model(text="model"), ("message", '{"text":"model"}', "3")),
    (Data("data\nclass"), ("message", '{"text":"data\\nclass"}', "3")),
    ({"data": "no id any more", "id": ""}, ("message", "no id any more", "")),
    ({"comment": "clients that wait for the LF after a CR now have the last event"}, None),
]
"""What a stream may yield, and what a client sees of it."""

SEEN = [list(seen) for _, seen in EVERYTHING if seen is not None]
NAMES = sorted({"message", "farewell", *(seen[0] for seen in SEEN)})

state: dict[str, Any] = {}
transports: list[Any] = []


def reset() -> None:
    state.clear()
    state.update(running=0, cleaned=0, heartbeats=0, feed=[], came=[], seen=[], causes=[], news=anyio.Event())
    transports.clear()


class Observed:
    """Outermost: sees what the server sees."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path") != "/events":
            await self.app(scope, receive, send)
            return
        if (transport := getattr(getattr(send, "__self__", None), "transport", None)) is not None:  # uvicorn
            transports.append(transport)

        async def counting(message: Message) -> None:
            state["heartbeats"] += message.get("body", b"").startswith(b": ping")
            await send(message)

        state["running"] += 1
        try:
            await self.app(scope, receive, counting)
        finally:
            state["running"] -= 1


api = FastAPI()
app = Observed(api)


@api.get("/stats")
async def stats() -> Response:
    told = {
        "opened": state["seen"].count(["open"]),
        "dispatched": [seen for seen in state["seen"] if seen[0] not in ("open", "error")],
        "came_with": [last for last, _ in state["came"]],
    }
    return JSONResponse({name: value for name, value in state.items() if name != "news"} | told)


@api.get("/reset")
async def start_anew() -> None:
    reset()


# -- the stream ----------------------------------------------------------------------------------


@api.get("/events")
async def events(
    last: LastEventID,
    everything: bool = False,
    sep: str = "\r\n",
    heartbeat: float | None = None,
    retry: int | None = None,
) -> Response:
    """What the test publishes, from the event after the last one that this client saw."""
    state["came"].append([last, time.monotonic()])
    return SSEResponse(
        all_kinds() if everything else feed(last),
        sep=sep,
        heartbeat=heartbeat,
        retry=retry,
        farewell={"event": "farewell", "data": "see you"},
        on_disconnect=note_cause,
    )


async def feed(last: str | None) -> AsyncIterator[dict[str, str]]:
    sent = 0 if last is None else [event.get("id") for event in state["feed"]].index(last) + 1
    try:
        while True:
            while sent < len(state["feed"]):
                yield state["feed"][sent]
                sent += 1
            await state["news"].wait()
    finally:
        await cleanup()


async def all_kinds() -> AsyncIterator[object]:
    try:
        for item, _ in EVERYTHING:
            yield item
        await anyio.sleep_forever()
    finally:
        await cleanup()


async def cleanup() -> None:
    await anyio.sleep(0.05)
    state["cleaned"] += 1


async def note_cause(info: StreamInfo) -> None:
    await anyio.sleep(0.01)
    state["causes"].append(info.cause)


# -- what the test has the server do -------------------------------------------------------------


@api.post("/publish")
async def publish(event: dict[str, str]) -> None:
    state["feed"].append(event)
    state["news"].set()
    state["news"] = anyio.Event()


@api.get("/drop")
async def drop() -> float:
    """Cut the connections of all streams, as a crash or a network would. When: on the clock of ``came``."""
    for transport in transports:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    transports.clear()
    return time.monotonic()


@api.get("/drain")
async def say_farewell() -> int:
    return drain()


# -- the browser's side --------------------------------------------------------------------------

PAGE = """<!doctype html>
<meta charset="utf-8">
<link rel="icon" href="data:,">
<script>
  const asked = new URLSearchParams(location.search);
  const source = new EventSource("/events?" + asked.get("stream"));
  let reports = Promise.resolve();
  function report(...seen) {
    reports = reports.then(() => fetch("/seen", {method: "POST", body: JSON.stringify(seen)}));
  }
  source.onopen = () => report("open");
  source.onerror = () => report("error", source.readyState);
  for (const name of asked.getAll("name"))
    source.addEventListener(name, event => report(event.type, event.data, event.lastEventId));
  source.addEventListener("close", () => source.close());
</script>
"""


@api.get("/page")
async def page() -> Response:
    """Opens an EventSource and reports what it sees, one thing after the other."""
    return HTMLResponse(PAGE, headers={"Cache-Control": "no-store"})


@api.post("/seen")
async def seen(request: Request) -> None:
    state["seen"].append(await request.json())


reset()
