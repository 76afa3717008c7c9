"""Clients of event streams leave: on every server, at every moment, behind 0 and 5 BaseHTTPMiddleware."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pytest

from fastapi_cancel.testing.live import LiveServer
from fastapi_cancel.testing.sockets import RawClient

from .conftest import SERVERS as ALL
from .conftest import Start
from .sse_app import PACED, paced_data

SERVERS = [*ALL, "uvicorn-uvloop", "hypercorn-trio"]
APPS = ["route", "plain", "bare"]  # SSEResponse needs no route class, and no FastAPI
WITH_BACK_PRESSURE = [server for server in SERVERS if server != "daphne"]  # it buffers without a bound
# Hypercorn shields its own send on Trio: it lasts until the client reads or leaves.
INTERRUPTIBLE = [server for server in WITH_BACK_PRESSURE if server != "hypercorn-trio"]
# What a server may say where nobody can help it.
CUT_OFF = "without completing"  # a client that does not read cannot be sent the end of the response
WRITTEN_TOO_LATE = r"socket\.send\(\) raised exception"  # what was on its way through the layers (Hypercorn)
MARKS = ["cleanup", "generator", "on_disconnect"]


@pytest.fixture
def serving(running: Start) -> Start:
    """``serving(server, middleware)``: a live server with the event streams."""
    return partial(running, app="tests.sse_app:app")


def open_idle(live: LiveServer, path: str, count: int = 5) -> list[RawClient]:
    clients = [live.open(path) for _ in range(count)]
    for client in clients:
        client.until(b"first")
    return clients


def ended(live: LiveServer, count: int, marks: list[str] = MARKS, may_say: str | None = None) -> dict[str, Any]:
    """Wait until all is over: each of ``marks`` was left by each stream, once, and nothing else was."""
    expected = sorted(f"{number} {name}" for number in range(1, count + 1) for name in marks)
    state = live.wait_for("/stats", running=0, tasks=[], seen=lambda seen: len(seen) >= len(expected))
    assert sorted(state["seen"]) == expected
    assert live.complaints(*filter(None, [may_say])) == []
    return state


@pytest.mark.parametrize("leave", ["abort", "close"])
@pytest.mark.parametrize("app", APPS)
@pytest.mark.parametrize("middleware", [0, 5])
@pytest.mark.parametrize("server", SERVERS)
def test_cleanups_await_after_a_drop(serving: Start, server: str, middleware: int, app: str, leave: str) -> None:
    """C1, C2, C7, C11, C13, litestar-org/litestar#3607: 5 of 5 run to their end, once; nothing is left or logged."""
    live = serving(server, middleware)
    for client in open_idle(live, f"/{app}/idle"):
        getattr(client, leave)()
    state = ended(live, 5)
    assert state["info"]["cause"] == "disconnect"


@pytest.mark.parametrize("app", APPS)
@pytest.mark.parametrize("middleware", [0, 5])
@pytest.mark.parametrize("server", SERVERS)
def test_clients_drop_while_heartbeats_go_out(serving: Start, server: str, middleware: int, app: str) -> None:
    """C20: whoever leaves during a heartbeat is cleaned up as anybody else."""
    live = serving(server, middleware)
    for client in open_idle(live, f"/{app}/idle?heartbeat=0.05"):
        client.until(b": ping - ")
        client.abort()
    ended(live, 5)


@pytest.mark.parametrize("middleware", [0, 5])
@pytest.mark.parametrize("server", SERVERS)
def test_clients_drop_in_the_middle_of_a_burst(serving: Start, server: str, middleware: int) -> None:
    """C16, C17: a content that never waits is closed, and its cleanup awaits."""
    live = serving(server, middleware)
    for client in open_idle(live, "/route/burst"):
        client.abort()
    ended(live, 5, may_say=WRITTEN_TOO_LATE if middleware else None)


def has_been_stuck(asked_at: float | None) -> bool:
    """Whether the content has not been asked for an event for 0.2 s."""
    return asked_at is not None and time.monotonic() - asked_at >= 0.2


@pytest.mark.parametrize("content", ["flood", "big_then_small", "small_then_big"])
@pytest.mark.parametrize("middleware", [0, 5])
@pytest.mark.parametrize("server", WITH_BACK_PRESSURE)
def test_a_client_drops_while_its_socket_is_full(serving: Start, server: str, middleware: int, content: str) -> None:
    """C7: one interruption, whether the stream's task waits in ``send`` or its helper does."""
    live = serving(server, middleware)
    client = live.open(f"/route/{content}?heartbeat=0.05")
    live.wait_for("/stats", started=1, asked_at=has_been_stuck)
    client.abort()
    state = ended(live, 1, may_say=WRITTEN_TOO_LATE if middleware else None)
    assert state["info"]["cause"] == "disconnect"


@pytest.mark.parametrize("content", ["flood", "big_then_small", "small_then_big"])
@pytest.mark.parametrize("server", INTERRUPTIBLE)
def test_a_client_that_does_not_read_is_given_up(serving: Start, server: str, content: str) -> None:
    """C18, HenryLach/taskplane#664: the stream ends as stalled though its client stays."""
    live = serving(server)
    with live.open(f"/route/{content}?send_timeout=0.3"):
        assert ended(live, 1, may_say=CUT_OFF)["info"]["cause"] == "stalled"


@pytest.mark.parametrize("path", ["/route/idle?ping_size=1000000&", "/route/boulder?"])
@pytest.mark.parametrize("server", INTERRUPTIBLE)
def test_a_heartbeat_that_cannot_be_written_ends_the_stream(serving: Start, server: str, path: str) -> None:
    """C18, C20: nothing but heartbeats is there to notice that the client does not read."""
    live = serving(server)
    with live.open(f"{path}heartbeat=0.05&send_timeout=0.3"):
        state = ended(live, 1, may_say=CUT_OFF)
    assert state["info"]["cause"] == "stalled"
    assert state["info"]["events"] <= 1


@pytest.mark.parametrize("app", APPS)
@pytest.mark.parametrize("server", SERVERS)
def test_client_gone_before_the_first_event(serving: Start, server: str, app: str) -> None:
    """C11: the generator waits for its first event when the client leaves."""
    live = serving(server)
    clients = [live.open(f"/{app}/silent") for _ in range(5)]
    live.wait_for("/stats", started=5)
    for client in clients:
        client.abort()
    info = ended(live, 5)["info"]
    assert (info["events"], info["bytes"], info["last_id"]) == (0, 0, None)


@pytest.mark.parametrize("middleware", [0, 5])
@pytest.mark.parametrize("server", SERVERS)
def test_client_gone_before_the_response_starts(serving: Start, server: str, middleware: int) -> None:
    """C11, stemdeckapp/stemdeck#513: the hooks run once although the generator never started."""
    live = serving(server, middleware)
    client = live.open("/route/late")
    live.wait_for("/stats", waiting=1)
    client.abort()
    state = ended(live, 1, ["cleanup", "on_disconnect"])
    assert state["started"] == 0


@pytest.mark.parametrize("app", ["plain", "bare"])
@pytest.mark.parametrize("server", SERVERS)
def test_client_gone_before_an_unwatched_response_starts(serving: Start, server: str, app: str) -> None:
    """C11: without our route the response hears of it only when it runs; its hooks run all the same."""
    live = serving(server)
    client = live.open(f"/{app}/late")
    live.wait_for("/stats", waiting=1)
    client.abort()
    live.get("/open-gates")
    state = live.wait_for("/stats", running=0, tasks=[], seen=lambda seen: "1 on_disconnect" in seen)
    ended(live, 1, MARKS if state["started"] else ["cleanup", "on_disconnect"])


@pytest.mark.parametrize("app", APPS)
@pytest.mark.parametrize("server", SERVERS)
def test_head_opens_no_stream(serving: Start, server: str, app: str) -> None:
    """sysid/sse-starlette#218: the headers, no content, and the hooks run."""
    live = serving(server)
    with live.open(f"/{app}/idle", "HEAD") as client:
        status, headers = client.head()
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert ended(live, 1, ["cleanup"])["started"] == 0


@pytest.mark.parametrize("middleware", [0, 5])
@pytest.mark.parametrize("server", SERVERS)
def test_a_connection_serves_on_after_a_finished_stream(serving: Start, server: str, middleware: int) -> None:
    """C5: a complete stream is not a disconnect, and leaves its connection as it was."""
    live = serving(server, middleware)
    with live.connect() as client:
        for _ in range(3):
            client.request("/route/finite?heartbeat=0.05")
            status, body = client.response()
            assert (status, body.count(b"data: event")) == (200, 3)
        client.request("/route/idle")
        client.until(b"first")
        client.abort()
    state = live.wait_for("/stats", running=0, tasks=[])
    assert sorted(mark for mark in state["seen"] if "on_disconnect" in mark) == ["4 on_disconnect"]
    assert len(state["seen"]) == 3 * 2 + 3
    assert live.complaints() == []


@pytest.mark.parametrize("server", SERVERS)
def test_info_of_a_finished_stream(serving: Start, server: str) -> None:
    live = serving(server)
    _, body = live.get("/route/finite")
    info = ended(live, 1, ["cleanup", "generator"])["last_info"]
    assert info.pop("seconds") >= 0
    assert info == {"cause": None, "events": 3, "bytes": len(body), "last_id": "id-2"}


@pytest.mark.parametrize("server", SERVERS)
def test_info_of_a_dropped_stream(serving: Start, server: str) -> None:
    live = serving(server)
    began = time.monotonic()
    (client,) = open_idle(live, "/route/idle", 1)
    client.abort()
    info = ended(live, 1)["info"]
    assert 0 <= info.pop("seconds") <= time.monotonic() - began
    sent = b"id: id-1\r\ndata: first\r\n\r\n"
    assert info == {"cause": "disconnect", "events": 1, "bytes": len(sent), "last_id": "id-1"}


@pytest.mark.parametrize("server", SERVERS)
def test_events_arrive_once_and_in_order_between_heartbeats(serving: Start, server: str) -> None:
    """C20: no event is lost, doubled or cut in two, however slowly the client reads."""
    live = serving(server)
    with live.open("/route/paced?heartbeat=0.05") as client:
        client.head()
        text = slowly_read(client).decode()
    blocks = [block for block in text.split("\r\n\r\n") if not block.startswith(": ping")]
    assert blocks == [f"id: {event}\r\ndata: {paced_data(event)}" for event in range(PACED)] + [""]
    assert ": ping" in text
    ended(live, 1, ["cleanup", "generator"])


def slowly_read(client: RawClient) -> bytes:
    """A chunked body, read in small pieces with pauses, so that the server has to wait."""
    body = b""
    while size := int(client.until(b"\r\n"), 16):
        body += client.exactly(size)
        client.until(b"\r\n")
        time.sleep(0.002)
    return body
