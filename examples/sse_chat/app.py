"""The routes of the chat. A client that leaves, however it does, has left the room: see ``stream``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import anyio
from fastapi import APIRouter, FastAPI, HTTPException, Query, Response
from fastapi.responses import FileResponse
from pydantic import AfterValidator, BaseModel, BeforeValidator, StringConstraints

from fastapi_cancel import CancellableRoute, JSONServerSentEvent, ServerSentEvent, SSEResponse

from .room import Room

HEARTBEAT = 15.0  # seconds: proxies cut connections on which nothing moves
SEND_TIMEOUT = 10.0  # seconds that one event may wait for a client that does not read
RETRY = 1000  # milliseconds until a browser comes back

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


async def stream(name: str) -> AsyncIterator[ServerSentEvent]:
    """What one person sees. Leaving ``async with`` is what the others see."""
    async with room.join(name) as seat:
        with suppress(anyio.EndOfStream):
            while True:
                event = await seat.next()
                yield JSONServerSentEvent(event.data, event=event.kind)


@router.get("/")
async def page() -> FileResponse:
    return FileResponse(Path(__file__).with_name("index.html"))


@router.get("/events")
async def events(name: Annotated[Name, Query()]) -> Response:
    """Join under a name, and stay for as long as the stream is open."""
    return SSEResponse(stream(name), heartbeat=HEARTBEAT, send_timeout=SEND_TIMEOUT, retry=RETRY)


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
