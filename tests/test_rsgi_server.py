"""Granian's RSGI interface: a real server, and clients that leave."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import DataReceived, StreamEnded
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, CloseConnection, Event, RejectConnection, Request, TextMessage

from fastapi_cancel.testing import LiveServer, LiveServerError, RawClient

from .conftest import DEADLINE, Start, assert_nothing_left, fresh

SERVER = "granian-rsgi"
WORK = ["/handler", "/stream", "/plain-stream", "/sse", "/json-lines", "/stream-on-plain-route"]
MIB = 1 << 20


@pytest.fixture
def rsgi(running: Start) -> LiveServer:
    return running(SERVER)


@pytest.fixture(scope="module")
def more_once() -> Iterator[LiveServer]:
    with LiveServer("tests.rsgi_app:more", SERVER, access_log=True) as server:
        yield server


@pytest.fixture
def more(more_once: LiveServer) -> LiveServer:
    return fresh(more_once)


# -- clients leave -------------------------------------------------------------------------------


@pytest.mark.parametrize("leave", ["abort", "close"])
@pytest.mark.parametrize("path", WORK)
@pytest.mark.parametrize("middleware", [0, 5])
def test_cleanup_awaits_after_disconnect(running: Start, middleware: int, path: str, leave: str) -> None:
    """C1, C2, C3, C7, C13, C21: 5 of 5 cleanups run to their end, nothing is left, nothing is logged."""
    live = running(SERVER, middleware)
    clients = [live.open(path) for _ in range(5)]
    if path != "/handler":
        for client in clients:
            client.until(b"first")
    live.wait_for("/stats", started=5)
    for client in clients:
        getattr(client, leave)()
    live.wait_for("/stats", cleaned=5)
    assert_nothing_left(live)
    if middleware:
        expected = 499 if path == "/handler" else 200
        assert live.json("/stats")["statuses"] == [expected] * 5 * middleware


@pytest.mark.parametrize("middleware", [0, 5])
def test_event_streams_are_cleaned_up(middleware: int) -> None:
    """C19: SSEResponse, with its hooks."""
    with LiveServer("tests.sse_app:app", SERVER, env={"MIDDLEWARE": str(middleware)}) as server:
        for client in [server.open("/route/idle?heartbeat=0.05") for _ in range(5)]:
            client.until(b": ping - ")
            client.abort()
        marks = ("generator", "on_disconnect", "cleanup")
        expected = {f"{number} {mark}" for number in range(1, 6) for mark in marks}
        end = time.monotonic() + DEADLINE
        while set(server.json("/stats")["seen"]) != expected:
            assert time.monotonic() < end, server.json("/stats")
        assert_nothing_left(server)


def test_access_log_sees_499(rsgi: LiveServer) -> None:
    """C13."""
    client = rsgi.open("/handler")
    rsgi.wait_for("/stats", started=1)
    client.abort()
    rsgi.wait_for_log(" 499 ")
    assert_nothing_left(rsgi)


def test_client_gone_before_the_first_byte(rsgi: LiveServer) -> None:
    """C11."""
    client = rsgi.open("/never-started")
    rsgi.wait_for("/stats", started=1)
    client.abort()
    rsgi.wait_for("/stats", cleaned=1)
    assert_nothing_left(rsgi)


def test_send_ends_a_plain_stream(more: LiveServer) -> None:
    """C2: Starlette trusts an ASGI 2.4 server to raise; nobody else is there to notice."""
    client = more.open("/plain/endless")
    client.until(b"a\r\n")
    client.abort()
    more.wait_for("/stats", cleaned=1)
    assert_nothing_left(more)


@pytest.mark.parametrize("path", ["/endless", "/plain/endless"])
def test_a_head_request_does_not_leave_its_stream_running(more: LiveServer, path: str) -> None:
    """sysid/sse-starlette#218."""
    with more.open(path, "HEAD") as client:
        assert client.head()[0] == 200
        assert_nothing_left(more)


# -- keep-alive ----------------------------------------------------------------------------------


def test_keep_alive_connection_cut_in_its_third_request(rsgi: LiveServer) -> None:
    with rsgi.connect() as client:
        for _ in range(2):
            client.request("/hello")
            assert client.response() == (200, b'"hello"')
        client.request("/handler")
        rsgi.wait_for("/stats", started=1)
        client.abort()
    rsgi.wait_for("/stats", cleaned=1)
    assert_nothing_left(rsgi)


def test_a_connection_survives_requests_of_every_kind(more: LiveServer) -> None:
    """C5: Granian's disconnect comes with the end of each streamed response too; no background task is lost to it."""
    rounds = 30
    with more.connect() as client:
        for number in range(1, rounds + 1):
            body = b"x" * 1000 * number
            client.request("/size", "POST", body=body)
            assert client.response() == (200, b"%d" % len(body))
            client.request("/size", "POST", "Transfer-Encoding: chunked\r\nNo-Length: 1\r\n", chunked(body))
            assert client.response() == (200, b"%d" % len(body))
            for route in ("", "/plain"):
                client.request(f"{route}/letters?count={number}")
                assert client.response() == (200, b"a" * number)
                client.request(f"{route}/letters?count={number}&length={number}")
                assert client.response() == (200, b"a" * number)
    more.wait_for("/stats", cleaned=4 * rounds, seen=["end"] * 4 * rounds)
    assert_nothing_left(more)


def test_a_background_task_outlives_its_client(rsgi: LiveServer) -> None:
    """C5: the client uses its connection again, and is cut there."""
    with rsgi.connect() as client:
        client.request("/background")
        assert client.response() == (200, b'"done"')
        client.request("/handler")
        rsgi.wait_for("/stats", started=1)
        client.abort()
    rsgi.wait_for("/stats", cleaned=2)
    assert_nothing_left(rsgi)


# -- uploads -------------------------------------------------------------------------------------


def chunked(body: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"%x\r\n%b\r\n%b" % (len(body), body, end)


@pytest.mark.parametrize("middleware", [0, 5])
@pytest.mark.parametrize("with_length", [True, False])
def test_upload_cut_in_the_middle(running: Start, middleware: int, with_length: bool) -> None:
    """C4: Granian's end of the body is not taken for the body's."""
    live = running(SERVER, middleware)
    if with_length:
        client = live.open("/upload", "POST", f"Content-Length: {MIB}\r\n", b"x" * 1000)
    else:
        # The second header keeps the client from announcing a length.
        headers = "Transfer-Encoding: chunked\r\nNo-Length: 1\r\n"
        client = live.open("/upload", "POST", headers, chunked(b"x" * 1000, b""))
    live.wait_for("/stats", started=1)
    while live.json("/stats")["seen"][:1] != [1000]:
        pass
    client.abort()
    assert live.wait_for("/stats", cleaned=1)["seen"] == ["ClientDisconnect"]
    assert_nothing_left(live)


def test_client_leaves_while_the_handler_works_on_a_piece(rsgi: LiveServer) -> None:
    """C4: one piece is read ahead, and that one is the disconnect."""
    client = rsgi.open("/upload-then-work", "POST", f"Content-Length: {MIB}\r\n", b"x" * 1000)
    rsgi.wait_for("/stats", seen=["chunk"])
    client.abort()
    rsgi.wait_for("/stats", cleaned=1)
    assert_nothing_left(rsgi)


def test_a_large_upload_read_slowly_stays_out_of_memory(rsgi: LiveServer) -> None:
    """C4: back-pressure stays with the server."""
    before = rsgi.json("/stats")["memory"]
    size = 50 * MIB
    with rsgi.open("/upload?stall=0.5&pause=0.001", "POST", f"Content-Length: {size}\r\n") as client:
        sent = 0
        while sent < size:
            sent += client.socket.send(b"x" * min(MIB, size - sent))
        assert client.response()[0] == 200
    state = rsgi.json("/stats")
    assert state["seen"][0] == size
    assert state["seen"][1] - before < 16 * MIB
    assert_nothing_left(rsgi)


def test_an_expected_continue_is_not_invited_by_reading_ahead(rsgi: LiveServer) -> None:
    """C4."""
    with rsgi.open("/refuse", "POST", f"Content-Length: {MIB}\r\nExpect: 100-continue\r\n") as client:
        assert client.response() == (413, b"too much")
    with rsgi.open("/upload", "POST", "Content-Length: 4\r\nExpect: 100-continue\r\n") as client:
        assert client.head()[0] == 100
        client.socket.sendall(b"body")
        assert client.response()[0] == 200
    assert_nothing_left(rsgi)


# -- clients that do not read --------------------------------------------------------------------


def slow_client(live: LiveServer, path: str) -> RawClient:
    """One whose receive buffer stays small: Linux lets it grow to more than is left of a flood."""
    return live.open(path, receive_buffer=256 << 10)


def wait_until_stuck(live: LiveServer) -> None:
    """Wait until one `send` has waited for 0.2 s."""
    live.wait_for("/stats", sending=lambda sending: any(seconds > 0.2 for seconds in sending))


def skip(client: RawClient, size: int) -> None:
    """Read so much, and forget it."""
    for begin in range(0, size, MIB):
        client.exactly(min(MIB, size - begin))


@pytest.mark.parametrize("path", ["/flood", "/plain-flood"])
def test_what_a_client_may_hold_has_a_bound(rsgi: LiveServer, path: str) -> None:
    """C18, HenryLach/taskplane#664: RSGI takes whatever it is given. Whoever reads again goes on."""
    before = rsgi.json("/stats")["memory"]
    client = slow_client(rsgi, path)
    rsgi.wait_for("/stats", started=1)
    for _ in range(3):
        wait_until_stuck(rsgi)
        assert rsgi.json("/stats")["memory"] - before < 16 * MIB
        skip(client, 20 * MIB)
    client.abort()
    rsgi.wait_for("/stats", cleaned=1)
    assert_nothing_left(rsgi)


def test_a_client_leaves_when_its_stream_is_nearly_through(more: LiveServer) -> None:
    """C11: be it before the last chunk, or while the generator already cleans up because it is at its end."""
    client = slow_client(more, "/flood")
    more.wait_for("/stats", started=1)
    for _ in range(3):
        wait_until_stuck(more)
        skip(client, 20 * MIB)
    client.abort()
    more.wait_for("/stats", cleaned=2)
    assert_nothing_left(more)


def test_a_stalled_client_is_given_up(rsgi: LiveServer) -> None:
    """C18."""
    with rsgi.open("/stalled"):
        rsgi.wait_for("/stats", cleaned=1)
        assert rsgi.wait_for("/stats", running=0, tasks=[])["seen"][-1] == "ended"


def test_a_file_arrives_whole(rsgi: LiveServer) -> None:
    before = rsgi.json("/stats")["memory"]
    with rsgi.open("/file") as client:
        assert client.head()[0] == 200
        skip(client, 64 * MIB)
        client.request("/hello")
        assert client.response() == (200, b'"hello"')
    assert rsgi.wait_for("/stats", cleaned=1)["memory"] - before < 16 * MIB
    assert_nothing_left(rsgi)


# -- HTTP/2 --------------------------------------------------------------------------------------


class HTTP2Client:
    """One connection; its streams are left one by one, as browsers do."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), DEADLINE)
        self.connection = H2Connection(H2Configuration(header_encoding="utf-8"))
        self.bodies: dict[int, bytes] = {}
        self.ended: set[int] = set()
        self.connection.initiate_connection()
        self.flush()

    def flush(self) -> None:
        self.socket.sendall(self.connection.data_to_send())

    def request(self, path: str, method: str = "GET", *headers: tuple[str, str], more: bool = False) -> int:
        """The number of the stream."""
        stream = self.connection.get_next_available_stream_id()
        head = [(":method", method), (":scheme", "http"), (":authority", "example"), (":path", path), *headers]
        self.connection.send_headers(stream, head, end_stream=not more)
        self.flush()
        self.bodies[stream] = b""
        return stream

    def data(self, stream: int, data: bytes, end: bool = False) -> None:
        self.connection.send_data(stream, data, end_stream=end)
        self.flush()

    def receive(self) -> None:
        received = self.socket.recv(65536)
        assert received, f"closed: {self.bodies!r}"
        for event in self.connection.receive_data(received):
            if isinstance(event, DataReceived):
                self.bodies[event.stream_id] += event.data
                self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, StreamEnded):
                self.ended.add(event.stream_id)
        self.flush()

    def until(self, stream: int, marker: bytes) -> None:
        while marker not in self.bodies[stream]:
            self.receive()

    def whole(self, stream: int) -> bytes:
        while stream not in self.ended:
            self.receive()
        return self.bodies[stream]

    def leave(self, stream: int) -> None:
        self.connection.reset_stream(stream, ErrorCodes.CANCEL)
        self.flush()

    def __enter__(self) -> HTTP2Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()


@pytest.mark.parametrize("middleware", [0, 5])
@pytest.mark.parametrize("path", WORK)
def test_http2_stream_that_is_reset_is_cleaned_up_alone(running: Start, middleware: int, path: str) -> None:
    """Issue 4: RST_STREAM cancels the one; its neighbours on the same connection go on."""
    live = running(SERVER, middleware)
    with HTTP2Client(live.port) as client:
        streams = [client.request(path) for _ in range(5)]
        if path != "/handler":
            for stream in streams:
                client.until(stream, b"first")
        live.wait_for("/stats", started=5)
        for left, stream in enumerate(streams[1:4], start=1):
            client.leave(stream)
            live.wait_for("/stats", cleaned=left, running=5 - left)
        hello = client.request("/hello")
        assert client.whole(hello) == b'"hello"'
        live.wait_for("/stats", running=2)
    live.wait_for("/stats", cleaned=5)
    assert_nothing_left(live)


@pytest.mark.parametrize("length", [[], [("content-length", "1000")]])
def test_http2_upload_that_is_reset(rsgi: LiveServer, length: list[tuple[str, str]]) -> None:
    """C4: Granian gives empty pieces for ever."""
    with HTTP2Client(rsgi.port) as client:
        stream = client.request("/upload", "POST", *length, more=True)
        client.data(stream, b"x" * 10)
        rsgi.wait_for("/stats", started=1)
        while rsgi.json("/stats")["seen"][:1] != [10]:
            pass
        client.leave(stream)
        assert rsgi.wait_for("/stats", cleaned=1)["seen"] == ["ClientDisconnect"]
        assert client.whole(client.request("/hello")) == b'"hello"'
    assert_nothing_left(rsgi)


def test_http2_uploads_arrive_whole(more: LiveServer) -> None:
    """Whether the end comes with the last piece, alone, or as trailers."""
    with HTTP2Client(more.port) as client:
        for length in ([], [("content-length", "5")]):
            stream = client.request("/size", "POST", *length, more=True)
            client.data(stream, b"hello", end=True)
            assert client.whole(stream) == b"5"
            stream = client.request("/size", "POST", *length, more=True)
            client.data(stream, b"hello")
            client.data(stream, b"", end=True)
            assert client.whole(stream) == b"5"
            stream = client.request("/size", "POST", *length, more=True)
            client.data(stream, b"hello")
            client.connection.send_headers(stream, [("digest", "x")], end_stream=True)
            client.flush()
            assert client.whole(stream) == b"5"
        assert client.whole(client.request("/size", "POST")) == b"0"
    assert_nothing_left(more)


def test_http2_headers(more: LiveServer) -> None:
    with HTTP2Client(more.port) as client:
        seen = json.loads(client.whole(client.request("/seen", "GET", ("cookie", "a=1"), ("cookie", "b=2"))))
    assert (seen["version"], seen["host"], seen["cookies"]) == ("2", "example", {"a": "1", "b": "2"})


# -- errors --------------------------------------------------------------------------------------


def test_an_error_before_the_response(more: LiveServer) -> None:
    with more.connect() as client:
        client.request("/fails")
        assert client.response() == (500, b"Internal Server Error")
        client.request("/size", "POST", body=b"x")  # the connection is as good as before
        assert client.response() == (200, b"1")
    more.wait_for_log("ValueError: at once")


def test_an_error_within_the_response_is_logged(more: LiveServer) -> None:
    """With a length the client is cut off. Without one it cannot be told: RSGI ends a stream in one way only."""
    with more.open("/fails-late?length=100") as client:
        client.until(b"first")
        assert client.socket.recv(100) == b""
    more.wait_for_log("ValueError: too late")
    with more.open("/fails-late") as client:
        assert client.response() == (200, b"first")
    more.wait_for_log("ValueError: too late", times=2)


# -- WebSockets ----------------------------------------------------------------------------------


class WebSocketClient:
    def __init__(self, port: int, path: str) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), DEADLINE)
        self.connection = WSConnection(ConnectionType.CLIENT)
        self.events: list[Event] = []
        self.send(Request(host="x", target=path, subprotocols=["chat"]))

    def send(self, event: Event) -> None:
        self.socket.sendall(self.connection.send(event))

    def receive(self) -> Event:
        while not self.events:
            self.connection.receive_data(self.socket.recv(65536) or None)
            self.events += self.connection.events()
        return self.events.pop(0)

    def __enter__(self) -> WebSocketClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()


@pytest.mark.parametrize("polite", [True, False])
def test_a_websocket(more: LiveServer, polite: bool) -> None:
    with WebSocketClient(more.port, "/echo") as client:
        assert isinstance(client.receive(), AcceptConnection)
        for text in ("one", "two"):
            client.send(TextMessage(text))
            answer = client.receive()
            assert isinstance(answer, TextMessage)
            assert answer.data == f"open: {text}"
        if polite:
            client.send(CloseConnection(1000))
            assert isinstance(client.receive(), CloseConnection)
    more.wait_for("/stats", cleaned=1, tasks=[])
    assert more.complaints() == []


@pytest.mark.parametrize(("path", "status"), [("/refused", 403), ("/nowhere", 403), ("/subprotocol", 500)])
def test_a_websocket_that_is_refused(more: LiveServer, path: str, status: int) -> None:
    with WebSocketClient(more.port, path) as client:
        answer = client.receive()
        assert isinstance(answer, RejectConnection)
        assert answer.status_code == status
    if status == 500:
        more.wait_for_log("RSGI cannot accept a WebSocket with subprotocol: 'chat'")
    else:
        assert_nothing_left(more)


# -- from start-up to shutdown -------------------------------------------------------------------


def test_state_of_the_lifespan(more: LiveServer) -> None:
    assert more.json("/seen")["state"] == "open"


def test_the_lifespan_is_shut_down() -> None:
    with LiveServer("tests.rsgi_app:more", SERVER, access_log=True) as server:
        assert server.stop() == 0
        assert "database closed" in server.log
        assert server.complaints() == []


def test_a_cleanup_is_waited_for() -> None:
    """C14: Granian itself waits for connections alone."""
    with LiveServer("tests.app:app", SERVER) as server:
        client = server.open("/slow-cleanup")
        server.wait_for("/stats", started=1)
        client.abort()
        server.wait_for("/stats", seen=["cleaning"])  # once it stops, Granian does not say any more who has left
        assert server.stop() == 0
        assert "cleaned" in server.log
        assert server.complaints() == []


def test_a_failed_startup_stops_the_server() -> None:
    with pytest.raises(LiveServerError, match="ValueError: no database"):
        LiveServer("tests.rsgi_app:more", SERVER, env={"FAIL": "1"}).start()
