"""One request without a socket: what a server gives an application, and what a client does at the other end."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import anyio
from anyio.lowlevel import checkpoint
from starlette.datastructures import Headers
from starlette.types import Message

from .events import Event, EventReader
from .habits import Habits
from .sites import Stack, stack_here


class Connection:
    """A request and its response, with the habits of a server.

    :param body: the request's body, in the pieces in which it comes
    :ivar status: of the response, once it has started
    :ivar headers: likewise
    :ivar chunks: of the response's body, as the client received them
    :ivar uploaded: bytes of the request's body that the application has read
    :ivar invited: whether it has read at all: on uvicorn that sends ``100 Continue``
    :ivar sending: the number of the chunk that waits for a client which does not read
    :ivar completed: whether the response is complete
    :ivar left: when the client has left, by the event loop's clock
    :ivar heard: whether anybody has read http.disconnect, or was raised an :class:`OSError`, since
    :ivar stolen: the stacks of two that read the body at once
    :ivar cuts_at: bytes of the request's body, of which a piece that goes beyond is cut in two
    :ivar stalls_at: a chunk that the client does not read
    :ivar upload_complete: whether the client has sent the whole of its body
    """

    def __init__(self, body: Iterable[bytes], habits: Habits) -> None:
        self.habits = habits
        self.status: int | None = None
        self.headers = Headers()
        self.chunks: list[bytes] = []
        self.uploaded = 0
        self.invited = False
        self.sending: int | None = None
        self.completed = False
        self.left: float | None = None
        self.heard = False
        self.stolen: tuple[Stack, Stack] | None = None
        self.cuts_at: int | None = None
        self.stalls_at: int | None = None
        self.upload_complete = True
        self._pieces = deque(body)
        self._body_complete = self._started = self._stalled = self._told = False
        self._readers: dict[int, Stack] = {}
        self._takers: set[int] = set()
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
        """Two at once: one of them gets a piece of the body that the other wanted."""
        for other, stack in self._readers.items():
            if other != reader and (not self._body_complete or other in self._takers) and self.stolen is None:
                self.stolen = (stack, stack_here())

    async def _next_message(self, reader: int) -> Message:
        if self.uploaded and not self._body_complete:
            await checkpoint()  # a first piece comes with the headers, a later one does not
        while True:
            if self.left is not None and (not self._told or self.habits.again):
                self._told = self.heard = True
                return {"type": "http.disconnect"}
            if self.left is None and not self._body_complete and (self._pieces or self.upload_complete):
                message = self._piece()
                if message["body"]:
                    self._takers.add(reader)
                self.look()
                return message
            if self.left is None and self.completed and self.habits.after_completion == "http.disconnect":
                return {"type": "http.disconnect"}
            await self._change()

    def _piece(self) -> Message:
        piece = self._pieces.popleft() if self._pieces else b""
        cut = len(piece) if self.cuts_at is None else self.cuts_at - self.uploaded
        self.uploaded += len(piece[:cut])
        self._body_complete = self.upload_complete and not self._pieces and len(piece) <= cut
        return {"type": "http.request", "body": piece[:cut], "more_body": not self._body_complete}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body" and message.get("body") and self.habits.back_pressure:
            await self._until_it_reads()
        if self.left is not None:
            if self.habits.raises:
                self.heard = True
                raise OSError("the client has left")
            return
        if self.completed or message["type"] != ("http.response.body" if self._started else "http.response.start"):
            raise RuntimeError(f"unexpected {message['type']!r}")
        if not self._started:
            self._started = True
            self.status = message["status"]
            self.headers = Headers(raw=list(message.get("headers", [])))
        else:
            if body := bytes(message.get("body", b"")):
                self.chunks.append(body)
                self._events.feed(body)
            self.completed = not message.get("more_body", False)
        self._tell()
        if self.habits.yields:
            await checkpoint()

    async def _until_it_reads(self) -> None:
        number = len(self.chunks) + 1
        try:
            while self.left is None and (self._stalled or self.stalls_at == number):
                self.sending = number
                await self._change()
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
