"""The client leaves: on every server, behind 0 and 5 BaseHTTPMiddleware, in every kind of work."""

from __future__ import annotations

import time

import pytest

from fastapi_cancel.testing.live import LiveServer
from fastapi_cancel.testing.sockets import RawClient

from .conftest import SERVERS, Start, assert_nothing_left

WORK = ["/handler", "/stream", "/plain-stream", "/sse", "/json-lines", "/stream-on-plain-route"]


def open_all(server: LiveServer, path: str, count: int) -> list[RawClient]:
    clients = [server.open(path) for _ in range(count)]
    if "handler" not in path:
        for client in clients:
            client.until(b"first")
    server.wait_for("/stats", started=count)
    return clients


@pytest.mark.parametrize("leave", ["abort", "close"])
@pytest.mark.parametrize("path", WORK)
@pytest.mark.parametrize("middleware", [0, 5])
@pytest.mark.parametrize("server", SERVERS)
def test_cleanup_awaits_after_disconnect(running: Start, server: str, middleware: int, path: str, leave: str) -> None:
    """C1, C2, C3, C7, C13, C21: 5 of 5 cleanups run to their end, nothing is left, nothing is logged."""
    live = running(server, middleware)
    clients = open_all(live, path, 5)
    for client in clients:
        getattr(client, leave)()
    live.wait_for("/stats", cleaned=5)
    assert_nothing_left(live)
    if middleware:
        expected = 499 if path == "/handler" else 200
        assert live.json("/stats")["statuses"] == [expected] * 5 * middleware


@pytest.mark.parametrize("server", ["hypercorn", "granian"])
def test_access_logs_see_499(running: Start, server: str) -> None:
    """C13: of the others, uvicorn and Daphne log nothing and gunicorn its own 500, whatever is sent."""
    live = running(server)
    (client,) = open_all(live, "/handler", 1)
    client.abort()
    live.wait_for_log(" 499 ")
    assert_nothing_left(live)


@pytest.mark.parametrize("path", WORK)
def test_cleanup_awaits_on_trio(running: Start, path: str) -> None:
    """C8: the same through Hypercorn's Trio worker."""
    live = running("hypercorn-trio")
    clients = open_all(live, path, 5)
    for client in clients:
        client.abort()
    live.wait_for("/stats", cleaned=5)
    assert_nothing_left(live)


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


@pytest.mark.parametrize("server", SERVERS)
def test_keep_alive_connection_cut_in_its_third_request(running: Start, server: str) -> None:
    live = running(server)
    with live.connect() as client:
        for _ in range(2):
            client.request("/hello")
            assert client.response() == (200, b'"hello"')
        client.request("/handler")
        live.wait_for("/stats", started=1)
        client.abort()
    live.wait_for("/stats", cleaned=1)
    assert_nothing_left(live)


@pytest.mark.parametrize("server", SERVERS)
def test_client_gone_before_the_first_byte(running: Start, server: str) -> None:
    """C11: the response's cleanup runs although its generator never started."""
    live = running(server)
    client = live.open("/never-started")
    live.wait_for("/stats", started=1)
    client.abort()
    state = live.wait_for("/stats", cleaned=1)
    assert state["started"] == 1
    assert_nothing_left(live)


@pytest.mark.parametrize("path", ["/flood", "/plain-flood"])
@pytest.mark.parametrize("server", ["uvicorn", "uvicorn-h11", "gunicorn", "hypercorn", "granian"])
def test_client_gone_while_send_waits_on_a_full_socket(running: Start, server: str, path: str) -> None:
    """C7: one interruption, whichever came first, and a cleanup that awaits."""
    live = running(server)
    client = live.open(path)
    live.wait_for("/stats", started=1)
    live.wait_for("/stats", seen=has_been_stuck)
    client.abort()
    live.wait_for("/stats", cleaned=1)
    assert_nothing_left(live)


def has_been_stuck(asked_at: list[float]) -> bool:
    """Whether the generator has not been asked for 0.2 s."""
    return bool(asked_at) and time.monotonic() - asked_at[0] >= 0.2


@pytest.mark.parametrize("path", ["/greedy", "/plain-greedy"])
@pytest.mark.parametrize("server", SERVERS)
def test_a_generator_that_never_awaits(running: Start, server: str, path: str) -> None:
    """C17: neither starves the event loop nor outlives its client."""
    live = running(server)
    client = live.open(path)
    live.wait_for("/stats", started=1)
    client.until(b"xxxx")
    client.abort()
    live.wait_for("/stats", cleaned=1)
    assert_nothing_left(live)


def test_a_stalled_client_is_given_up(uvicorn: LiveServer) -> None:
    """C18: the stream ends although the client stays and does not read."""
    with uvicorn.open("/stalled"):
        uvicorn.wait_for("/stats", cleaned=1)
        assert uvicorn.wait_for("/stats", running=0, tasks=[])["seen"][-1] == "ended"


@pytest.mark.parametrize("plain", ["", "?plain=1"])
def test_a_file_stops_with_its_client(uvicorn: LiveServer, plain: str) -> None:
    client = uvicorn.open(f"/file{plain}")
    client.until(b"\r\n\r\n")
    client.abort()
    if not plain:
        uvicorn.wait_for("/stats", cleaned=1)
    assert_nothing_left(uvicorn)


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("middleware", [0, 5])
def test_is_disconnected_turns_true(running: Start, server: str, middleware: int) -> None:
    """C2: behind any number of BaseHTTPMiddleware."""
    live = running(server, middleware)
    client = live.open("/poll")
    live.wait_for("/stats", started=1)
    client.abort()
    assert live.wait_for("/stats", cleaned=1)["seen"] == ["disconnected"]
    assert_nothing_left(live)
