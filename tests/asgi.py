"""In process, no sockets: a connection that leaves when told to, with the habits of one server or another."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
from starlette.types import Message, Scope

App = Callable[[Scope, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]


class Connection:
    """One request.

    :param body: its pieces
    :param error: raised by ``receive`` once the client has left, instead of http.disconnect
    :param raises: whether ``send`` raises ``OSError`` once the client has left (no server does, ASGI 2.4 says so)
    :param once: whether http.disconnect is delivered once and never again (Hypercorn, Daphne)
    """

    def __init__(
        self,
        path: str = "/",
        method: str = "GET",
        body: list[bytes] | None = None,
        headers: list[tuple[bytes, bytes]] | None = None,
        error: BaseException | None = None,
        raises: bool = False,
        once: bool = False,
    ) -> None:
        self.scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": headers or [],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
            "state": {},
        }
        self.pieces = [b""] if body is None else body
        self.error = error
        self.raises = raises
        self.once = once
        self.sent: list[Message] = []
        self.reads = 0
        self.concurrent_reads = 0
        self.left: Any = anyio.Event()
        self.told = False
        self.unblocked = anyio.Event()
        self.unblocked.set()

    def leave(self) -> None:
        self.left.set()
        self.unblocked.set()

    async def receive(self) -> Message:
        self.concurrent_reads += 1
        assert self.concurrent_reads == 1, "two readers"
        try:
            if self.pieces and not self.left.is_set():
                self.reads += 1
                piece = self.pieces.pop(0)
                return {"type": "http.request", "body": piece, "more_body": bool(self.pieces)}
            if self.told and self.once:
                await anyio.sleep_forever()
            await self.left.wait()
            self.told = True
            if self.error is not None:
                raise self.error
            return {"type": "http.disconnect"}
        finally:
            self.concurrent_reads -= 1

    async def send(self, message: Message) -> None:
        if not self.unblocked.is_set():
            await self.unblocked.wait()
        if not self.left.is_set():
            self.sent.append(message)
        elif self.raises:
            raise OSError("the socket is gone")

    async def run(self, app: Any) -> None:
        await app(self.scope, self.receive, self.send)

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])


async def run_until_left(connection: Connection, app: Any, started: anyio.Event) -> None:
    """Run ``app``, and have the client leave once ``started`` is set."""
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(connection.run, app)
            await started.wait()
            connection.leave()
