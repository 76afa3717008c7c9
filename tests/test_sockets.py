"""The raw client of the testing kit, and what the other end sees of it. In process, over real sockets."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from fastapi_cancel.testing import _connection
from fastapi_cancel.testing._connection import SHOWN
from fastapi_cancel.testing.sockets import RawClient

LEAVING = [RawClient.abort, RawClient.close]


class Listener:
    """A server without a program: what it does, the test does."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.socket.getsockname()[1]
        self.ends: list[socket.socket | RawClient] = [self.socket]

    def connect(self, receive_buffer: int | None = None, timeout: float = 20.0) -> tuple[RawClient, socket.socket]:
        """A client, and the server's end of its connection."""
        client = RawClient(self.port, receive_buffer=receive_buffer, timeout=timeout)
        end, _ = self.socket.accept()
        end.settimeout(20)
        self.ends += [client, end]
        return client, end


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    for end in listener.ends:
        end.close()


# -- leaving -------------------------------------------------------------------------------------


def test_abort_is_a_reset(listener: Listener) -> None:
    client, end = listener.connect()
    client.abort()
    with pytest.raises(ConnectionResetError):
        end.recv(1)


@pytest.mark.parametrize("unread", [b"", b"what nobody has read", b"x" * 200_000])
def test_close_is_a_fin_whatever_has_arrived(listener: Listener, unread: bytes) -> None:
    """A socket that is closed with something unread sends a RST."""
    client, end = listener.connect()
    end.sendall(unread)
    if unread:
        client.socket.recv(len(unread), socket.MSG_PEEK | socket.MSG_WAITALL)
    client.close()
    assert end.recv(1) == b""
    assert end.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


def test_close_does_not_wait_for_a_server_that_sends_without_end(listener: Listener) -> None:
    client, end = listener.connect()

    def flood() -> None:
        while True:
            try:
                end.sendall(b"x" * 65536)
            except OSError:
                return

    thread = threading.Thread(target=flood)
    thread.start()
    client.until(b"x" * 65536)
    client.close()
    thread.join(20)
    assert not thread.is_alive()


def test_close_drops_no_more_than_so_much(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left makes the system send a RST after the FIN."""
    monkeypatch.setattr(_connection, "DROPPED", 1)
    client, end = listener.connect()
    end.sendall(b"x" * 200_000)
    client.close()
    assert end.recv(1) == b""
    assert end.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0


def test_who_half_closes_still_reads(listener: Listener) -> None:
    client, end = listener.connect()
    left = client.half_close()
    assert end.recv(1) == b""
    end.sendall(b"still here")
    assert client.until(b"here") == b"still here"
    assert left <= time.monotonic()


@pytest.mark.parametrize("leave", LEAVING)
@pytest.mark.parametrize("again", LEAVING)
def test_leaving_twice_is_leaving_once(
    listener: Listener, leave: Callable[[RawClient], float], again: Callable[[RawClient], float]
) -> None:
    client, _ = listener.connect()
    with client:
        before = time.monotonic()
        assert before <= leave(client) <= again(client) <= time.monotonic()


@pytest.mark.parametrize("leave", LEAVING)
def test_leaving_a_server_that_has_left(listener: Listener, leave: Callable[[RawClient], float]) -> None:
    client, end = listener.connect()
    RawClient.abort(_as_client(end))
    with pytest.raises(ConnectionResetError):
        client.socket.recv(1)
    leave(client)
    assert client.socket.fileno() == -1


def _as_client(end: socket.socket) -> RawClient:
    """Lets the server's end leave with a RST too."""
    client = RawClient.__new__(RawClient)
    client.socket = end
    return client


def test_a_client_that_does_not_read_fills_up_soon(listener: Listener) -> None:
    """``receive_buffer``: else the system would hold megabytes for it."""

    def taken(receive_buffer: int | None) -> int:
        _, end = listener.connect(receive_buffer)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        end.settimeout(0.2)
        size = 0
        try:
            while True:
                size += end.send(b"x" * 4096)
        except TimeoutError:
            return size

    assert taken(4096) * 4 < taken(None)


# -- requests ------------------------------------------------------------------------------------


def test_a_request_goes_out_as_it_is(listener: Listener) -> None:
    client, end = listener.connect()
    host = f"Host: 127.0.0.1:{listener.port}\r\n"
    client.request("/path?query")
    assert end.recv(65536) == f"GET /path?query HTTP/1.1\r\n{host}\r\n".encode()
    client.request("/", "POST", {"X-One": "1", "X-Two": "2"}, b"body")
    assert end.recv(65536) == f"POST / HTTP/1.1\r\n{host}X-One: 1\r\nX-Two: 2\r\nContent-Length: 4\r\n\r\nbody".encode()
    client.request("/", "POST", "X-One: 1\r\n", b"body")
    assert end.recv(65536) == f"POST / HTTP/1.1\r\n{host}X-One: 1\r\nContent-Length: 4\r\n\r\nbody".encode()


@pytest.mark.parametrize("header", ["content-length: 10", "Transfer-Encoding: chunked"])
def test_an_upload_goes_on_or_is_cut(listener: Listener, header: str) -> None:
    client, end = listener.connect()
    client.request("/", "POST", header + "\r\n", b"begin")
    assert end.recv(65536).endswith(f"{header}\r\n\r\nbegin".encode())
    client.send(b"more")
    assert end.recv(65536) == b"more"
    client.abort()
    with pytest.raises(ConnectionResetError):
        end.recv(1)


def test_a_server_that_does_not_take_an_upload(listener: Listener) -> None:
    client, end = listener.connect(timeout=0.2)
    end.sendall(b"wait")
    client.until(b"wait")
    with pytest.raises(
        TimeoutError, match=r"did not take 67108864 bytes within 0\.2 s; received so far: 4 bytes: b'wait'"
    ):
        client.send(b"x" * (64 << 20))


# -- answers -------------------------------------------------------------------------------------


def test_until_reads_no_further(listener: Listener) -> None:
    client, end = listener.connect()
    end.sendall(b"one two thr")
    assert client.until(b"one") == b"one"
    assert client.until(b"two") == b" two"
    threading.Timer(0.05, end.sendall, [b"ee four"]).start()
    assert client.until(b"three") == b" three"
    assert client.exactly(5) == b" four"
    threading.Timer(0.05, end.sendall, [b"five"]).start()
    assert client.exactly(4) == b"five"


def test_what_does_not_come_is_named_with_what_came(listener: Listener) -> None:
    client, end = listener.connect(timeout=0.1)
    end.sendall(b"data: first\n\n")
    with pytest.raises(TimeoutError, match="b'second' did not come in time; received so far: 13 bytes: b'data: first"):
        client.until(b"second")
    with pytest.raises(TimeoutError, match="20 bytes did not come in time; received so far: 13 bytes"):
        client.exactly(20)
    with pytest.raises(TimeoutError, match="b'second'"):
        client.until(b"second", timeout=0)
    assert client.until(b"first") == b"data: first"


def test_nothing_at_all_came(listener: Listener) -> None:
    client, _ = listener.connect()
    with pytest.raises(TimeoutError, match=r"in time; received so far: 0 bytes$"):
        client.until(b"first", timeout=0.05)


def test_of_much_the_last_is_shown(listener: Listener) -> None:
    client, end = listener.connect()
    end.sendall(b"x" * SHOWN + b"the end")
    end.close()
    with pytest.raises(ConnectionError, match=f"received so far: {SHOWN + 7} bytes, the last of them: b'x+the end'"):
        client.until(b"more")


def test_a_server_that_goes_on_with_something_else_is_not_waited_for(listener: Listener) -> None:
    """The time is for the whole call: heartbeats do not prolong it."""
    client, end = listener.connect()
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.01):
            end.sendall(b": ping\n\n")

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(TimeoutError, match="ping"):
            client.until(b"data", timeout=0.3)
    finally:
        stop.set()
        thread.join()


def test_a_fin_and_a_reset_are_told_apart(listener: Listener) -> None:
    client, end = listener.connect()
    end.sendall(b"some")
    end.close()
    with pytest.raises(
        ConnectionError, match=r"the server closed the connection before b'more' came; .* b'some'"
    ) as fin:
        client.until(b"more")
    assert not isinstance(fin.value, ConnectionResetError)
    client, end = listener.connect()
    end.sendall(b"some")
    client.until(b"so")
    RawClient.abort(_as_client(end))
    with pytest.raises(ConnectionResetError, match=r"the server reset the connection before b'more' came; .* b'some'"):
        client.until(b"more")


def test_head(listener: Listener) -> None:
    client, end = listener.connect()
    end.sendall(b"HTTP/1.1 200 OK\r\nX-One:1\r\nX-Many: a\r\nx-many:  b \r\n\r\nbody")
    assert client.head() == (200, {"x-one": "1", "x-many": "a, b"})
    assert client.until(b"body") == b"body"
    end.sendall(b"hello\r\n\r\n")
    with pytest.raises(ValueError, match="'hello' is not the status line of a response; received so far"):
        client.head()


RESPONSES = {
    "counted": (b"Content-Length: 4\r\n\r\nbody", b"body"),
    "chunked": (b"Transfer-Encoding: chunked\r\n\r\n2;name=value\r\nbo\r\n2\r\ndy\r\n0\r\n\r\n", b"body"),
    "chunked with trailers": (b"Transfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\nX: 1\r\nY: 2\r\n\r\n", b"body"),
    "empty": (b"Content-Length: 0\r\n\r\n", b""),
}


@pytest.mark.parametrize("name", RESPONSES)
def test_whole_responses_one_after_the_other(listener: Listener, name: str) -> None:
    client, end = listener.connect()
    answer, body = RESPONSES[name]
    for _ in range(2):
        client.request("/")
        end.sendall(b"HTTP/1.1 200 OK\r\n" + answer)
    for _ in range(2):
        assert client.response() == (200, body)


def test_a_response_that_ends_with_its_connection(listener: Listener) -> None:
    client, end = listener.connect()
    client.request("/")
    end.recv(65536)
    end.sendall(b"HTTP/1.1 200 OK\r\n\r\nbody")
    end.close()
    assert client.response() == (200, b"body")


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
def test_responses_without_a_body(listener: Listener, method: str, status: int) -> None:
    client, end = listener.connect()
    client.request("/", method)
    end.sendall(b"HTTP/1.1 %d\r\nContent-Length: 4\r\n\r\n" % status)
    assert client.response() == (status, b"")


@pytest.mark.parametrize(
    ("marker", "rest"),
    [
        (b"fir", b"st\r\n4\r\nmore\r\n0\r\n\r\n"),
        (b"more", b"\r\n0\r\n\r\n"),
        (b"more\r\n", b"0\r\n\r\n"),
    ],
)
def test_the_rest_of_a_stream(listener: Listener, marker: bytes, rest: bytes) -> None:
    """To its proper end and no further, wherever reading stopped before."""
    client, end = listener.connect()
    end.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n4\r\nmore\r\n0")
    client.until(marker)
    threading.Timer(0.05, end.sendall, [b"\r\n\r\nHTTP/1.1 204\r\n\r\n"]).start()
    assert client.rest() == rest
    assert client.response() == (204, b"")


def test_a_stream_that_is_cut_off_has_no_rest(listener: Listener) -> None:
    client, end = listener.connect()
    end.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n")
    end.close()
    client.until(b"first")
    with pytest.raises(ConnectionError, match=r"before the last chunk came; .*first"):
        client.rest()


def test_until_closed(listener: Listener) -> None:
    client, end = listener.connect()
    end.sendall(b"all")
    end.close()
    assert client.until_closed() == b"all"
    client, end = listener.connect()
    RawClient.abort(_as_client(end))
    with pytest.raises(ConnectionResetError, match="before the end came"):
        client.until_closed()


# -- connecting ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"receive_buffer": 0}, "receive_buffer: a number of bytes above 0, or None, not 0"),
        ({"timeout": 0}, "timeout: seconds, above 0, not 0"),
    ],
)
def test_bad_arguments_are_named(listener: Listener, argument: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RawClient(listener.port, **argument)  # type: ignore[arg-type]


def test_nobody_listens(listener: Listener) -> None:
    """The warning about a socket that was left open would be an error."""
    listener.socket.close()
    with pytest.raises(ConnectionRefusedError):
        RawClient(listener.port)


def test_coming_from_elsewhere(listener: Listener) -> None:
    with RawClient(listener.port, source="127.0.0.3") as client:
        end, address = listener.socket.accept()
        listener.ends.append(end)
        assert address[0] == client.socket.getsockname()[0] == "127.0.0.3"
