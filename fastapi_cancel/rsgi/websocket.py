"""One WebSocket on RSGI, as ASGI's ``receive`` and ``send``.

RSGI has no word for a subprotocol, for headers of the answer, or for the code of a close: the first two are refused,
the last is lost in both directions.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import Message

from ..exceptions import ClientGone
from .news import News
from .types import WebSocketProtocol, WebSocketTransport

CLOSE, BYTES = 0, 1  # kinds of messages; the third is text
NO_CODE, ABNORMAL = 1005, 1006  # RFC 6455, section 7.4.1


class Conversation(News):
    """A WebSocket.

    :ivar gone: the client has closed it, or has left
    """

    gone = False
    _connecting = True
    _closed = False
    _code = NO_CODE
    _transport: WebSocketTransport | None = None
    _receiving: asyncio.Future[Any] | None = None
    _message: Message | None = None

    def __init__(self, protocol: WebSocketProtocol) -> None:
        self._protocol = protocol

    async def receive(self) -> Message:
        """The application's ``receive``. After the end: websocket.disconnect, at once and always."""
        if self._connecting:
            self._connecting = False
            return {"type": "websocket.connect"}
        while self._message is None and not self._closed:
            if self._transport is not None and self._receiving is None:
                self._receiving = self.ask(self._transport.receive(), self._came)
            await self.wait()
        if self._message is not None:
            message, self._message = self._message, None
            return message
        return {"type": "websocket.disconnect", "code": self._code, "reason": ""}

    def _came(self, future: asyncio.Future[Any]) -> None:
        self._receiving = None
        if future.cancelled():
            return
        if future.exception() is not None:
            self._leave(ABNORMAL)
        elif (message := future.result()).kind == CLOSE:
            self._leave(NO_CODE)
        else:
            key = "bytes" if message.kind == BYTES else "text"
            self._message = {"type": "websocket.receive", key: message.data}
        self.tell()

    def _leave(self, code: int) -> None:
        self.gone = True
        self._end(code)

    def _end(self, code: int) -> None:
        self._closed = True
        self._code = code
        if self._receiving is not None:
            self._receiving.cancel()
        self.tell()

    async def send(self, message: Message) -> None:
        """The application's ``send``.

        :raises ClientGone: the client has left
        :raises RuntimeError: this cannot be sent now, or not through RSGI
        """
        kind = message["type"]
        if self.gone:
            raise ClientGone("the client has left")
        if self._closed:
            raise RuntimeError(f"{kind} cannot be sent after websocket.close")
        if kind == "websocket.close":
            self._close(403)
            self._end(message.get("code") or 1000)
        elif self._transport is None:
            if kind != "websocket.accept":
                raise RuntimeError(f"{kind} cannot be sent before websocket.accept")
            await self._accept(message)
        elif kind == "websocket.send":
            await self._send(self._transport, message)
        else:
            raise RuntimeError(f"{kind} cannot be sent after websocket.accept")

    async def _accept(self, message: Message) -> None:
        for key in ("subprotocol", "headers"):
            if message.get(key):
                raise RuntimeError(f"RSGI cannot accept a WebSocket with {key}: {message[key]!r}")
        try:
            self._transport = await self._protocol.accept()
        except RuntimeError:
            self._leave(ABNORMAL)
            raise ClientGone("the client has left") from None
        self.tell()

    async def _send(self, transport: WebSocketTransport, message: Message) -> None:
        data = message.get("bytes")
        try:
            if data is not None:
                await transport.send_bytes(data)
            else:
                await transport.send_str(message["text"])
        except RuntimeError:
            self._leave(ABNORMAL)
            raise ClientGone("the client has left") from None

    def _close(self, status: int) -> None:
        if self._transport is None:
            self._protocol.close(status)
        else:
            self._protocol.close()

    def missing(self) -> str | None:
        """What the application should have done before it returned."""
        return None if self._closed or self._transport is not None else "accepting the connection or closing it"

    def close(self) -> None:
        """The application has ended."""
        if not self._closed or self.gone:
            self._close(500)
        self._end(self._code)
