"""The HTTP/2 client of the testing kit: on real servers, and at the mercy of one that the test plays itself."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from importlib import import_module
from typing import Any

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import Event, RequestReceived, StreamReset, WindowUpdated

from fastapi_cancel.testing.http2 import Http2Client, Http2Stream

from .conftest import Start

SERVERS = ["hypercorn", "hypercorn-trio", "granian"]
EVENTS = "tests.sse_app:app"
MARKS = ["generator", "on_disconnect", "cleanup"]


# -- real servers --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/handler", "/stream", "/plain-stream", "/sse", "/json-lines"])
@pytest.mark.parametrize("middleware", [0, 5])
@pytest.mark.parametrize("server", SERVERS)
def test_a_reset_cancels_its_stream(running: Start, server: str, middleware: int, path: str) -> None:
    """C1, C7: the awaiting cleanup runs to its end; the other streams of the connection go on, and new ones begin."""
    live = running(server, middleware)
    with live.open_http2() as client:
        streams = [client.request(path) for _ in range(3)]
        live.wait_for("/stats", started=3)
        streams[1].reset()
        live.wait_for("/stats", cleaned=1, running=2)
        assert client.request("/hello").response() == (200, b'"hello"')
        assert live.json("/stats")["cleaned"] == 1
        streams[0].reset()
        streams[2].reset()
        live.wait_for("/stats", cleaned=3, running=0, tasks=[])
    assert live.complaints() == []


@pytest.mark.parametrize("middleware", [0, 5])
@pytest.mark.parametrize("server", SERVERS)
def test_a_reset_leaves_its_neighbours_alone(running: Start, server: str, middleware: int) -> None:
    """C7, C20: those that were open before go on receiving."""
    live = running(server, middleware, EVENTS)
    with live.open_http2() as client:
        streams = [client.request("/route/idle?heartbeat=0.05") for _ in range(3)]
        number = [stream.until(b"data: first").split()[1].decode() for stream in streams][1].removeprefix("id-")
        streams[1].reset()
        live.wait_for("/stats", seen=[f"{number} {mark}" for mark in MARKS], running=2)
        others = [streams[0], streams[2]]
        for stream in others * 3:
            stream.until(b": ping")
        assert live.json("/stats")["running"] == 2
        for stream in others:
            stream.reset()
        live.wait_for("/stats", running=0)  # Hypercorn on Trio dies of a goodbye while it sends: docs/servers.md


@pytest.mark.parametrize("leave", ["abort", "close"])
@pytest.mark.parametrize("path", ["/handler", "/stream", "/sse"])
@pytest.mark.parametrize("server", SERVERS)
def test_all_streams_end_with_their_connection(running: Start, server: str, path: str, leave: str) -> None:
    """C1, C7."""
    live = running(server)
    client = live.open_http2()
    streams = [client.request(path) for _ in range(3)]
    live.wait_for("/stats", started=3)
    if path != "/handler":
        for stream in streams:
            stream.until(b"first")  # Hypercorn on Trio dies of a goodbye while it sends: docs/servers.md
    getattr(client, leave)()
    live.wait_for("/stats", cleaned=3, running=0, tasks=[])
    assert live.complaints() == []


@pytest.mark.parametrize("server", SERVERS)
def test_an_upload_is_cut_by_a_reset(running: Start, server: str) -> None:
    """C4: `request.stream()` ends with ClientDisconnect."""
    live = running(server)
    with live.open_http2() as client:
        stream = client.request("/upload", "POST", body=b"x" * 1000, end=False)
        live.wait_for("/stats", seen=lambda seen: seen[:1] == [1000])
        stream.reset()
        live.wait_for("/stats", cleaned=1, seen=["ClientDisconnect"], running=0)
    assert live.complaints() == []


@pytest.mark.parametrize("server", SERVERS)
def test_an_upload_arrives_whole(running: Start, server: str) -> None:
    """Larger than what a server gives credit for."""
    live = running(server)
    with live.open_http2() as client:
        stream = client.request(
            "/upload?pause=0.0001", "POST", {"content-type": "text/plain"}, b"x" * 300_000, end=False
        )
        stream.send(b"y" * 300_000)
        stream.send(b"", end=True)
        status, body = stream.response()
    assert (status, body[:14]) == (200, b'{"size":600000')


def test_a_stream_that_stalls_is_given_up(running: Start) -> None:
    """C18: while another one of its connection goes on. Hypercorn buffers without a bound what it has no credit for."""
    live = running("granian")
    with live.open_http2() as client:
        stalled = client.request("/stalled")
        stalled.stall()
        for _ in range(10):
            assert client.request("/hello").response() == (200, b'"hello"')
        live.wait_for("/stats", cleaned=1, running=0, tasks=[], seen=lambda seen: seen[-1:] == ["ended"])
        stalled.resume()
        with pytest.raises(ConnectionResetError, match="the server reset the stream"):
            stalled.rest()


def test_a_reset_of_a_response_of_which_only_its_end_is_left(running: Start) -> None:
    """C12: Hypercorn's `send` of that never returns. The background task runs, and nobody stays."""
    live = running("hypercorn")
    with live.open_http2() as client:
        stalled = client.request("/announced")
        stalled.stall()
        live.wait_for("/stats", seen=["all out"])
        stalled.reset()
        live.wait_for("/stats", seen=["all out", "background"], running=0, tasks=[])
    assert live.complaints() == []


@pytest.mark.parametrize("server", ["uvicorn", "gunicorn", "daphne"])
def test_a_server_without_http2_is_told(running: Start, server: str) -> None:
    """By what it does: which ones can do it changes."""
    live = running(server)
    with pytest.raises(ConnectionError, match=r"this is no HTTP/2 .*HTTP/1|before the server's HTTP/2 settings came"):
        live.open_http2()


# -- a server that the test plays ----------------------------------------------------------------


class Server:
    """The other end of one connection."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self.h2 = H2Connection(H2Configuration(client_side=False))
        self.h2.initiate_connection()
        self.flush()

    def flush(self) -> None:
        self.socket.sendall(self.h2.data_to_send())

    def take(self, kind: type[Event], times: int = 1) -> list[Any]:
        """What the client sends: so many events of this kind."""
        taken: list[Event] = []
        while len(taken) < times:
            events = self.h2.receive_data(self.socket.recv(65536))
            taken += [event for event in events if isinstance(event, kind)]
            self.flush()
        return taken

    def answer(self, stream: Http2Stream, body: bytes = b"", end: bool = False) -> None:
        self.h2.send_headers(stream.number, [(":status", "200"), ("x-one", "1")])
        self.send(stream, body, end)

    def send(self, stream: Http2Stream, body: bytes, end: bool = False) -> None:
        for begin in range(0, len(body), 16384):
            self.h2.send_data(stream.number, body[begin : begin + 16384])
        if end:
            self.h2.end_stream(stream.number)
        self.flush()

    def credit(self, stream: Http2Stream) -> int:
        """What may be sent still."""
        return self.h2.local_flow_control_window(stream.number)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        yield listener


@pytest.fixture
def ends(listener: socket.socket) -> Iterator[tuple[Http2Client, Server]]:
    accepted: list[Server] = []

    def accept() -> None:
        end, _ = listener.accept()
        end.settimeout(20)
        accepted.append(Server(end))

    thread = threading.Thread(target=accept)
    thread.start()
    with Http2Client(listener.getsockname()[1], timeout=5) as client:
        thread.join()
        with closing(accepted[0].socket):
            yield client, accepted[0]


def asked(ends: tuple[Http2Client, Server], times: int = 1) -> list[Http2Stream]:
    """Requests that the server has taken."""
    client, server = ends
    streams = [client.request("/") for _ in range(times)]
    server.take(RequestReceived, times)
    return streams


def test_a_response(ends: tuple[Http2Client, Server]) -> None:
    (stream,), server = asked(ends), ends[1]
    assert (stream.status, stream.ended) == (None, False)
    server.answer(stream, b"one two", end=True)
    assert stream.head() == (200, {"x-one": "1"})
    assert stream.until(b"one") == b"one"
    assert stream.rest() == b" two"
    assert (stream.status, stream.headers, stream.ended, stream.error) == (200, {"x-one": "1"}, True, None)


def test_what_does_not_come_is_named_with_what_came(ends: tuple[Http2Client, Server]) -> None:
    (stream,), server = asked(ends), ends[1]
    server.answer(stream, b"first")
    with pytest.raises(TimeoutError, match="b'second' did not come in time; received so far: 5 bytes: b'first'"):
        stream.until(b"second", timeout=0.1)
    server.send(stream, b"", end=True)
    with pytest.raises(ConnectionError, match=r"the server ended the stream before b'second' came; .*first"):
        stream.until(b"second")


def test_a_server_resets_a_stream(ends: tuple[Http2Client, Server]) -> None:
    (stream,), server = asked(ends), ends[1]
    server.answer(stream, b"first")
    server.h2.reset_stream(stream.number, ErrorCodes.INTERNAL_ERROR)
    server.flush()
    message = r"the server reset the stream \(INTERNAL_ERROR\) before b'second' came; .*first"
    with pytest.raises(ConnectionResetError, match=message):
        stream.until(b"second")
    assert stream.error == "INTERNAL_ERROR"
    with pytest.raises(RuntimeError, match="stream 1 has ended already"):
        stream.reset()


def test_an_error_without_a_name(ends: tuple[Http2Client, Server]) -> None:
    (stream,), server = asked(ends), ends[1]
    server.h2.reset_stream(stream.number, 4711)
    server.flush()
    with pytest.raises(ConnectionResetError, match=r"\(4711\) before the head of the response came"):
        stream.head()


def test_a_server_says_goodbye(ends: tuple[Http2Client, Server]) -> None:
    """RFC 9113, section 6.8: what is open goes on."""
    (stream,), (client, server) = asked(ends), ends
    server.answer(stream, b"first")
    goodbye = bytes.fromhex("0000080700000000007fffffff00000000")
    server.socket.sendall(goodbye[:12])
    assert stream.until(b"first") == b"first"
    server.socket.sendall(goodbye[12:])
    server.send(stream, b"last", end=True)
    assert stream.rest() == b"last"
    assert client.farewell == "NO_ERROR"
    with pytest.raises(ConnectionError, match=r"wants no more requests on this connection \(GOAWAY, NO_ERROR\)"):
        client.request("/")


def test_a_server_closes_the_connection(ends: tuple[Http2Client, Server]) -> None:
    (stream,), server = asked(ends), ends[1]
    server.socket.close()
    with pytest.raises(ConnectionError, match="the server closed the connection before the head of the response came"):
        stream.head()


@pytest.mark.parametrize("nonsense", [b"HTTP/1.1 200 OK\r\n\r\n", b"\0\0\0\x04\x01\0\0\0\x01HTTP/1.1 200 OK"])
def test_a_server_that_talks_nonsense(ends: tuple[Http2Client, Server], nonsense: bytes) -> None:
    (stream,), server = asked(ends), ends[1]
    server.socket.sendall(nonsense)
    with pytest.raises(ConnectionError, match=r"this is no HTTP/2 .*HTTP/1.1 200 OK"):
        stream.head()


def test_a_reset_says_why(ends: tuple[Http2Client, Server]) -> None:
    streams, server = asked(ends, 2), ends[1]
    streams[0].reset()
    streams[1].reset(ErrorCodes.REFUSED_STREAM)
    codes = [event.error_code for event in server.take(StreamReset, 2)]
    assert codes == [ErrorCodes.CANCEL, ErrorCodes.REFUSED_STREAM]
    with pytest.raises(RuntimeError, match="stream 1 was reset by the test"):
        streams[0].head()
    with pytest.raises(RuntimeError, match="stream 1 has ended already: there is nothing to reset"):
        streams[0].reset()


def test_what_was_sent_to_a_stream_that_was_reset_is_dropped(ends: tuple[Http2Client, Server]) -> None:
    streams, server = asked(ends, 2), ends[1]
    server.answer(streams[0], b"too late")
    server.answer(streams[1], b"in time", end=True)
    streams[0].reset()
    assert streams[1].response() == (200, b"in time")


def test_a_stalled_stream_gets_no_credit_and_its_neighbour_does(ends: tuple[Http2Client, Server]) -> None:
    (stalled, other), server = asked(ends, 2), ends[1]
    stalled.stall()
    server.answer(stalled, b"x" * 30_000)
    server.answer(other)
    for _ in range(5):  # in all, more than the connection's credit
        server.send(other, b"y" * 30_000 + b"end")
        other.until(b"end")
        while server.credit(other) < 30_003:
            server.take(WindowUpdated)
    assert server.credit(stalled) == 65_535 - 30_000
    stalled.resume()
    (update,) = server.take(WindowUpdated)
    assert (update.stream_id, update.delta) == (stalled.number, 30_000)
    server.send(stalled, b"end", end=True)
    assert len(stalled.rest()) == 30_003


def test_resuming_what_owes_nothing(ends: tuple[Http2Client, Server]) -> None:
    """Never stalled, stalled and reset, stalled and ended."""
    streams, server = asked(ends, 3), ends[1]
    for stream in streams[1:]:
        stream.stall()
        server.answer(stream, b"x")
    server.h2.reset_stream(streams[1].number)
    server.send(streams[2], b"", end=True)
    assert streams[2].rest() == b"x"
    for stream in streams:
        stream.resume()
    server.answer(streams[0], b"", end=True)
    assert streams[0].response() == (200, b"")


def test_a_server_that_does_not_take_an_upload(ends: tuple[Http2Client, Server]) -> None:
    client, _ = ends
    client.timeout = 0.2
    with pytest.raises(TimeoutError, match="room for more of the body did not come in time; received so far: 0 bytes"):
        client.request("/", "POST", body=b"x" * 100_000)


def test_a_server_that_wants_no_more_of_an_upload(ends: tuple[Http2Client, Server]) -> None:
    client, server = ends
    stream = client.request("/", "POST", body=b"x" * 65_535, end=False)
    server.take(RequestReceived)
    server.h2.reset_stream(stream.number, ErrorCodes.NO_ERROR)
    server.flush()
    for _ in range(2):
        with pytest.raises(ConnectionResetError, match=r"the server reset the stream \(NO_ERROR\) before room"):
            stream.send(b"more")


def test_a_server_that_says_nothing(listener: socket.socket) -> None:
    with pytest.raises(
        TimeoutError, match="the server's HTTP/2 settings did not come in time; received so far: 0 bytes"
    ):
        Http2Client(listener.getsockname()[1], timeout=0.1)


def test_leaving_a_server_that_has_left(ends: tuple[Http2Client, Server]) -> None:
    client, server = ends
    server.socket.close()
    client.abort()
    client.close()
    assert client.socket.fileno() == -1


def test_without_h2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fastapi_cancel.testing.http2")
    monkeypatch.setitem(sys.modules, "h2.config", None)
    with pytest.raises(ImportError, match=r"Http2Client needs h2: pip install 'fastapi-cancel\[testing\]'"):
        import_module("fastapi_cancel.testing.http2")
