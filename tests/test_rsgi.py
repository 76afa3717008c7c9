"""An ASGI application on RSGI: in process, with a server that does what Granian does. No sockets but those of
``Backlog``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from fastapi import FastAPI, Request, WebSocket
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from fastapi_cancel import CancellableRoute
from fastapi_cancel.rsgi import RSGI, backlog
from fastapi_cancel.rsgi.backlog import MANY_LOOKS, STEP, Backlog, look

pytestmark = pytest.mark.anyio
App = Callable[[Scope, Receive, Send], Awaitable[None]]
OK: Message = {"type": "http.response.start", "status": 200, "headers": []}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Headers:
    def __init__(self, *items: tuple[str, str]) -> None:
        self._items = items

    def __contains__(self, name: str) -> bool:
        return name in dict(self._items)

    def get(self, name: str) -> str | None:
        return dict(self._items).get(name)

    def items(self) -> list[tuple[str, str]]:
        return list(self._items)


class FakeScope:
    proto: Any = "http"
    http_version = "1.1"
    server = "127.0.0.1:8000"
    client = "127.0.0.1:50000"
    scheme = "http"
    method = "GET"
    path = "/"
    query_string = ""
    authority: str | None = None

    def __init__(self, *headers: tuple[str, str], **values: Any) -> None:
        self.headers = Headers(*headers)
        vars(self).update(values)


class Protocol:
    """What Granian gives for one request.

    :param pieces: of the body; an exception is raised instead of one
    :ivar answers: what was answered with: the method's name, the status, the headers, the body
    """

    left = False

    def __init__(self, *pieces: bytes | Exception) -> None:
        self.pieces = list(pieces)
        self.asked = 0
        self.waiting: list[asyncio.Future[Any]] = []
        self.answers: list[tuple[str, int, list[tuple[str, str]], bytes]] = []
        self.transport: Transport | None = None

    def __aiter__(self) -> Protocol:
        return self

    def __anext__(self) -> Awaitable[bytes]:
        self.asked += 1
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        if not self.pieces:
            raise StopAsyncIteration
        piece = self.pieces.pop(0)
        if isinstance(piece, Exception):
            future.set_exception(piece)
        else:
            asyncio.get_running_loop().call_soon(self._give, future, piece)
        return future

    @staticmethod
    def _give(future: asyncio.Future[bytes], piece: bytes) -> None:
        if not future.done():
            future.set_result(piece)

    def client_disconnect(self) -> Awaitable[None]:
        self.waiting.append(asyncio.get_running_loop().create_future())
        if self.left:
            self.waiting[-1].set_result(None)
        return self.waiting[-1]

    def leave(self) -> None:
        """The client leaves."""
        self.left = True
        for future in self.waiting:
            if not future.done():
                future.set_result(None)
        if self.transport is not None:
            self.transport.closed = True

    def response_empty(self, status: int, headers: list[tuple[str, str]]) -> None:
        self.answers.append(("empty", status, headers, b""))

    def response_bytes(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.answers.append(("bytes", status, headers, body))

    def response_stream(self, status: int, headers: list[tuple[str, str]]) -> Transport:
        self.answers.append(("stream", status, headers, b""))
        self.transport = Transport()
        return self.transport


class Transport:
    closed = False

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    async def send_bytes(self, data: bytes) -> None:
        assert type(data) is bytes
        if self.closed:
            raise RuntimeError("RSGI transport is closed")
        self.sent.append(data)


async def serve(app: App, protocol: Any, *headers: tuple[str, str], **scope: Any) -> None:
    failed: list[AssertionError] = []

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except AssertionError as exc:  # which a server would only log
            failed.append(exc)

    async with asyncio.timeout(5):
        await RSGI(checked).__rsgi__(FakeScope(*headers, **scope), protocol)
    if failed:
        raise failed[0]


async def turns(count: int = 6) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def scope_of(*headers: tuple[str, str], root_path: str = "", **values: Any) -> Scope:
    scopes: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(scope)
        await PlainTextResponse("")(scope, receive, send)

    await RSGI(app, root_path).__rsgi__(FakeScope(*headers, **values), Protocol())
    return scopes[0]


# -- the scope -----------------------------------------------------------------------------------


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="app must be an ASGI application, not 3"):
        RSGI(3)  # type: ignore[arg-type]
    for path in ("api", "/api/"):
        with pytest.raises(ValueError, match=f"root_path must be .* not '{path}'"):
            RSGI(PlainTextResponse(""), path)
    with pytest.raises(ValueError, match="shutdown_timeout must be a number of seconds, 0 or more, not -1"):
        RSGI(PlainTextResponse(""), shutdown_timeout=-1)


async def test_scope_of_a_request() -> None:
    headers = (("host", "x"), ("a", "1"), ("a", "2"))
    scope = await scope_of(*headers, path="/é", query_string="a=%20", method="PUT", root_path="/api")
    assert scope == {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "PUT",
        "scheme": "http",
        "path": "/api/é",
        "root_path": "/api",
        "query_string": b"a=%20",
        "headers": [(b"host", b"x"), (b"a", b"1"), (b"a", b"2")],
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 8000),
        "state": {},
        "extensions": {},
    }


async def test_scope_over_http2() -> None:
    """ASGI: ``:authority`` is the host. RFC 9113, section 8.2.3: one Cookie, however many were sent."""
    headers = (("cookie", "a=1"), ("host", "old"), ("accept", "*/*"), ("cookie", "b=2"))
    scope = await scope_of(*headers, authority="new", http_version="2")
    assert scope["http_version"] == "2"
    assert scope["headers"] == [(b"host", b"new"), (b"accept", b"*/*"), (b"cookie", b"a=1; b=2")]
    assert (await scope_of(authority="new"))["headers"] == [(b"host", b"new")]


async def test_addresses_and_versions() -> None:
    scope = await scope_of(http_version="1", client="[::1]:5000", server="[::ffff:127.0.0.1]:80")
    assert (scope["http_version"], scope["client"]) == ("1.0", ("::1", 5000))
    assert scope["server"] == ("::ffff:127.0.0.1", 80)
    scope = await scope_of(client="", server="/run/granian.sock")
    assert (scope["client"], scope["server"]) == (None, ("/run/granian.sock", None))


# -- the request's body --------------------------------------------------------------------------


async def received(protocol: Protocol, *headers: tuple[str, str], **scope: Any) -> list[Message]:
    """What an application receives that reads to the end of the body."""
    messages: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while not messages or messages[-1].get("more_body"):
            messages.append(await receive())
        await PlainTextResponse("")(scope, receive, send)

    await serve(app, protocol, *headers, **scope)
    return messages


def request(body: bytes = b"", more_body: bool = False) -> Message:
    return {"type": "http.request", "body": body, "more_body": more_body}


DISCONNECT: Message = {"type": "http.disconnect"}
CHUNKED = ("transfer-encoding", "chunked")


def length(size: int) -> tuple[str, str]:
    return ("content-length", str(size))


async def test_a_request_without_a_body() -> None:
    protocol = Protocol()
    assert await received(protocol) == [request()]
    assert await received(protocol, length(0)) == [request()]
    assert protocol.asked == 0


async def test_the_last_piece_is_known_by_the_length() -> None:
    protocol = Protocol(b"ab", b"c", b"")
    assert await received(protocol, length(3)) == [request(b"ab", True), request(b"c")]
    assert protocol.asked == 2


@pytest.mark.parametrize("pieces", [[b"ab", b""], [b"", b"ab", b""]])
async def test_a_body_of_unknown_length(pieces: list[bytes]) -> None:
    assert await received(Protocol(*pieces), CHUNKED) == [request(b"ab", True), request()]


@pytest.mark.parametrize(
    ("headers", "pieces"),
    [
        ([length(9)], [b"ab", b"", b""]),
        ([length(9)], [b"ab"]),
        ([CHUNKED], [b"ab", b"", b""]),
        ([CHUNKED], [b"ab", RuntimeError("RSGI transport is closed")]),
    ],
)
async def test_a_body_that_is_cut_is_a_disconnect(headers: list[tuple[str, str]], pieces: list[Any]) -> None:
    """Granian ends a body that is cut as one that is complete, but for one more empty piece."""
    assert await received(Protocol(*pieces), *headers) == [request(b"ab", True), DISCONNECT]


async def test_trailers_are_no_disconnect() -> None:
    """They too are an empty piece."""
    pieces = [b"ab", b"", b""]
    assert (await received(Protocol(*pieces), CHUNKED, ("trailer", "digest")))[-1] == request()
    assert (await received(Protocol(*pieces), http_version="2"))[-1] == request()


async def test_a_stream_that_is_reset_gives_empty_pieces_for_ever() -> None:
    """HTTP/2, Granian 2.8."""
    protocol = Protocol(b"ab", *[b""] * 50)
    assert (await received(protocol, http_version="2"))[-1] == DISCONNECT
    assert protocol.asked == 4


async def test_an_iterator_that_ends_when_it_is_awaited() -> None:
    class Generator(Protocol):
        def __aiter__(self) -> Any:
            async def pieces() -> AsyncIterator[bytes]:
                yield b"ab"

            return pieces()

    assert await received(Generator(), CHUNKED) == [request(b"ab", True), request()]


async def test_nothing_is_read_before_it_is_asked_for_and_nothing_is_lost() -> None:
    """C4: a ``receive`` that is cancelled leaves one piece behind, for the next one."""
    protocol = Protocol(b"a", b"b", b"c")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await turns()
        assert protocol.asked == 0
        peek = asyncio.ensure_future(receive())
        await asyncio.sleep(0)
        assert peek.cancel()
        await turns()
        assert protocol.asked == 1
        both = await asyncio.gather(receive(), receive())
        assert [message["body"] for message in both] == [b"a", b"b"]
        assert await receive() == request(b"c")
        await PlainTextResponse("")(scope, receive, send)

    await serve(app, protocol, length(3))


# -- the client leaves ---------------------------------------------------------------------------


async def test_disconnect_at_once_and_always() -> None:
    protocol = Protocol()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert await receive() == request()
        waiting = [asyncio.ensure_future(receive()) for _ in range(2)]
        await turns()
        protocol.leave()
        assert await asyncio.gather(*waiting) == [DISCONNECT] * 2
        assert await receive() == DISCONNECT

    await serve(app, protocol)
    assert len(protocol.waiting) == 1
    assert protocol.answers == [("empty", 499, [], b"")]  # for the access log


async def test_peeks_leave_nothing_behind() -> None:
    protocol = Protocol()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        await request.body()
        for _ in range(10):
            assert not await request.is_disconnected()
        assert receive.__self__._waiters == set()  # type: ignore[attr-defined]
        protocol.leave()
        await turns()
        assert await request.is_disconnected()

    await serve(app, protocol)
    assert len(protocol.waiting) == 1


async def test_a_handler_is_cancelled_and_cleans_up(caplog: pytest.LogCaptureFixture) -> None:
    """C7, C13: natively, by what RSGI says; the access log has its 499."""
    app = FastAPI()
    app.router.route_class = CancellableRoute
    protocol = Protocol()
    cleaned = []

    @app.get("/")
    async def handler() -> None:
        asyncio.get_running_loop().call_later(0, protocol.leave)
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    await serve(app, protocol)
    assert cleaned
    assert [(how, status) for how, status, *_ in protocol.answers] == [("empty", 499)]
    assert caplog.records == []


async def test_send_raises_when_the_client_has_left(caplog: pytest.LogCaptureFixture) -> None:
    """C2: ASGI 2.4. Nobody had to receive for that."""
    protocol = Protocol()
    seen = []

    async def content() -> AsyncIterator[bytes]:
        yield b"first"
        protocol.leave()
        try:
            yield b"second"
            yield b"third"
        finally:
            seen.append("closed")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        response = StreamingResponse(content())
        with pytest.raises(ClientDisconnect):
            await response(scope, receive, send)
        for _ in range(2):
            with pytest.raises(OSError, match="the client has left"):
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
        assert await receive() == DISCONNECT
        await send({"type": "http.response.body"})

    await serve(app, protocol)
    assert protocol.transport is not None
    assert protocol.transport.sent == [b"first"]
    assert caplog.records == []


async def test_a_stream_is_not_begun_for_a_client_that_has_left() -> None:
    protocol = Protocol()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        waiting = asyncio.ensure_future(receive())
        await turns()
        protocol.leave()
        await waiting
        await send(OK)
        await turns()
        await send({"type": "http.response.body", "more_body": True})

    await serve(app, protocol)
    assert protocol.answers == [("empty", 499, [], b"")]


async def test_an_error_is_not_lost_with_its_client(caplog: pytest.LogCaptureFixture) -> None:
    """C13: Starlette sends a 500 first, and raises the error again after that."""
    app = FastAPI()
    protocol = Protocol()

    @app.get("/")
    async def handler(request: Request) -> None:
        while not await request.is_disconnected():
            protocol.leave()
            await turns()
        raise ValueError("a real one")

    await serve(app, protocol)
    assert [status for _, status, *_ in protocol.answers] == [500]
    assert "a real one" in caplog.text


# -- the response --------------------------------------------------------------------------------


async def test_a_whole_response_goes_out_at_once() -> None:
    protocol = Protocol()
    headers = {"x-latin": "é", "set-cookie": "a"}
    await serve(PlainTextResponse("hello", 201, headers), protocol)
    ((how, status, head, body),) = protocol.answers
    assert (how, status, body) == ("bytes", 201, b"hello")
    assert ("x-latin", "é") in head and ("content-length", "5") in head and ("set-cookie", "a") in head


async def test_utf8_in_a_header_stays_as_it_is() -> None:
    """RSGI encodes header values as UTF-8."""
    protocol = Protocol()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({**OK, "headers": [(b"x-name", "日本".encode()), (b"x-latin", "é".encode("latin-1"))]})
        await send({"type": "http.response.body"})

    await serve(app, protocol)
    assert protocol.answers == [("empty", 200, [("x-name", "日本"), ("x-latin", "é")], b"")]


@pytest.mark.parametrize(
    ("method", "status", "expected"), [("HEAD", 200, "bytes"), ("GET", 304, "bytes"), ("GET", 204, "empty")]
)
async def test_a_length_without_its_body(method: str, status: int, expected: str) -> None:
    protocol = Protocol()
    body = b"x" if expected == "bytes" else b""
    await serve(PlainTextResponse(body, status, {"content-length": "9"}), protocol, method=method)
    assert [how for how, *_ in protocol.answers] == [expected]


async def test_the_head_does_not_wait_for_the_body() -> None:
    """Browsers call an EventSource open when they have it."""
    protocol = Protocol()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(OK)
        assert protocol.answers == []
        await turns()
        assert protocol.answers == [("stream", 200, [], b"")]
        await send({"type": "http.response.body", "body": memoryview(b"one"), "more_body": True})
        await send({"type": "http.response.body", "body": b"two"})

    await serve(app, protocol)
    assert protocol.transport is not None
    assert protocol.transport.sent == [b"one", b"two"]


async def test_a_body_that_comes_at_once_goes_with_its_head() -> None:
    protocol = Protocol()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(OK)
        await send({"type": "http.response.body", "body": b"ok"})
        await turns()

    await serve(app, protocol)
    assert protocol.answers == [("bytes", 200, [], b"ok")]


@pytest.mark.parametrize("headers", [[], [(b"Content-Length", b"6")]])
async def test_a_complete_response_is_not_a_disconnect(headers: list[tuple[bytes, bytes]]) -> None:
    """C5: Granian says that the client has left when it has taken the last byte of a stream."""
    protocol = Protocol()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        waiting = asyncio.ensure_future(receive())
        await turns()
        await send({**OK, "headers": headers})
        await send({"type": "http.response.body", "body": b"abc", "more_body": True})
        await send({"type": "http.response.body", "body": b"def", "more_body": bool(headers)})
        assert protocol.waiting[0].cancelled()  # it would live as long as the server
        protocol.leave()
        await turns()
        if headers:  # the client has all, the application may have something to do yet
            receive.__self__._left(protocol.waiting[0])  # type: ignore[attr-defined]
            await turns()
            assert not waiting.done()
            peek = asyncio.ensure_future(receive())
            await send({"type": "http.response.body", "more_body": True})
            assert not peek.done()
            await send({"type": "http.response.body"})
        assert await waiting == await receive() == DISCONNECT
        assert len(protocol.waiting) == 1

    await serve(app, protocol)
    assert [how for how, *_ in protocol.answers] == ["stream"]


async def test_a_length_that_is_reached_is_a_complete_response(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody asks Granian any more, and the last message adds nothing."""
    protocol = Protocol()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({**OK, "headers": [(b"content-length", b"3")]})
        await send({"type": "http.response.body", "body": b"abc", "more_body": True})
        waiting = asyncio.ensure_future(receive())
        await turns()
        waiting.cancel()

    await serve(app, protocol)
    assert protocol.waiting == []
    assert caplog.records == []


async def test_a_disconnect_that_crosses_the_end_of_the_response() -> None:
    """Granian's futures call back by the event loop: it may be on its way."""
    protocol = Protocol()
    ran = []

    async def background() -> None:
        await turns()
        ran.append(True)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        waiting = asyncio.ensure_future(receive())
        await turns()
        exchange = send.__self__  # type: ignore[attr-defined]
        await PlainTextResponse("ok", background=BackgroundTask(background))(scope, receive, send)
        exchange._left(protocol.waiting[0])
        assert not exchange.gone
        await waiting

    await serve(app, protocol)
    assert ran == [True]


async def test_an_unread_body_is_let_go_with_the_response(caplog: pytest.LogCaptureFixture) -> None:
    class Slow(Protocol):
        def __anext__(self) -> Awaitable[bytes]:
            return self.client_disconnect()  # type: ignore[return-value]

    protocol = Slow()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        waiting = asyncio.ensure_future(receive())
        await turns()
        await PlainTextResponse("too much", 413)(scope, receive, send)
        assert await waiting == DISCONNECT
        await turns()

    await serve(app, protocol, length(9))
    assert protocol.waiting[0].cancelled()
    assert caplog.records == []


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204)])
@pytest.mark.parametrize("first", [b"", b"one"])
async def test_a_stream_of_which_the_head_alone_is_wanted(method: str, status: int, first: bytes) -> None:
    """sysid/sse-starlette#218: it would go on for ever. A response that has no body is just complete a little later."""
    protocol = Protocol()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        waiting = asyncio.ensure_future(receive())
        await turns()
        await send({**OK, "status": status})
        await turns()
        protocol.leave()  # so says Granian
        await turns()
        assert waiting.done() == (method == "HEAD")
        if first:
            with pytest.raises(OSError, match="the head alone"):
                await send({"type": "http.response.body", "body": first, "more_body": True})
        else:
            await send({"type": "http.response.body"})
            assert await waiting == DISCONNECT

    await serve(app, protocol, method=method)
    assert [(how, status) for how, status, *_ in protocol.answers] == [("stream", status)]


BODY: Message = {"type": "http.response.body", "body": b"abc"}
SHORT = {**OK, "headers": [(b"content-length", b"2")]}
LONG = {**OK, "headers": [(b"content-length", b"9")]}
PIECE = {**BODY, "more_body": True}


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([BODY], "http.response.body cannot be sent before http.response.start"),
        ([OK, OK], "http.response.start cannot be sent after http.response.start"),
        ([OK, {"type": "http.response.trailers"}], "http.response.trailers cannot be sent"),
        ([OK, BODY, BODY], "http.response.body cannot be sent after the response"),
        ([{**OK, "status": 99}], "status must be from 200 to 999, not 99"),
        ([{**OK, "status": 1000}], "status must be from 200 to 999, not 1000"),
        ([SHORT, BODY], "the body has 3 bytes, its Content-Length says 2"),
        ([SHORT, PIECE], "the body is longer than its Content-Length of 2"),
        ([LONG, PIECE, BODY], "the body is shorter than its Content-Length of 9"),
    ],
)
async def test_what_cannot_be_sent_is_refused(messages: list[Message], complaint: str) -> None:
    """A status or a length that is wrong ends Granian's worker, or is taken for the next response."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages[:-1]:
            await send(message)
        with pytest.raises((RuntimeError, ValueError), match=complaint):
            await send(messages[-1])

    await serve(app, Protocol())


# -- errors --------------------------------------------------------------------------------------


async def test_an_error_before_the_response(caplog: pytest.LogCaptureFixture) -> None:
    protocol = Protocol()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(SHORT)
        raise ValueError("broken")

    await serve(app, protocol, path="/x")
    (answer,) = protocol.answers
    assert (answer[:2], answer[3]) == (("bytes", 500), b"Internal Server Error")
    assert [(record.name, record.message) for record in caplog.records] == [("fastapi_cancel", "GET /x failed")]
    assert "ValueError: broken" in caplog.text


async def test_an_error_within_the_response(caplog: pytest.LogCaptureFixture) -> None:
    protocol = Protocol()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(OK)
        await send(PIECE)
        raise ExceptionGroup("", [ValueError("broken")])

    await serve(app, protocol)
    assert [how for how, *_ in protocol.answers] == ["stream"]
    assert "ValueError: broken" in caplog.text


@pytest.mark.parametrize(
    ("messages", "missing", "status"),
    [([], "a response", 500), ([LONG], "completing its response", 500), ([OK, PIECE], "completing its response", 200)],
)
async def test_an_application_that_returns_too_early(
    messages: list[Message], missing: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    protocol = Protocol()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    await serve(app, protocol)
    assert [answer[1] for answer in protocol.answers] == [status]
    assert [record.message for record in caplog.records] == [f"GET / returned without {missing}"]


async def test_a_cancellation_goes_through() -> None:
    """C14: the server's own."""
    protocol = Protocol()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(60)

    task = asyncio.create_task(serve(app, protocol))
    await turns()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [status for _, status, *_ in protocol.answers] == [500]


# -- back-pressure -------------------------------------------------------------------------------


class Kernel:
    """Says how much was written, and how much of that has arrived."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *looks: tuple[int, int] | None) -> None:
        self.says(*looks)
        monkeypatch.setattr(backlog, "look", self.look)

    def look(self, client: str, server: str) -> tuple[int, int] | None:
        assert self.looks, "one look too many"
        return self.looks.pop(0)

    def says(self, *looks: tuple[int, int] | None) -> None:
        self.looks = list(looks)


@pytest.mark.parametrize("headers", [[], [(b"content-length", b"%d" % (9 * STEP))]])
async def test_a_stream_waits_for_its_client(
    headers: list[tuple[bytes, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """C18, HenryLach/taskplane#664: RSGI takes whatever it is given."""
    # The second last is enough if there is nothing but the body; a chunk has its size around it.
    kernel = Kernel(monkeypatch, (100, 0), (100, 0), (100, 0), (100 + 2 * STEP, 0), (109 + 2 * STEP, 0))
    protocol = Protocol()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({**OK, "headers": headers})
        await send({"type": "http.response.body", "body": b"x" * 100, "more_body": True})
        assert len(kernel.looks) == 5
        await send({"type": "http.response.body", "body": b"x" * 3 * STEP, "more_body": True})
        assert len(kernel.looks) == len(headers)
        await send({"type": "http.response.body", "body": b"x", "more_body": True})

    await serve(app, protocol)
    assert protocol.transport is not None
    assert len(protocol.transport.sent) == 3


async def test_a_client_leaves_while_the_stream_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    Kernel(monkeypatch, *[(100, 0)] * 100)
    protocol = Protocol()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        asyncio.get_running_loop().call_later(0.01, protocol.leave)
        await send(OK)
        with pytest.raises(OSError, match="the client has left"):
            await send({"type": "http.response.body", "body": b"x" * 3 * STEP, "more_body": True})

    await serve(app, protocol)


def full(backlog: Backlog, size: int) -> bool:
    return backlog.add(size, chunked=False) and backlog.full()


def test_what_granian_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch)
    backlog = Backlog(FakeScope())
    assert not full(backlog, STEP - 1)
    kernel.says((1000, 0), (1000, 0))  # the first look is before the piece
    assert not full(backlog, STEP)
    kernel.says((1000, 0))
    assert full(backlog, STEP)
    kernel.says((1000 + STEP, 0))
    assert not backlog.full()
    kernel.says((1000 + 9 * STEP, 0))
    assert not full(backlog, STEP)  # other streams of the same connection
    kernel.says((1000 + 9 * STEP, 0))
    assert full(backlog, 2 * STEP)
    kernel.says(None)
    assert not backlog.full()  # it has ended


@pytest.mark.parametrize("version", ["1.1", "2"])
def test_what_was_miscounted_is_not_waited_for(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over HTTP/2 it may be the client's window."""
    kernel = Kernel(monkeypatch, (0, 0), (100, 0))
    backlog = Backlog(FakeScope(http_version=version))
    assert full(backlog, 2 * STEP)
    for looks in (MANY_LOOKS - 1, MANY_LOOKS):
        kernel.says((100, 99), *[(100, 100)] * looks)
        assert [backlog.full() for _ in range(looks)] == [True] * looks
        assert backlog.full() == (version == "2" or looks < MANY_LOOKS)


@pytest.mark.parametrize(("version", "chunked", "size"), [("1.1", True, 15), ("1.1", False, 10), ("2", True, 10)])
def test_the_framing_of_a_chunk(version: str, chunked: bool, size: int) -> None:
    backlog = Backlog(FakeScope(http_version=version))
    backlog.add(10, chunked)
    assert backlog._handed == size


def test_nobody_knows_what_granian_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    Kernel(monkeypatch, None, None, None, None)
    backlog = Backlog(FakeScope())
    assert not full(backlog, 9 * STEP)
    assert not full(backlog, 9 * STEP)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_kernel_says_what_was_written(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    text = "[{}]:{}" if ":" in host else "{}:{}"
    anywhere = text.format("::" if ":" in host else "0.0.0.0", "{}")
    with socket.create_server((host, 0), family=family) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection((host, port)) as client:
            accepted, _ = listener.accept()
            with accepted:
                there = text.format(*client.getsockname())
                assert look(there, text.format(host, port)) == (0, 0)
                accepted.sendall(b"hello")
                assert client.recv(100) == b"hello"
                assert look(there, anywhere.format(port)) == (5, 5)
                accepted.setblocking(False)
                sent = 5
                with contextlib.suppress(BlockingIOError):
                    while True:
                        sent += accepted.send(b"x" * 65536)
                written, arrived = look(there, text.format(host, port)) or (0, 0)
                assert (written, arrived < sent) == (sent, True)
        assert look(text.format(host, 1), text.format(host, port)) is None
    assert look(text.format(host, 1), text.format(host, port)) is None


def test_nobody_knows_of_other_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    assert look("", "/run/granian.sock") is None
    assert look("nobody:1", "nowhere:2") is None
    answer = struct.pack("=IHHII", 100, 20, 0, 1, 0) + bytes(72)
    for attribute in (struct.pack("=HHI", 8, 1, 0), struct.pack("=HH", 0, 1)):
        assert backlog._parse(answer + attribute) is None
    monkeypatch.setattr("sys.platform", "plan9")
    assert look("127.0.0.1:1", "127.0.0.1:2") is None


# -- WebSockets ----------------------------------------------------------------------------------


class Sent:
    """A message, as Granian has it."""

    def __init__(self, kind: int, data: Any = None) -> None:
        self.kind = kind
        self.data = data


class SocketProtocol:
    """What Granian gives for one WebSocket.

    :param messages: what the client sends; an exception is raised instead. After the last one: silence
    """

    def __init__(self, *messages: Sent | Exception, accepts: bool = True) -> None:
        self.messages = list(messages)
        self.accepts = accepts
        self.sent: list[Any] = []
        self.closed: list[int | None] = []
        self.pending: list[asyncio.Future[Any]] = []
        self.gone = False

    async def accept(self) -> SocketProtocol:
        if not self.accepts:
            raise RuntimeError("RSGI protocol error")
        return self

    def close(self, status: int | None = None) -> None:
        self.closed.append(status)

    def receive(self) -> Awaitable[Sent]:
        future: asyncio.Future[Sent] = asyncio.get_running_loop().create_future()
        self.pending.append(future)
        if self.messages:
            message = self.messages.pop(0)
            if isinstance(message, Exception):
                future.set_exception(message)
            else:
                future.set_result(message)
        return future

    async def send_str(self, data: str) -> None:
        if self.gone:
            raise RuntimeError("RSGI transport is closed")
        self.sent.append(data)

    async def send_bytes(self, data: bytes) -> None:
        await self.send_str(data)  # type: ignore[arg-type]


async def converse(app: App, protocol: SocketProtocol, *headers: tuple[str, str]) -> None:
    await serve(app, protocol, *headers, proto="ws", scheme="https", path="/ws")


ACCEPT: Message = {"type": "websocket.accept"}


async def test_a_conversation() -> None:
    app = FastAPI()

    @app.websocket("/ws")
    async def echo(websocket: WebSocket) -> None:
        assert websocket.scope["scheme"] == "wss"
        assert websocket.scope["subprotocols"] == ["a", "b"]
        await websocket.accept()
        await websocket.send_text(await websocket.receive_text())
        await websocket.send_bytes(await websocket.receive_bytes())
        await websocket.close(1001)

    protocol = SocketProtocol(Sent(2, "text"), Sent(1, b"bytes"))
    await converse(app, protocol, ("sec-websocket-protocol", "a, b"))
    assert protocol.sent == ["text", b"bytes"]
    assert protocol.closed == [None]


@pytest.mark.parametrize(("end", "code"), [(Sent(0), 1005), (RuntimeError("RSGI transport is closed"), 1006)])
async def test_the_client_closes_a_websocket(end: Any, code: int) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert await receive() == {"type": "websocket.connect"}
        waiting = asyncio.ensure_future(receive())  # some do before they accept
        await turns()
        await send(ACCEPT)
        disconnect = {"type": "websocket.disconnect", "code": code, "reason": ""}
        assert await waiting == await receive() == disconnect
        with pytest.raises(OSError, match="the client has left"):
            await send({"type": "websocket.send", "text": "late"})

    protocol = SocketProtocol(end)
    await converse(app, protocol)
    assert protocol.closed == [None]


async def test_a_message_is_not_lost_with_who_waited_for_it() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(ACCEPT)
        peek = asyncio.ensure_future(receive())
        await asyncio.sleep(0)
        peek.cancel()
        await turns()
        assert (await receive())["text"] == "text"

    await converse(app, SocketProtocol(Sent(2, "text")))


async def test_sending_finds_the_client_gone(caplog: pytest.LogCaptureFixture) -> None:
    protocol = SocketProtocol()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        protocol.gone = True
        await send({"type": "websocket.send", "text": "late"})

    await converse(app, protocol)
    assert caplog.records == []


async def test_the_client_leaves_before_it_is_accepted(caplog: pytest.LogCaptureFixture) -> None:
    protocol = SocketProtocol(accepts=False)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(ACCEPT)

    await converse(app, protocol)
    assert caplog.records == []


async def test_a_websocket_is_refused() -> None:
    protocol = SocketProtocol()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.close", "code": 4000})
        assert (await receive())["code"] == 4000

    await converse(app, protocol)
    assert protocol.closed == [403]


async def test_a_websocket_that_nobody_took_up(caplog: pytest.LogCaptureFixture) -> None:
    protocol = SocketProtocol()

    async def app(scope: Scope, receive: Receive, send: Send) -> None: ...

    await converse(app, protocol)
    assert protocol.closed == [500]
    assert "WebSocket /ws returned without accepting the connection or closing it" in caplog.text


async def test_a_websocket_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    protocol = SocketProtocol()
    task: list[asyncio.Future[Message]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(ACCEPT)
        task.append(asyncio.ensure_future(receive()))
        await turns()
        raise ValueError("broken")

    await converse(app, protocol)
    assert protocol.closed == [None]
    assert protocol.pending[0].cancelled()
    assert (await task[0])["type"] == "websocket.disconnect"
    assert "WebSocket /ws failed" in caplog.text and "ValueError: broken" in caplog.text


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([{"type": "websocket.send", "text": "x"}], "websocket.send cannot be sent before websocket.accept"),
        ([{**ACCEPT, "subprotocol": "chat"}], "RSGI cannot accept a WebSocket with subprotocol: 'chat'"),
        ([{**ACCEPT, "headers": [(b"a", b"b")]}], "RSGI cannot accept a WebSocket with headers: "),
        ([ACCEPT, ACCEPT], "websocket.accept cannot be sent after websocket.accept"),
        ([{"type": "websocket.close"}, ACCEPT], "websocket.accept cannot be sent after websocket.close"),
    ],
)
async def test_what_cannot_be_sent_over_a_websocket(messages: list[Message], complaint: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages[:-1]:
            await send(message)
        with pytest.raises(RuntimeError, match=complaint):
            await send(messages[-1])
        await send({"type": "websocket.close"}) if len(messages) == 1 else None

    await converse(app, SocketProtocol())


# -- lifespan ------------------------------------------------------------------------------------


@pytest.fixture
def worker() -> Any:
    """``worker(app)``: from start-up to shutdown, with two requests between; the loop stands still around them."""
    loop = asyncio.new_event_loop()

    def run(app: App) -> Protocol:
        protocol = Protocol()
        application = RSGI(app)
        application.__rsgi_init__(loop)
        for _ in range(2):
            loop.run_until_complete(application.__rsgi__(FakeScope(), protocol))
        application.__rsgi_del__(loop)
        return protocol

    yield run
    assert asyncio.all_tasks(loop) == set()
    loop.close()


Worker = Callable[[App], Protocol]


def lifespan(*answers: str, error: Exception | None = None, **more: Any) -> App:
    """An application that answers so to start-up and shutdown."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await PlainTextResponse(repr(scope["state"]))(scope, receive, send)
            return
        for answer in answers:
            await receive()
            await send({"type": f"lifespan.{answer}", **more})
        await turns()
        if error is not None:
            raise error

    return app


def test_the_lifespan_runs_in_one_task_and_its_state_is_given_to_requests(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            scope["state"]["database"] = "open"
            for what in ("startup", "shutdown"):
                seen.append((await receive(), asyncio.current_task()))
                await send({"type": f"lifespan.{what}.complete"})
            await receive()  # there is nothing more: it is not waited for
        else:
            await PlainTextResponse(scope["state"]["database"])(scope, receive, send)
            seen.append(scope["state"].copy())
            scope["state"]["mine"] = True

    caplog.set_level(logging.INFO, "fastapi_cancel")
    protocol = worker(app)
    assert protocol.answers[0][3] == b"open"
    (startup, first), *states, (shutdown, second) = seen
    assert (startup, shutdown) == ({"type": "lifespan.startup"}, {"type": "lifespan.shutdown"})
    assert first is second
    assert states == [{"database": "open"}] * 2
    assert caplog.records == []


def test_a_failed_startup_is_raised(worker: Worker) -> None:
    """Granian stops then, and says why."""
    with pytest.raises(ValueError, match="no database"):
        worker(lifespan("startup.failed", error=ValueError("no database"), message="Traceback"))
    with pytest.raises(RuntimeError, match="no database"):
        worker(lifespan("startup.failed", message="no database"))
    with pytest.raises(RuntimeError, match="the start-up failed"):
        worker(lifespan("startup.failed"))


@pytest.mark.parametrize("app", [lifespan(), lifespan(error=TypeError("http only"))])
def test_an_application_without_a_lifespan(worker: Worker, app: App, caplog: pytest.LogCaptureFixture) -> None:
    """ASGI: the server must go on."""
    caplog.set_level(logging.INFO, "fastapi_cancel")
    assert worker(app).answers[0][3] == b"{}"
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", "the application has no lifespan")
    ]


@pytest.mark.parametrize(
    ("app", "said"),
    [
        (lifespan("startup.complete", "shutdown.failed", message="too late"), "the shutdown failed: too late"),
        (lifespan("startup.complete", "shutdown.failed", error=ValueError("too late")), "ValueError: too late"),
        (lifespan("startup.complete", error=ValueError("in between")), "ValueError: in between"),
    ],
)
def test_a_failed_shutdown_is_logged(worker: Worker, app: App, said: str, caplog: pytest.LogCaptureFixture) -> None:
    worker(app)
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert said in caplog.text


@pytest.mark.parametrize("patience", [0, 30])
def test_what_has_no_connection_any_more_is_waited_for(patience: float, caplog: pytest.LogCaptureFixture) -> None:
    """C12, C14: Granian itself waits for connections alone."""
    seen: list[str] = []

    async def background() -> None:
        await turns(50)
        seen.append("background")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await lifespan("startup.complete", "shutdown.complete")(scope, receive, send)
            seen.append("shutdown")
        else:
            await PlainTextResponse("", background=BackgroundTask(background))(scope, receive, send)

    loop = asyncio.new_event_loop()
    application = RSGI(app, shutdown_timeout=patience)
    application.__rsgi_init__(loop)
    request = loop.create_task(application.__rsgi__(FakeScope(), Protocol()))
    loop.run_until_complete(turns())
    application.__rsgi_del__(loop)
    if patience:
        assert seen == ["background", "shutdown"]
        assert caplog.records == []
    else:
        assert seen == ["shutdown"]
        assert [record.message for record in caplog.records] == ["1 requests have not ended within 0 s"]
    loop.run_until_complete(request)
    loop.close()


async def test_without_init_there_is_no_state() -> None:
    """RSGI's hooks are optional."""
    protocol = Protocol()
    await serve(lifespan(), protocol)
    assert protocol.answers[0][3] == b"{}"
