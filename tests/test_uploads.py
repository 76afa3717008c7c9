"""Request bodies: never stolen, never invited too early, never piled up in memory."""

from __future__ import annotations

import pytest

from fastapi_cancel.testing.live import LiveServer

from .conftest import Start, assert_nothing_left

# Daphne starts the application only once the whole body is in.
STREAMING = ["uvicorn", "uvicorn-h11", "gunicorn", "hypercorn", "granian"]
MIB = 1 << 20


@pytest.mark.parametrize("middleware", [0, 5])
@pytest.mark.parametrize("server", STREAMING)
def test_upload_cut_in_the_middle(running: Start, server: str, middleware: int) -> None:
    """C4: `request.stream()` ends with ClientDisconnect, and the cleanup awaits."""
    live = running(server, middleware)
    client = live.open("/upload", "POST", f"Content-Length: {MIB}\r\n", b"x" * 1000)
    live.wait_for("/stats", started=1)
    live.wait_for("/stats", seen=lambda seen: seen[:1] == [1000])
    client.abort()
    assert live.wait_for("/stats", cleaned=1)["seen"] == ["ClientDisconnect"]
    assert_nothing_left(live)


@pytest.mark.parametrize("server", STREAMING)
def test_client_leaves_while_the_handler_works_on_a_piece(running: Start, server: str) -> None:
    """C4: one message is read ahead, and that one is the disconnect."""
    live = running(server)
    client = live.open("/upload-then-work", "POST", f"Content-Length: {MIB}\r\n", b"x" * 1000)
    live.wait_for("/stats", seen=["chunk"])
    client.abort()
    live.wait_for("/stats", cleaned=1)
    assert_nothing_left(live)


@pytest.mark.parametrize("server", [*STREAMING, "daphne"])
def test_the_body_reaches_the_handler_whole(running: Start, server: str) -> None:
    live = running(server)
    with live.open("/upload?pause=0.0001", "POST", body=bytes(range(256)) * 8192) as client:
        status, body = client.response()
    assert status == 200
    assert b'"size":2097152' in body
    assert_nothing_left(live)


@pytest.mark.parametrize("server", ["uvicorn", "uvicorn-h11", "gunicorn"])
def test_an_expected_continue_is_refused_without_inviting_the_body(running: Start, server: str) -> None:
    """C4: the handler waits before it refuses; reading ahead would send "100 Continue" meanwhile."""
    live = running(server)
    with live.open("/refuse", "POST", f"Content-Length: {MIB}\r\nExpect: 100-continue\r\n") as client:
        status, body = client.response()
    assert (status, body) == (413, b"too much")
    assert_nothing_left(live)


@pytest.mark.parametrize("server", ["uvicorn", "uvicorn-h11", "gunicorn"])
def test_an_expected_continue_is_sent_when_the_handler_reads(running: Start, server: str) -> None:
    live = running(server)
    with live.open("/upload", "POST", "Content-Length: 4\r\nExpect: 100-continue\r\n") as client:
        assert client.head()[0] == 100
        client.send(b"body")
        status, body = client.response()
    assert status == 200
    assert b'"size":4' in body


@pytest.mark.parametrize("server", STREAMING)
def test_a_large_upload_read_slowly_stays_out_of_memory(running: Start, server: str) -> None:
    """C4: back-pressure stays with the server."""
    live = running(server)
    before = live.json("/stats")["memory"]
    size = 50 * MIB
    with live.open("/upload?stall=0.5&pause=0.001", "POST", f"Content-Length: {size}\r\n") as client:
        for _ in range(size // MIB):
            client.send(b"x" * MIB)
        status, _ = client.response()
        assert status == 200
    state = live.json("/stats")
    assert state["seen"][0] == size
    assert state["seen"][1] - before < 16 * MIB
    assert_nothing_left(live)


def test_half_closed_client_still_gets_its_answer_or_is_gone(uvicorn: LiveServer) -> None:
    """A FIN is a disconnect to uvicorn: the handler is not left running."""
    client = uvicorn.open("/handler")
    uvicorn.wait_for("/stats", started=1)
    client.half_close()
    uvicorn.wait_for("/stats", cleaned=1)
    client.close()
    assert_nothing_left(uvicorn)


def test_pipelined_clients_do_not_disturb_each_other(uvicorn: LiveServer) -> None:
    """C1: what is read ahead belongs to one request only."""
    with uvicorn.connect() as client:
        for size in (1, 70_000, 3):
            client.request("/upload", "POST", body=b"x" * size)
            status, body = client.response()
            assert status == 200
            assert f'"size":{size}'.encode() in body
    assert_nothing_left(uvicorn)
