"""What a real server's requests left behind."""

from __future__ import annotations

import pytest

from fastapi_cancel.testing import LiveServer
from fastapi_cancel.testing.plugin import Start

from .faults_app import app


@pytest.fixture
def server(asgi_server: Start) -> LiveServer:
    return asgi_server(app)


def test_an_export_that_stops_with_its_client(server: LiveServer) -> None:
    with server.open("/export") as client:
        client.until(b"row 3")
        left = client.abort()
    server.assert_clean(1)
    (visit,) = server.visits
    assert (visit.method, visit.path, visit.status, visit.cause) == ("GET", "/export", 200, "disconnect")
    assert visit.left is not None and visit.ended is not None
    assert visit.began < left < visit.left < visit.ended


def test_a_cleanup_that_was_killed(server: LiveServer) -> None:
    with server.open("/plain-export") as client:
        client.until(b"row 3")
        client.abort()
    with pytest.raises(AssertionError, match=r"GET /plain-export 200: cleanup killed: .*\n.*in rows"):
        server.assert_clean(1)


def test_a_task_that_was_left(server: LiveServer) -> None:
    server.get("/forgotten")
    with pytest.raises(AssertionError, match=r"/forgotten 200: task left: sleep, created at\n(.*\n)*.*in forgotten"):
        server.assert_clean(1)


def test_something_in_the_log(server: LiveServer) -> None:
    server.get("/chatty")
    with pytest.raises(AssertionError, match=r"uvicorn:\nlogged: low on fuel"):
        server.assert_clean(1)
    server.assert_clean(1, but=["low on fuel"])
    server.mark()
    assert server.visits == [] and server.log == ""
    server.assert_clean()


def test_a_handler_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with LiveServer(app) as server, server.open("/report") as client:
        server.get("/chatty")
        client.abort()
        monkeypatch.setattr(server, "deadline", 0.2)
        with pytest.raises(AssertionError, match=r"2 requests, 1 not over\nGET /report None, went on at\n.*in report"):
            server.wait_until_over()
        server.process.kill()  # it would wait for the report
        server.process.wait()


def test_a_request_that_never_came(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "deadline", 0.1)
    with pytest.raises(AssertionError, match="0 requests, 0 not over"):
        server.assert_clean(1)
