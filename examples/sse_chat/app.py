"""The routes of the chat. A client that leaves, however it does, has left the room: see ``stream``."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import anyio
from fastapi import APIRouter, FastAPI, HTTPException, Query, Response
from fastapi.responses import FileResponse
from pydantic import AfterValidator, BaseModel, BeforeValidator, StringConstraints

from fastapi_cancel import CancellableRoute, CancellableStreamingResponse

from .room import Room

KEEP_ALIVE = 15.0  # seconds: proxies cut connections on which nothing moves
SEND_TIMEOUT = 10.0  # seconds that one event may wait for a client that does not read

room = Room()
router = APIRouter(route_class=CancellableRoute)


def encodable(text: object) -> object:
    """JSON can hold half a character (a lone surrogate), UTF-8 cannot."""
    return text.encode(errors="replace").decode() if isinstance(text, str) else text


def visible(text: str) -> str:
    if not any(character.isprintable() and not character.isspace() for character in text):
        raise ValueError("must contain something that can be seen")
    return text


def one_line(text: str) -> str:
    return " ".join(text.split())


Name = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=24),
    AfterValidator(visible),
    AfterValidator(one_line),
]
Text = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=2000),
    BeforeValidator(encodable),  # runs first; placed above, it would make the constraints' errors speak of "items"
    AfterValidator(visible),
]


class Message(BaseModel):
    key: str
    text: Text


async def stream(name: str) -> AsyncIterator[str]:
    """What one person sees. Leaving ``async with`` is what the others see."""
    async with room.join(name) as seat:
        with suppress(anyio.EndOfStream):
            while True:
                if (event := await seat.next(KEEP_ALIVE)) is None:
                    yield ": keep-alive\n\n"
                else:
                    yield encode(event.kind, json.dumps(event.data, ensure_ascii=False))


def encode(kind: str, data: str) -> str:
    """One event, as https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream reads it."""
    return f"event: {kind}\n" + "".join(f"data: {line}\n" for line in re.split(r"\r\n|\r|\n", data)) + "\n"


@router.get("/")
async def page() -> FileResponse:
    return FileResponse(Path(__file__).with_name("index.html"))


@router.get("/events")
async def events(name: Annotated[Name, Query()]) -> Response:
    """Join under a name, and stay for as long as the stream is open."""
    return CancellableStreamingResponse(
        stream(name),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        send_timeout=SEND_TIMEOUT,
    )


@router.post("/messages", status_code=204)
async def speak(message: Message) -> None:
    """Say something, with the key that came with the ``welcome`` event."""
    if not room.say(message.key, message.text):
        raise HTTPException(403, "You are not in the room: nobody there has this key.")


@router.get("/who")
async def who() -> list[str]:
    return room.people


app = FastAPI(title="A chat room over server-sent events")
app.include_router(router)
