"""One request without a socket: what a server gives an application, and what a client does at the other end."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import anyio
from anyio.lowlevel import checkpoint
from starlette.datastructures import Headers
from starlette.types import Message

from .events import Event, EventReader
from .habits import Habits
from .moments import Moment
from .sites import Stack, stack_here

START, BODY = "http.response.start", "http.response.body"
TRAILERS, PATH = "http.response.trailers", "http.response.pathsend"


class ClientLeft(OSError):
    """What ``send`` raises once the client has left: a server may be given it back (ASGI, HTTP spec, version 2.4)."""


TURN = 100
"""Messages after which ``send`` lets the event loop turn: a real one's buffer is full some day."""


class Connection:
    """A request and its response, with the habits of a server.

    :param body: the request's body, in the pieces in which it comes
    :ivar status: of the response, once it has started
    :ivar headers: likewise
    :ivar trailers: what comes after the body as headers do before it, where the server offers that
    :ivar chunks: of the response's body, as the client received them
    :ivar uploaded: bytes of the request's body that the application has read, or a server that reads it first
    :ivar invited: whether it has read at all: on uvicorn that sends ``100 Continue``
    :ivar sending: the number of the chunk that waits for a client which does not read
    :ivar given_up: whether a ``send`` that waited for it was interrupted, or is about to be: the application is over
    :ivar completed: whether the response is complete
    :ivar left: when the client has left, by the event loop's clock
    :ivar heard: whether anybody has read http.disconnect, or was raised an :class:`OSError`, since
    :ivar stolen: the stacks of two that read the body at once
    :ivar peeked: the stack of a ``Request.is_disconnected`` that has taken a piece of it
    :ivar body_complete: whether the application has read the whole of the request's body
    :ivar upload_complete: whether the client has sent the whole of its body
    """

    def __init__(self, body: Iterable[bytes], habits: Habits) -> None:
        self.habits = habits
        self.status: int | None = None
        self.headers = self.trailers = Headers()
        self.chunks: list[bytes] = []
        self.uploaded = 0
        self.invited = False
        self.sending: int | None = None
        self.given_up = self.completed = False
        self.left: float | None = None
        self.heard = False
        self.stolen: tuple[Stack, Stack] | None = None
        self.peeked: Stack | None = None
        self.upload_complete = True
        self._pieces = deque(body)
        self._cuts: set[int] = set()
        self._stalls_at: set[int] = set()
        self._sends = 0
        self._whole: Message | None = None
        self.body_complete = self._started = self._stalled = self._told = False
        self._body_begun = self._body_over = self._trailing = False
        self._readers: dict[int, Stack] = {}
        self._changed: Any = None
        self._events = EventReader()

    # -- the client's end --------------------------------------------------------------------

    @property
    def body(self) -> bytes:
        """Of the response, as far as it came."""
        return b"".join(self.chunks)

    @property
    def events(self) -> list[Event]:
        """The server-sent events in it that are complete."""
        return self._events.events

    def prepare(self, moment: Moment) -> None:
        """Let it be seen when it comes."""
        if moment.cuts_at is not None:
            self._cuts.add(moment.cuts_at)
        if moment.stalls_at is not None:
            self._stalls_at.add(moment.stalls_at)

    def leave(self) -> None:
        """The client goes away."""
        if self.left is None:
            self.left = anyio.current_time()
            self._tell()

    def upload(self, piece: bytes) -> None:
        """The client sends one more piece of its body."""
        self._pieces.append(piece)
        self._tell()

    def end_upload(self) -> None:
        """That was the last one."""
        self.upload_complete = True
        self._tell()

    def stall(self) -> None:
        """The client stops reading: ``send`` waits, where the server lets it."""
        self._stalled = True

    def resume(self) -> None:
        """The client reads on."""
        self._stalled = False
        self._stalls_at -= {self.sending}
        self._tell()

    # -- the application's end ---------------------------------------------------------------

    async def receive(self) -> Message:
        self.invited = True
        reader = anyio.get_current_task().id
        self._check_readers(reader)
        self._readers[reader] = stack_here()
        try:
            return await self._next_message(reader)
        finally:
            self._readers.pop(reader, None)

    def _check_readers(self, reader: int) -> None:
        """Two at once: one of them gets what the other waits for, be it http.disconnect, which some say only once."""
        for other, stack in self._readers.items():
            if other != reader and self.stolen is None:
                both = stack, stack_here()
                if not (self.body_complete and any(map(_is_a_look, both))):
                    self.stolen = both

    def _check_peek(self, stack: Stack) -> None:
        """Starlette drops whatever message it meets."""
        if _is_a_look(stack):
            self.peeked = stack

    async def _next_message(self, reader: int) -> Message:
        if self._whole is not None:
            message, self._whole = self._whole, None
            return message
        if self.uploaded and not self.body_complete:
            await checkpoint()  # a first piece comes with the headers, a later one does not
        while True:
            if self.left is not None and (not self._told or self.habits.again):
                self._told = self.heard = True
                return {"type": "http.disconnect"}
            if self.left is None:
                if not self.body_complete and (self._pieces or self.upload_complete):
                    message = self._piece()
                    if message["body"]:
                        self._check_peek(self._readers[reader])
                    return message
                if self.completed and self.habits.after_completion == "http.disconnect":
                    return {"type": "http.disconnect"}
            await self._change()

    def _piece(self) -> Message:
        piece = self._pieces.popleft() if self._pieces else b""
        if inside := [cut - self.uploaded for cut in self._cuts if 0 < cut - self.uploaded < len(piece)]:
            self._pieces.appendleft(piece[min(inside) :])
            piece = piece[: min(inside)]
        self.uploaded += len(piece)
        self.body_complete = self.upload_complete and not self._pieces
        self.look()
        return {"type": "http.request", "body": piece, "more_body": not self.body_complete}

    async def take_body(self) -> bool:
        """Read the whole body, for a server that does so before it starts the application.

        :return: whether the client has stayed for that long
        """
        pieces: list[bytes] = []
        while not self.body_complete:
            if self.left is not None:
                return False
            if self._pieces or self.upload_complete:
                pieces.append(self._piece()["body"])
            else:
                await self._change()
        self._whole = {"type": "http.request", "body": b"".join(pieces), "more_body": False}
        return True

    async def send(self, message: Message) -> None:
        self._sends += 1
        if self._sends % TURN == 0:
            await checkpoint()
        if message["type"] == BODY and self.habits.back_pressure:
            await self._until_it_reads(bool(message.get("body")))
        if self.left is not None:
            if self.habits.raises:
                self.heard = True
                raise ClientLeft("the client has left")
            return
        if message["type"] not in self._expected():
            raise RuntimeError(f"unexpected {message['type']!r}")
        self._take(message)
        self._tell()
        if self.habits.yields:
            await checkpoint()

    def _expected(self) -> set[str]:
        """What may come next; of the extensions, those that the server offers."""
        if self.completed:
            return set()
        if not self._started:
            return {START}
        if self._body_over:
            return {TRAILERS}
        return {BODY} if self._body_begun else {BODY, *({PATH} & self.habits.extensions)}

    def _take(self, message: Message) -> None:
        if message["type"] == START:
            self._started = True
            self.status = message["status"]
            self.headers = Headers(raw=list(message.get("headers", [])))
            self._trailing = message.get("trailers", False) and TRAILERS in self.habits.extensions
        elif message["type"] == TRAILERS:
            self.trailers = Headers(raw=[*self.trailers.raw, *message.get("headers", [])])
            self.completed = not message.get("more_trailers", False)
        else:
            self._body_begun = True
            body = Path(message["path"]).read_bytes() if message["type"] == PATH else bytes(message.get("body", b""))
            if body:
                self.chunks.append(body)
                self._events.feed(body)
            self._body_over = not message.get("more_body", False)
            self.completed = self._body_over and not self._trailing

    async def _until_it_reads(self, chunk: bool) -> None:
        """Wait if the buffer is full: an empty last chunk is some bytes, too, and uvicorn waits before any."""
        number = len(self.chunks) + 1
        try:
            while self.left is None and (self._stalled or (chunk and number in self._stalls_at)):
                if self.sending != number:
                    self.sending = number
                    self.look()  # who sends may be a task that nobody watches
                else:
                    await self._change()
        except BaseException:
            self.given_up = True
            raise
        finally:
            self.sending = None

    # -- between the two ---------------------------------------------------------------------

    def _tell(self) -> None:
        """Something has changed: whoever waits for that looks again."""
        if self._changed is not None:
            self._changed.set()
            self._changed = None
        self.look()

    def look(self) -> None:
        """Called after all that happens."""

    async def _change(self) -> None:
        if self._changed is None:
            self._changed = anyio.Event()
        await self._changed.wait()


def _is_a_look(stack: Stack) -> bool:
    """Whether it is Starlette's way to ask, which waits for nothing."""
    return any(site.package == "starlette" and site.function == "Request.is_disconnected" for site in stack)
