"""One request on RSGI, as an ASGI 2.4 server's ``receive`` and ``send``.

What Granian 2.8 does where the specification is silent, and what follows from it:

- *A future of ``client_disconnect`` lives until it is done or cancelled*, and that of an answered request may never
  be done. So it is asked for when somebody waits for a disconnect, and cancelled with the end of the response.
- *It is done when a streamed body has been taken, too*, be it that the client left or that it has it all: with the
  length that its head promised, or at once after HEAD. So what ends a response is noted before it happens.
- *An upload that is cut ends like one that is complete*: with an empty piece, and over HTTP/1 nothing but one more
  empty piece says otherwise. So pieces are counted (``_Body``).
- *``response_stream`` takes whatever it is given*, and nothing in RSGI tells how much of it has gone (``Backlog``).
- *A status or a length that cannot be takes the worker, or the next response, with it.* So they are checked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.types import Message

from .._stepper import plain
from ..exceptions import ClientGone
from .backlog import Backlog
from .news import News
from .types import Head, HTTPProtocol, Scope, StreamTransport

BODYLESS = (204, 304)
PAUSES = (0.001, 0.05)  # seconds between two looks at what Granian holds: the first, and the longest
FAILURE: Head = [("content-type", "text/plain; charset=utf-8")]


class Exchange(News):
    """A request and its response.

    :ivar gone: the client has left before it had its response
    """

    gone = False
    _over = False  # there is nothing more to receive: the client is gone, or the response is complete
    _delivered = False  # the client has all that it is to get, whatever else the application sends
    _finished = False  # the application has sent its last message
    _body: _Body | None = None
    _leaving: asyncio.Future[Any] | None = None
    _status = 0
    _head: Head
    _length: int | None = None  # what the head promises
    _written = 0
    _bodyless = False
    _opening: asyncio.Handle | None = None
    _answered = False  # the head was handed over
    _transport: StreamTransport | None = None
    _backlog: Backlog | None = None

    def __init__(self, scope: Scope, protocol: HTTPProtocol) -> None:
        self._scope = scope
        self._protocol = protocol

    # -- receiving ---------------------------------------------------------------------------

    @plain
    async def receive(self) -> Message:
        """The application's ``receive``. After the client has left: http.disconnect, at once and always."""
        if self._body is None:
            self._body = _Body(self._scope, self._protocol, self)
        while not self._over:
            if self._body.more:
                if (message := self._body.read()) is not None:
                    return message
                if self._body.broken:
                    self._leave()
                    break
            else:
                self._watch()
            await self.wait()
        return {"type": "http.disconnect"}

    def _watch(self) -> None:
        if self._leaving is None and not self._delivered:
            self._leaving = self.ask(self._protocol.client_disconnect(), self._left)

    def _left(self, _: asyncio.Future[Any]) -> None:
        if not self._over and not self._delivered:  # it may have been on its way already
            self._leave()

    def _leave(self) -> None:
        self.gone = True
        self._end()

    def _deliver(self) -> None:
        self._delivered = True
        if self._leaving is not None:
            self._leaving.remove_done_callback(self._left)
            self._leaving.cancel()

    def _end(self) -> None:
        self._over = True
        self._transport = None
        if self._opening is not None:
            self._opening.cancel()
        self._deliver()
        if self._body is not None:
            self._body.stop()
            self.tell()

    # -- sending -----------------------------------------------------------------------------

    async def send(self, message: Message) -> None:
        """The application's ``send``.

        A response that is sent as a whole is taken from whoever does not know yet that the client has left: Starlette
        sends the 500 of an error before it raises that error again, and would lose it to ours.

        :raises ClientGone: the client has left, or wants no body
        :raises RuntimeError: this cannot be sent now
        :raises ValueError: this can never be sent
        """
        kind = message["type"]
        if kind == "http.response.start" and not self._status:
            self._start(message["status"], list(message.get("headers", ())))
        elif kind == "http.response.body" and self._status and not self._finished:
            body = message.get("body", b"")
            await self._write(body if type(body) is bytes else bytes(body), message.get("more_body", False))
        else:
            raise RuntimeError(f"{kind} cannot be sent {self._where()}")

    def _where(self) -> str:
        if self._finished:
            return "after the response"
        return "after http.response.start" if self._status else "before http.response.start"

    def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        if not 200 <= status <= 999:
            raise ValueError(f"status must be from 200 to 999, not {status!r}")
        try:
            head = [(name.decode(), value.decode()) for name, value in headers]
        except UnicodeDecodeError:
            head = [(name.decode("latin-1"), _text(value)) for name, value in headers]
        for name, value in head:
            if name.lower() == "content-length":
                self._length = int(value)
                break
        else:
            if not self.gone:
                # The head is not to wait for a body that may take its time; one that comes at once goes with it.
                self._opening = asyncio.get_running_loop().call_soon(self._open)
        self._bodyless = self._scope.method == "HEAD" or status in BODYLESS
        self._status = status
        self._head = head

    def _open(self) -> None:
        """Hand the head over; the body follows."""
        self._answered = True
        self._transport = self._protocol.response_stream(self._status, self._head)
        if self._opening is not None:
            self._opening.cancel()
        if self._bodyless:
            self._deliver()
        if self._scope.method == "HEAD":
            self._end()  # a stream of events may have nothing to say, and would wait for ever

    async def _write(self, body: bytes, more: bool) -> None:
        if not self._answered and not more:
            self._whole(body)
            return
        if not self._answered and not self.gone:
            self._open()
        self._finished = not more
        if self._bodyless and more:
            raise ClientGone("the client wants the head alone")
        if not self._bodyless and not self.gone:
            await self._stream(body)
        if self.gone:
            raise ClientGone("the client has left")
        if not more:
            self._end()

    async def _stream(self, body: bytes) -> None:
        self._written += len(body)
        if self._length is not None and self._written > self._length:
            raise RuntimeError(f"the body is longer than its Content-Length of {self._length}")
        if body:
            assert self._transport is not None
            look = self._count(len(body))
            try:
                await self._transport.send_bytes(body)
            except RuntimeError:  # the only one that RSGI's errors have in common
                self._leave()
                return
            if look and not self._finished:
                await self._ease()
        if self._written == self._length:
            self._deliver()
        elif self._finished and self._length is not None:
            self._transport = None  # Granian cuts the connection
            raise RuntimeError(f"the body is shorter than its Content-Length of {self._length}")

    def _count(self, size: int) -> bool:
        if self._backlog is None:
            self._backlog = Backlog(self._scope)
        return self._backlog.add(size, chunked=self._length is None)

    async def _ease(self) -> None:
        """Wait while Granian holds too much for this client."""
        assert self._backlog is not None
        pause, longest = PAUSES
        while self._backlog.full() and not self._over:
            self._watch()
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    def _whole(self, body: bytes) -> None:
        if self._length not in (None, len(body)) and not self._bodyless:
            raise RuntimeError(f"the body has {len(body)} bytes, its Content-Length says {self._length}")
        self._answered = self._finished = True
        if body:
            self._protocol.response_bytes(self._status, self._head, body)
        else:
            self._protocol.response_empty(self._status, self._head)
        self._end()

    # -- the end -----------------------------------------------------------------------------

    def missing(self) -> str | None:
        """What the application should have done before it returned."""
        if self._delivered:
            return None
        return "completing its response" if self._status else "a response"

    def close(self) -> None:
        """The application has ended. Whoever still holds on to ``receive`` is told so."""
        if not self._over:
            self._end()
        if not self._answered:
            # Nobody receives the first one, but Granian's access log has its status from here.
            self._answered = True
            if self.gone:
                self._protocol.response_empty(499, [])
            else:
                self._protocol.response_bytes(500, FAILURE, b"Internal Server Error")


class _Body:
    """The request's body, a piece at a time, as it is asked for.

    :ivar more: the application has not had its end yet
    :ivar broken: the client left in the middle of it
    """

    more = True
    broken = False
    _left: int | None = None  # bytes; None: nobody knows
    _pieces: AsyncIterator[bytes] | None = None
    _piece: asyncio.Future[Any] | None = None
    _message: Message | None = None
    _empty = 0  # pieces in a row

    def __init__(self, scope: Scope, protocol: HTTPProtocol, news: News) -> None:
        self._scope = scope
        self._protocol = protocol
        self._news = news

    def read(self) -> Message | None:
        """The next message; if it is not there yet, it is asked for."""
        if self._message is None and self._piece is None and not self.broken:
            self._ask()
        message, self._message = self._message, None
        if message is not None:
            self.more = message["more_body"]
        return message

    def stop(self) -> None:
        if self._piece is not None:
            self._piece.cancel()

    def _ask(self) -> None:
        if self._pieces is None:
            self._left = self._announced()
            if self._left == 0:
                return self._put(b"")
            self._pieces = self._protocol.__aiter__()
        try:
            piece = self._pieces.__anext__()
        except StopAsyncIteration:  # Granian's does not wait for that to be awaited
            self._ended()
        else:
            self._piece = self._news.ask(piece, self._came)

    def _announced(self) -> int | None:
        headers = self._scope.headers
        if "transfer-encoding" in headers:
            return None
        length = headers.get("content-length")
        if length is None:
            return 0 if self._over_http1() else None
        return int(length)

    def _over_http1(self) -> bool:
        return self._scope.http_version.startswith("1")

    def _came(self, future: asyncio.Future[Any]) -> None:
        self._piece = None
        if future.cancelled():
            return
        if (error := future.exception()) is not None:
            if isinstance(error, StopAsyncIteration):
                self._ended()
            else:
                self.broken = True
        elif piece := future.result():
            self._empty = 0
            self._put(piece)
        else:
            self._empty += 1
            # Over HTTP/2 Granian gives empty pieces for ever once the stream was reset.
            if self._left or self._empty > 2:
                self.broken = True
            else:
                self._ask()
        self._news.tell()

    def _put(self, piece: bytes) -> None:
        more = bool(piece)
        if self._left is not None:
            self._left -= len(piece)
            more = self._left > 0
        self._message = {"type": "http.request", "body": piece, "more_body": more}

    def _ended(self) -> None:
        # One empty piece is the end. A second one stands for trailers, for an empty frame (HTTP/2), or for an error.
        if self._left or (self._empty > 1 and self._over_http1() and "trailer" not in self._scope.headers):
            self.broken = True
        else:
            self._put(b"")


def _text(value: bytes) -> str:
    """Granian sends UTF-8, whatever it was."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")
