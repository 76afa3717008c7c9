"""The lines of the contract that a server can influence, each as a check on a running server."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any

from fastapi_cancel.sse import StreamInfo
from fastapi_cancel.testing import RawClient
from fastapi_cancel.testing.http2 import Http2Stream

from .matrix import Protocol, Row
from .matrix_cell import STUCK, Cell, Request, leave
from .sse_app import PACED, paced_data

MIB = 1 << 20
ENDED = (0, -signal.SIGTERM)  # uvicorn ends by the signal that it was sent

ROWS: list[Row] = []
Check = Callable[[Cell], None]


def row(
    number: int, text: str, name: str = "", *, protocol: Protocol | None = None, stops: bool = False
) -> Callable[[Check], Check]:
    """A line of the contract, and what the page calls it."""

    def add(check: Check) -> Check:
        ROWS.append(Row(name or check.__name__, number, text, check, protocol, stops))
        return check

    return add


# -- detecting -----------------------------------------------------------------------------------


@row(2, "`request.is_disconnected()` turns true")
def is_disconnected(cell: Cell) -> None:
    leave(*cell.begin("/poll"))
    assert cell.until(cleaned=1)["seen"] == ["disconnected"]


@row(4, "an upload that is cut ends its reading, and the work")
def upload_cut(cell: Cell) -> None:
    request = cell.open("/upload", "POST", b"x" * 1000, of=MIB)
    cell.until(seen=lambda seen: seen[:1] == [1000])
    leave(request)
    assert cell.until(cleaned=1)["seen"] == ["ClientDisconnect"]


@row(4, "an upload that is cut ends the work on an earlier piece")
def upload_cut_behind_the_work(cell: Cell) -> None:
    request = cell.open("/upload-then-work", "POST", b"x" * 1000, of=MIB)
    cell.until(seen=["chunk"])
    leave(request)
    cell.until(cleaned=1)


@row(4, "an upload arrives whole")
def upload_whole(cell: Cell) -> None:
    status, body = cell.open("/upload?pause=0.0001", "POST", bytes(range(256)) * 8192).response()
    assert status == 200
    assert b'"size":2097152' in body


@row(4, "an upload that nobody reads waits with its client, not in memory")
def upload_back_pressure(cell: Cell) -> None:
    size = (12 if cell.http2 else 24) * MIB  # more than all buffers on the way
    before = cell.live.json("/stats")["memory"]
    request = cell.open("/upload-at-the-gate", "POST", of=size)
    cell.until(waiting=1)
    upload = Upload(request, size)
    upload.wait_until_stuck()
    assert upload.sent < size, "all was taken"
    cell.live.get("/open-gates")
    upload.join(cell.live.deadline)
    assert request.head()[0] == 200
    received, peak = cell.until(cleaned=1)["seen"]
    assert received == size
    assert peak - before < size / 2


class Upload:
    """A body, sent by a thread of its own as fast as it is taken."""

    def __init__(self, request: Request, size: int) -> None:
        self.sent = 0
        self._request = request
        self._size = size
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def _send(self) -> None:
        piece = b"x" * 65536
        with suppress(OSError):  # it is cut off: that shows in what was sent
            while self.sent < self._size:
                if isinstance(self._request, Http2Stream):
                    self._request.send(piece, end=self.sent + len(piece) == self._size)
                else:
                    self._request.send(piece)
                self.sent += len(piece)

    def wait_until_stuck(self) -> None:
        """Or until all has been sent."""
        before = 0
        while self.sent < self._size and not 0 < self.sent == before:
            before = self.sent
            time.sleep(STUCK)

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)
        assert self.sent == self._size


@row(4, "`Expect: 100-continue`: nothing invites the body but the handler", protocol="HTTP/1")
def expect_refused(cell: Cell) -> None:
    request = cell.open("/refuse", "POST", of=MIB, headers={"expect": "100-continue"})
    assert request.head()[0] == 413


@row(4, "`Expect: 100-continue`: a handler that reads invites the body", protocol="HTTP/1")
def expect_granted(cell: Cell) -> None:
    request = cell.open("/upload", "POST", of=4, headers={"expect": "100-continue"})
    assert request.head()[0] == 100
    request.send(b"body")
    status, body = request.response()
    assert status == 200
    assert b'"size":4' in body


@row(5, "a response that has been sent is never a disconnect: its background task goes on")
def background_outlives_its_client(cell: Cell) -> None:
    request = cell.open("/background?seconds=0.2")
    assert request.response() == (200, b'"done"')
    cell.hang_up(request)
    cell.until(cleaned=1)


@row(1, "a connection that is cut in its fourth request: that one alone ends", protocol="HTTP/1")
def kept_alive(cell: Cell) -> None:
    client = cell.open("/upload", "POST", b"x" * 70_000)
    assert isinstance(client, RawClient)
    assert b'"size":70000' in client.response()[1]
    for _ in range(2):
        client.request("/route/finite?heartbeat=0.05")
        status, body = client.response()
        assert (status, body.count(b"data: event")) == (200, 3)
    client.request("/handler")
    cell.until(started=4)
    client.abort()
    cell.until(cleaned=2)
    visits = cell.over("/upload", "/route/finite", "/handler")
    assert [visit.cause for visit in visits] == [None, None, None, "disconnect"]


@row(1, "a stream that is reset: that one alone ends, not its neighbours on the connection", protocol="HTTP/2")
def neighbours(cell: Cell) -> None:
    upload = cell.open("/upload", "POST", b"x" * 1000, of=2000)
    events, stream = cell.open("/route/idle?heartbeat=0.05"), cell.open("/stream")
    events.until(b"first")
    stream.until(b"first")
    upload_to_reset = cell.open("/upload-then-work", "POST", b"x" * 1000, of=2000)
    events_to_reset, stream_to_reset = cell.open("/plain/idle"), cell.open("/plain-stream")
    events_to_reset.until(b"first")
    stream_to_reset.until(b"first")
    handler_to_reset = cell.open("/included/handler")
    cell.until(started=7)
    leave(upload_to_reset, events_to_reset, stream_to_reset, handler_to_reset)
    reset = cell.over("/upload-then-work", "/plain/idle", "/plain-stream", "/included/handler")
    assert [visit.cause for visit in reset] == ["disconnect"] * 4

    assert isinstance(upload, Http2Stream)
    upload.send(b"x" * 1000, end=True)
    assert b'"size":2000' in upload.response()[1]
    assert cell.open("/hello").response() == (200, b'"hello"')
    for _ in range(3):
        events.until(b": ping")
    assert [visit.ended for visit in cell.visits("/route/idle", "/stream")] == [None, None]
    leave(events, stream)
    assert [visit.cause for visit in cell.over("/route/idle", "/stream")] == ["disconnect"] * 2


# -- ending --------------------------------------------------------------------------------------


def five_leave(cell: Cell, path: str, marker: bytes) -> None:
    requests = cell.begin(path, count=5)
    for request in requests:
        if marker:
            request.until(marker)
    cell.leave_all(requests, lambda count: cell.until(cleaned=count))
    assert [visit.cause for visit in cell.over(path)] == ["disconnect"] * 5


for path, work in {
    "/handler": "a handler",
    "/stream": "a `CancellableStreamingResponse`",
    "/stream-on-plain-route": "a `CancellableStreamingResponse` on a plain route",
    "/plain-stream": "a `StreamingResponse`",
    "/sse": "an endpoint that yields server-sent events",
    "/json-lines": "an endpoint that yields JSON lines",
}.items():
    row(7, f"5 of 5 cleanups that await: {work}", path[1:].replace("-", "_"))(
        partial(five_leave, path=path, marker=b"" if path == "/handler" else b"first")
    )


def leave_a_full_socket(cell: Cell, path: str) -> None:
    request = cell.open(path)
    cell.until_stuck()
    leave(request)
    cell.until(cleaned=1)
    assert [visit.cause for visit in cell.over(path)] == ["disconnect"]


row(7, "gone while `send` waits: a `CancellableStreamingResponse`", "flood")(
    partial(leave_a_full_socket, path="/flood")
)
row(7, "gone while `send` waits: a `StreamingResponse`", "plain_flood")(
    partial(leave_a_full_socket, path="/plain-flood")
)


@row(7, "a cleanup that hangs is forced at its deadline, and logged")
def forced(cell: Cell) -> None:
    leave(*cell.begin("/swallow"), *cell.begin("/hang"))
    cell.over("/swallow", "/hang")
    assert sorted(cell.until()["seen"]) == ["forced", "forced", "swallowed"]
    lines = cell.live.complaints()
    assert len(lines) == 2
    for path in ("swallow", "hang"):
        assert any(f"GET /{path} ({path})" in line and "0.3 s (cause: disconnect)" in line for line in lines)
    cell.is_clean = False


@row(7, "tasks that a handler awaits are cancelled once")
def tasks(cell: Cell) -> None:
    leave(*cell.begin("/tasks"))
    assert cell.until(cleaned=1)["seen"] == ["job", "job"]


@row(8, "a shielded commit is waited for")
def shield(cell: Cell) -> None:
    leave(*cell.begin("/shield"))
    assert cell.until(cleaned=1)["seen"] == ["committed"]


@row(8, "nothing is torn down under a worker thread")
def in_thread(cell: Cell) -> None:
    leave(*cell.begin("/in-thread"))
    assert cell.until(cleaned=1)["seen"] == ["thread finished", "torn down"]


@row(9, "a `def` handler is told by its token")
def def_handler(cell: Cell) -> None:
    leave(*cell.begin("/thread"))
    assert cell.until(cleaned=1)["seen"] == ["disconnect"]


@row(9, "synchronous generators are closed in a thread")
def sync_generators(cell: Cell) -> None:
    for number, path in enumerate(("/sync-stream", "/plain-sync-stream", "/sync-sse", "/sync-json-lines"), 1):
        (request,) = cell.begin(path)
        request.until(b"first")
        leave(request)
        assert cell.until(cleaned=number)["seen"] == [True] * number
        cell.over(path)


@row(10, "a transaction rolls back in a `yield` dependency")
def transaction(cell: Cell) -> None:
    for number, path in enumerate(("/order", "/sync-order"), 1):
        leave(*cell.begin(path, "POST"))
        cell.over(path)
        seen = cell.until(seen=lambda seen, number=number: len(seen) == number)["seen"]
        assert seen[-1].startswith("rollback: ")
    assert cell.live.json("/orders") == []


@row(11, "the cleanup of a response runs though its body never began")
def never_started(cell: Cell) -> None:
    leave(*cell.begin("/never-started"))
    assert cell.until(cleaned=1)["started"] == 1


@row(12, "a background task runs after a disconnect")
def background_after_disconnect(cell: Cell) -> None:
    requests = [cell.open(path) for path in ("/background-of-stream", "/background-of-plain-stream")]
    for request in requests:
        request.until(b"first")
    leave(*requests)
    assert cell.until(seen=["background", "background"])["cleaned"] == 2


@row(13, "middleware sees 499")
def status_499(cell: Cell) -> None:
    leave(*cell.begin("/handler"))
    assert [visit.status for visit in cell.over("/handler")] == [499]
    assert cell.until(cleaned=1)["statuses"] == [499] * cell.layers


@row(13, "the server's access log says 499")
def access_log(cell: Cell) -> None:
    leave(*cell.begin("/handler"))
    cell.over("/handler")
    cell.open("/hello").response()
    cell.live.wait_for_log("/hello")  # what comes earlier is there by now
    assert " 499 " in cell.live.log


@row(13, "an error in a cleanup is logged as one")
def error_in_cleanup(cell: Cell) -> None:
    leave(*cell.begin("/raise"))
    cell.until(cleaned=1)
    cell.live.wait_for_log("ValueError: the cleanup failed")
    cell.is_clean = False


@row(14, "SIGTERM in the middle of a cleanup lets it finish, with `lifespan()`", stops=True)
def sigterm_during_cleanup(cell: Cell) -> None:
    (request,) = cell.begin("/slow-cleanup")
    cell.hang_up(request)
    cell.until(seen=["cleaning"])
    cell.stop()
    assert cell.wait() in ENDED
    assert "[INFO] cleaned" in cell.live.log


@row(99, "within the grace of its policy, a handler finishes by itself")
def grace(cell: Cell) -> None:
    leave(*cell.begin("/grace"))
    assert cell.until(cleaned=1)["seen"] == ["disconnect"]


@row(99, "a handler that takes too long for its policy is answered with 504")
def limit(cell: Cell) -> None:
    assert cell.open("/limit").response() == (504, b'{"detail":"Gateway Timeout"}')
    cell.until(cleaned=1)


# -- streams -------------------------------------------------------------------------------------


@row(17, "generators that never await starve nobody, and end with their client")
def greedy(cell: Cell) -> None:
    for number, path in enumerate(("/greedy", "/plain-greedy"), 1):
        (request,) = cell.begin(path)
        request.until(b"xxxx")
        leave(request)
        cell.until(cleaned=number)


@row(18, "work for a client that does not read is given up: a `CancellableStreamingResponse`")
def stalled(cell: Cell) -> None:
    (request,) = cell.begin("/stalled")
    assert cell.until(cleaned=1, seen=["ended"])
    leave(request)
    assert [visit.cause for visit in cell.over("/stalled")] == ["stalled"]


@row(18, "the server is rid of the request of a client that does not read, though that stays")
def stalled_request(cell: Cell) -> None:
    cell.begin("/stalled")
    cell.over("/stalled")


# -- SSEResponse ---------------------------------------------------------------------------------

APPS = ["route", "plain", "bare"]  # on a CancellableRoute, on FastAPI's own, in Starlette
MARKS = ["cleanup", "generator", "on_disconnect"]


def marked(cell: Cell, count: int, marks: list[str] = MARKS, over: bool = True) -> dict[str, Any]:
    """Wait until all is over: each of ``marks`` was left by each stream, once, and nothing else was."""
    if over:
        cell.over()
    expected = sorted(f"{number} {name}" for number in range(1, count + 1) for name in marks)
    state = cell.until(seen=lambda seen: len(seen) >= len(expected))
    assert sorted(state["seen"]) == expected
    return state


def six_leave(cell: Cell, query: str, marker: bytes) -> None:
    requests = [cell.open(f"/{app}/idle{query}") for app in APPS * 2]
    for request in requests:
        request.until(marker)
    cell.leave_all(requests, lambda count: cell.until(seen=lambda seen: len(seen) >= len(MARKS) * count))
    marked(cell, 6)
    assert [visit.cause for visit in cell.over(*(f"/{app}/idle" for app in APPS))] == ["disconnect"] * 6


row(19, "6 of 6 `SSEResponse`s, in FastAPI and in Starlette: all hooks run, once", "sse_idle")(
    partial(six_leave, query="", marker=b"first")
)
row(20, "all hooks of an `SSEResponse` run, once: gone while heartbeats go out", "sse_heartbeats")(
    partial(six_leave, query="?heartbeat=0.05", marker=b": ping - ")
)


@row(17, "all hooks of an `SSEResponse` run, once: gone in a burst from a content that never awaits")
def sse_burst(cell: Cell) -> None:
    requests = [cell.open("/route/burst") for _ in range(5)]
    for request in requests:
        request.until(b"first")
    leave(*requests)
    marked(cell, 5)


@row(7, "all hooks of an `SSEResponse` run, once: gone while `send` waits")
def sse_full_socket(cell: Cell) -> None:
    paths = [f"/route/{content}" for content in ("flood", "big_then_small", "small_then_big")]
    requests = [cell.open(f"{path}?heartbeat=0.05") for path in paths]
    cell.until_stuck(3)
    leave(*requests)
    marked(cell, 3)
    assert [visit.cause for visit in cell.over(*paths)] == ["disconnect"] * 3


@row(11, "all hooks of an `SSEResponse` run, once: gone before the first event")
def sse_before_first_event(cell: Cell) -> None:
    requests = [cell.open(f"/{app}/silent") for app in APPS]
    cell.until(started=3)
    leave(*requests)
    info = marked(cell, 3)["info"]
    assert (info["events"], info["bytes"], info["last_id"]) == (0, 0, None)


@row(11, "all hooks of an `SSEResponse` run, once: gone before the response begins")
def sse_never_started(cell: Cell) -> None:
    request = cell.open("/route/late")
    cell.until(waiting=1)
    leave(request)
    assert marked(cell, 1, ["cleanup", "on_disconnect"])["started"] == 0


@row(11, "all hooks of an `SSEResponse` run, once: gone before the response begins, where only that hears of it")
def sse_never_started_unwatched(cell: Cell) -> None:
    requests = [cell.open(f"/{app}/late") for app in ("plain", "bare")]
    cell.until(waiting=2)
    leave(*requests)
    cell.live.get("/open-gates")
    cell.over("/plain/late", "/bare/late")
    seen = cell.until(seen=lambda seen: len(seen) >= 4)["seen"]  # a content that did begin is closed, too
    assert sorted(mark for mark in seen if "generator" not in mark) == [
        *("1 cleanup", "1 on_disconnect", "2 cleanup", "2 on_disconnect")
    ]


def given_up(cell: Cell, *paths: str) -> int:
    """:return: how many events the last of them sent"""
    requests = [cell.open(path) for path in paths]
    info = marked(cell, len(paths), over=not cell.layers)["info"]
    assert info["cause"] == "stalled"
    if cell.layers:
        leave(*requests)
    assert {visit.cause for visit in cell.over(*(path.partition("?")[0] for path in paths))} == {"stalled"}
    return int(info["events"])


@row(18, "work for a client that does not read is given up: an `SSEResponse`")
def sse_stalled(cell: Cell) -> None:
    given_up(cell, *(f"/route/{content}?send_timeout=0.3" for content in ("flood", "big_then_small", "small_then_big")))


@row(20, "a client that does not read is noticed by heartbeats alone")
def sse_unwritten_heartbeat(cell: Cell) -> None:
    paths = (f"/route/{kind}heartbeat=0.05&send_timeout=0.3" for kind in ("idle?ping_size=4000000&", "boulder?"))
    assert given_up(cell, *paths) <= 1


@row(20, "events arrive once and in order between heartbeats, however slowly they are read")
def sse_paced(cell: Cell) -> None:
    request = cell.open("/route/paced?heartbeat=0.05", room=4096)
    cell.until_stuck(or_seen="1 generator")  # if the server takes it all
    text = request.response()[1].decode()
    blocks = [block for block in text.split("\r\n\r\n") if not block.startswith(": ping")]
    assert blocks == [f"id: {event}\r\ndata: {paced_data(event)}" for event in range(PACED)] + [""]
    assert ": ping" in text
    marked(cell, 1, ["cleanup", "generator"])


@row(19, "the hooks are told what was sent, and why it ended")
def sse_info(cell: Cell) -> None:
    began = time.monotonic()
    _, body = cell.open("/route/finite").response()
    info = marked(cell, 1, ["cleanup", "generator"])["last_info"]
    assert 0 <= info.pop("seconds") <= time.monotonic() - began
    assert info == timeless(StreamInfo(None, events=3, bytes=len(body), last_id="id-2"))
    request = cell.open("/route/idle")
    request.until(b"first")
    leave(request)
    cell.over("/route/idle")
    info = cell.until(seen=lambda seen: len(seen) == 5)["info"]
    assert 0 <= info.pop("seconds") <= time.monotonic() - began
    sent = b"id: id-2\r\ndata: first\r\n\r\n"
    assert info == timeless(StreamInfo("disconnect", events=1, bytes=len(sent), last_id="id-2"))


def timeless(info: StreamInfo) -> dict[str, Any]:
    return {name: value for name, value in asdict(info).items() if name != "seconds"}


@row(19, "HEAD opens no stream of events")
def sse_head(cell: Cell) -> None:
    for app in APPS:
        status, headers = cell.open(f"/{app}/idle", "HEAD").head()
        assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert marked(cell, 3, ["cleanup"])["started"] == 0


FAREWELL = b"retry: 1500\r\n\r\nevent: bye\r\ndata: come back\r\n\r\n"


@row(22, "at SIGTERM each stream gets its farewell and cleans up, and the server ends", stops=True)
def farewell(cell: Cell) -> None:
    requests = cell.begin("/farewell", count=3)
    for request in requests:
        request.until(b"first")
    cell.stop()
    assert [FAREWELL in request.rest() for request in requests] == [True] * 3
    assert cell.wait() in ENDED
    assert cell.live.log.count("[INFO] stream cleaned") == 3
