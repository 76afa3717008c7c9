"""The client leaves, on one server: what does not depend on which it is. On all of them: test_matrix."""

from __future__ import annotations

import pytest

from fastapi_cancel.testing import LiveServer, RawClient

from .conftest import Start, assert_nothing_left


def open_all(server: LiveServer, path: str, count: int) -> list[RawClient]:
    clients = [server.open(path) for _ in range(count)]
    if "handler" not in path:
        for client in clients:
            client.until(b"first")
    server.wait_for("/stats", started=count)
    return clients


@pytest.mark.parametrize("path", ["/included/handler", "/mounted/handler"])
def test_included_and_mounted_routes(uvicorn: LiveServer, path: str) -> None:
    clients = open_all(uvicorn, path, 2)
    for client in clients:
        client.abort()
    uvicorn.wait_for("/stats", cleaned=2)
    assert_nothing_left(uvicorn)


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_every_method(uvicorn: LiveServer, method: str) -> None:
    client = uvicorn.open("/mounted/handler", method)
    uvicorn.wait_for("/stats", started=1)
    client.abort()
    uvicorn.wait_for("/stats", cleaned=1)
    assert_nothing_left(uvicorn)


@pytest.mark.parametrize("path", ["/handler", "/stream", "/sse"])
def test_a_thousand_clients_drop_at_once(uvicorn: LiveServer, path: str) -> None:
    clients = open_all(uvicorn, path, 1000)
    for client in clients:
        client.abort()
    uvicorn.wait_for("/stats", cleaned=1000)
    assert_nothing_left(uvicorn)


@pytest.mark.parametrize("plain", ["", "?plain=1"])
def test_a_file_stops_with_its_client(uvicorn: LiveServer, plain: str) -> None:
    client = uvicorn.open(f"/file{plain}")
    client.until(b"\r\n\r\n")
    client.abort()
    if not plain:
        uvicorn.wait_for("/stats", cleaned=1)
    assert_nothing_left(uvicorn)


def test_a_half_closed_client_is_gone(uvicorn: LiveServer) -> None:
    """A FIN is a disconnect to uvicorn: the handler is not left running."""
    client = uvicorn.open("/handler")
    uvicorn.wait_for("/stats", started=1)
    client.half_close()
    uvicorn.wait_for("/stats", cleaned=1)
    client.close()
    assert_nothing_left(uvicorn)


def test_uploads_on_one_connection_do_not_disturb_each_other(uvicorn: LiveServer) -> None:
    """C1: what is read ahead belongs to one request only."""
    with uvicorn.connect() as client:
        for size in (1, 70_000, 3):
            client.request("/upload", "POST", body=b"x" * size)
            status, body = client.response()
            assert status == 200
            assert f'"size":{size}'.encode() in body
    assert_nothing_left(uvicorn)


def test_a_timeout_in_the_middle_of_a_stream_cuts_the_connection(uvicorn: LiveServer) -> None:
    """The client must be able to tell that this was not the end."""
    with uvicorn.open("/limit-stream") as client:
        client.until(b"first\n\r\n")
        assert client.until_closed() == b""
    assert uvicorn.wait_for("/stats", running=0, tasks=[])["cleaned"] == 1


@pytest.mark.parametrize("middleware", [0, 5])
def test_who_opted_out_is_never_cancelled(running: Start, middleware: int) -> None:
    live = running("uvicorn", middleware)
    client = live.open("/never")
    live.wait_for("/stats", started=1)
    client.abort()
    assert live.wait_for("/stats", cleaned=1)["seen"] == [None]
    assert_nothing_left(live)
