"""Real clients on a real server: Chromium's EventSource, httpx-sse, curl; HTTP/2 through Hypercorn."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from urllib.parse import quote, urlencode

import anyio
import httpx
import pytest
from httpx_sse import EventSource, ServerSentEvent, aconnect_sse, connect_sse

from fastapi_cancel.testing.live import LiveServer

from .client_app import NAMES, SEEN
from .conftest import DEADLINE, Start

APP = "tests.client_app:app"
LINE_ENDS = pytest.mark.parametrize("sep", ["\r\n", "\n", "\r"], ids=["CRLF", "LF", "CR"])
UNICODE_ID = "日本-é-😀"


@pytest.fixture
def server(running: Start) -> LiveServer:
    return running("uvicorn", app=APP)


def publish(server: LiveServer, **event: str) -> None:
    headers = {"Content-Type": "application/json", "Connection": "close"}
    with server.open("/publish", "POST", headers, json.dumps(event).encode()) as client:
        status, body = client.response()
    assert status == 200, body


def wait_for_heartbeats(server: LiveServer, count: int = 3) -> None:
    """Until so many more have gone out."""
    wanted = server.json("/stats")["heartbeats"] + count
    server.wait_for("/stats", heartbeats=lambda heartbeats: heartbeats >= wanted)


def assert_cleaned_up(server: LiveServer) -> None:
    """One client has left: the awaiting cleanup and the hooks have run to their end, and nobody complains."""
    server.wait_for("/stats", running=0, cleaned=1, causes=["disconnect"])
    assert server.complaints() == []


# -- Chromium ------------------------------------------------------------------------------------


class Browser:
    """A headless Chromium with a profile of its own; its tabs are opened and closed over the DevTools protocol."""

    OPTIONS = (
        "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run"
        " --disable-background-networking --disable-component-update --disable-sync --no-proxy-server"
        " --remote-debugging-port=0"
    )

    def __init__(self) -> None:
        program = shutil.which("chromium")
        assert program is not None, "these tests need Chromium: run scripts/system.py"
        self.directory = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # its helpers end a little later
        home = Path(self.directory.name)
        self.log = home / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [program, *self.OPTIONS.split(), f"--user-data-dir={home / 'profile'}", "about:blank"],
                env={**os.environ, "HOME": str(home), "TMPDIR": str(home)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.port = self._port(home / "profile" / "DevToolsActivePort")

    def _port(self, file: Path) -> int:
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end and self.process.poll() is None:
            if file.exists() and "\n" in (text := file.read_text()):
                return int(text.splitlines()[0])
            time.sleep(0.02)
        log = self.log.read_text()
        self.stop()
        raise AssertionError(f"Chromium did not start: {log}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(DEADLINE)
        finally:
            with contextlib.suppress(ProcessLookupError):  # its helpers
                os.killpg(self.process.pid, signal.SIGKILL)
            self.directory.cleanup()

    def devtools(self, method: str, path: str) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)
        with contextlib.closing(connection):
            connection.request(method, path)
            response = connection.getresponse()
            body = response.read()
        assert response.status == 200, body
        return body

    @contextlib.contextmanager
    def tab(self, server: LiveServer, **stream: object) -> Iterator[Tab]:
        """The page of the application, with an EventSource on a stream that has these parameters."""
        asked = urlencode({"stream": urlencode(stream), "name": NAMES}, doseq=True)
        page = quote(f"{server.url}/page?{asked}")
        tab = Tab(self, json.loads(self.devtools("PUT", f"/json/new?{page}"))["id"])
        try:
            yield tab
        finally:
            tab.close()


class Tab:
    def __init__(self, browser: Browser, id: str) -> None:
        self.browser = browser
        self.id = id
        self.open = True

    def close(self) -> None:
        if self.open:
            self.open = False
            self.browser.devtools("GET", f"/json/close/{self.id}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.stop()


@LINE_ENDS
def test_browser_sees_every_kind_of_event(server: LiveServer, browser: Browser, sep: str) -> None:
    """C19: several lines, named, empty, long, with ids, U+2028, emoji; of every type that a stream may yield."""
    with browser.tab(server, everything=1, sep=sep):
        server.wait_for("/stats", seen=[["open"], *SEEN])


def test_browser_is_open_before_the_first_event(server: LiveServer, browser: Browser) -> None:
    """Issue 3: the head of the response waits neither for the first event nor for a heartbeat."""
    with browser.tab(server):
        server.wait_for("/stats", seen=[["open"]])
        publish(server, data="first")
        server.wait_for("/stats", seen=[["open"], ["message", "first", ""]])


def test_heartbeats_are_no_events_to_a_browser(server: LiveServer, browser: Browser) -> None:
    """C20: an idle stream with heartbeats dispatches nothing, and goes on."""
    with browser.tab(server, heartbeat=0.05):
        wait_for_heartbeats(server)
        publish(server, data="named", event="named", id="1")
        server.wait_for("/stats", seen=[["open"], ["named", "named", "1"]])
        wait_for_heartbeats(server)
        publish(server, data="unnamed")
        server.wait_for("/stats", seen=[["open"], ["named", "named", "1"], ["message", "unnamed", "1"]])


def test_browser_misses_nothing_when_its_connection_is_cut(server: LiveServer, browser: Browser) -> None:
    """Issue 3: cut right after an event or before it, four times: each event is seen once, in order."""
    with browser.tab(server, retry=20):
        for number in range(1, 9):
            if number % 2:
                server.wait_for("/stats", opened=number // 2 + 1)
            else:
                server.json("/drop")
            publish(server, data="data", id=f"{number}")
        server.wait_for("/stats", opened=5, dispatched=[["message", "data", f"{number}"] for number in range(1, 9)])
    server.wait_for("/stats", running=0, cleaned=5)
    assert server.complaints() == []


def test_browser_comes_back_with_the_last_id(server: LiveServer, browser: Browser) -> None:
    """Issue 3: after a cut, the browser sends the id of the last event that it saw; as UTF-8."""
    with browser.tab(server, retry=20):
        server.wait_for("/stats", opened=1)
        publish(server, data="seen", id=UNICODE_ID)
        publish(server, data="seen too")
        server.wait_for("/stats", dispatched=[["message", "seen", UNICODE_ID], ["message", "seen too", UNICODE_ID]])
        server.json("/drop")
        server.wait_for("/stats", opened=2, came_with=[None, UNICODE_ID])


def test_browser_waits_as_long_as_it_is_told(server: LiveServer, browser: Browser) -> None:
    """Issue 3: ``retry`` holds; Chromium by itself would be back after 3 s."""
    with browser.tab(server, retry=3300):
        server.wait_for("/stats", opened=1)
        dropped = server.json("/drop")
        came = server.wait_for("/stats", came_with=[None, None])["came"]
        assert came[1][1] - dropped > 3.25


def test_browser_hears_the_farewell_and_comes_back(server: LiveServer, browser: Browser) -> None:
    """C22: draining is an event to the page; the browser then comes back by itself, and misses nothing."""
    with browser.tab(server, retry=20):
        server.wait_for("/stats", opened=1)
        publish(server, data="before", id="1")
        server.wait_for("/stats", dispatched=[["message", "before", "1"]])
        assert server.json("/drain") == 1
        publish(server, data="after", id="2")
        expected = [["message", "before", "1"], ["farewell", "see you", "1"], ["message", "after", "2"]]
        server.wait_for("/stats", dispatched=expected, came_with=[None, "1"], cleaned=1, causes=["shutdown"])
    assert server.complaints() == []


@pytest.mark.parametrize("leave", ["tab closed", "source closed"])
def test_closing_the_page_reaches_the_generator(server: LiveServer, browser: Browser, leave: str) -> None:
    """C1, C7, C13: a browser that leaves an idle stream, either way."""
    with browser.tab(server) as tab:
        server.wait_for("/stats", opened=1)
        if leave == "tab closed":
            tab.close()
        else:
            publish(server, event="close", data="")
        assert_cleaned_up(server)


# -- httpx-sse -----------------------------------------------------------------------------------


def dispatched(sse: ServerSentEvent) -> bool:
    """Whether a browser would dispatch it: httpx-sse makes an event of every comment once there was an id."""
    return sse.data != "" or sse.event != "message"


def as_seen(sse: ServerSentEvent) -> list[str]:
    return [sse.event, sse.data, sse.id]


def httpx_client(server: LiveServer) -> httpx.Client:
    return httpx.Client(base_url=server.url, trust_env=False, timeout=DEADLINE)


def httpx_async_client(server: LiveServer) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=DEADLINE)


@LINE_ENDS
def test_httpx_sse_sees_every_kind_of_event(server: LiveServer, sep: str) -> None:
    """C19: the same events as a browser; when it leaves, the generator is cleaned up."""
    with (
        httpx_client(server) as client,
        connect_sse(client, "GET", "/events", params={"everything": 1, "sep": sep}) as source,
    ):
        found = list(islice(filter(dispatched, source.iter_sse()), len(SEEN)))
    assert [as_seen(sse) for sse in found] == SEEN
    assert [sse.retry for sse in found if sse.retry is not None] == [2000]
    assert_cleaned_up(server)


@pytest.mark.anyio
async def test_asynchronous_httpx_sse_sees_every_kind_of_event(server: LiveServer) -> None:
    """C19: the same events; the reader is cancelled while it waits for more, and the generator is cleaned up."""
    found: list[list[str]] = []
    async with httpx_async_client(server) as client:
        with anyio.CancelScope() as scope:
            async with aconnect_sse(client, "GET", "/events", params={"everything": 1}) as source:
                async for sse in source.aiter_sse():
                    if dispatched(sse):
                        found.append(as_seen(sse))
                    if len(found) == len(SEEN):
                        scope.cancel()
        assert found == SEEN
        assert_cleaned_up(server)


def test_httpx_sse_goes_on_where_it_left_off(server: LiveServer) -> None:
    """Issue 3: a client that sends the last id itself, as UTF-8, gets what came after it."""
    for number in ("1", UNICODE_ID, "3"):
        publish(server, data="data", id=number)
    with httpx_client(server) as client:
        with connect_sse(client, "GET", "/events") as source:
            seen = list(islice(source.iter_sse(), 2))[-1].id
        with connect_sse(client, "GET", "/events", headers={"Last-Event-ID": seen.encode()}) as source:
            assert [sse.id for sse in islice(source.iter_sse(), 1)] == ["3"]
    server.wait_for("/stats", running=0, cleaned=2, came_with=[None, UNICODE_ID])
    assert server.complaints() == []


# -- curl, HTTP/2 --------------------------------------------------------------------------------


class Curl:
    """``curl -N``; after the deadline it gives up by itself."""

    def __init__(self, port: int, path: str, *options: str) -> None:
        program = shutil.which("curl")
        assert program is not None, "these tests need curl: run scripts/system.py"
        command = [program, "-q", "-N", "--silent", "--show-error", "--include", "--noproxy", "*"]
        command += ["--max-time", f"{DEADLINE}", *options, f"http://127.0.0.1:{port}{path}"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0)
        self.buffer = b""

    def until(self, marker: bytes) -> bytes:
        """Read up to and including ``marker``."""
        assert self.process.stdout is not None
        while marker not in self.buffer:
            received = self.process.stdout.read(65536)
            assert received, f"ended before {marker!r}: {self.buffer!r}"
            self.buffer += received
        read, marker, self.buffer = self.buffer.partition(marker)
        return read + marker

    def kill(self) -> None:
        self.process.kill()

    def __enter__(self) -> Curl:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()
        with self.process:  # closes the pipe, and waits
            pass


LAST_OF_ALL = b"now have the last event\r\n\r\n"


def parse(body: bytes) -> list[list[str]]:
    """What httpx-sse makes of it."""
    source = EventSource(httpx.Response(200, headers={"Content-Type": "text/event-stream"}, content=body))
    return [as_seen(sse) for sse in source.iter_sse() if dispatched(sse)]


def test_curl_sees_every_kind_of_event(server: LiveServer) -> None:
    """C19, C7, C13: the same events; the generator of a curl that is killed is cleaned up."""
    with Curl(server.port, "/events?everything=1") as curl:
        head = curl.until(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"\r\nconnection:" not in head.lower()
        assert b"\r\ncache-control: no-store\r\n" in head
        assert b"\r\nx-accel-buffering: no\r\n" in head
        assert parse(curl.until(LAST_OF_ALL)) == SEEN
        curl.kill()
        assert_cleaned_up(server)


@pytest.fixture
def hypercorn(running: Start) -> LiveServer:
    return running("hypercorn", app=APP)


def test_http2_client_sees_every_kind_of_event(hypercorn: LiveServer) -> None:
    """Issue 3: no header that HTTP/2 forbids (RFC 9113, 8.2.2), the same events, the same cleanup."""
    with Curl(hypercorn.port, "/events?everything=1", "--http2-prior-knowledge") as curl:
        head = curl.until(b"\r\n\r\n").decode()
        assert head.startswith("HTTP/2 200")
        names = {line.partition(":")[0].lower() for line in head.splitlines()[1:]}
        assert "x-accel-buffering" in names
        assert names.isdisjoint({"connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"})
        assert parse(curl.until(LAST_OF_ALL)) == SEEN
        curl.kill()
        assert_cleaned_up(hypercorn)


def test_http2_stream_that_is_reset_is_cleaned_up_alone(hypercorn: LiveServer) -> None:
    """C1, C7: RST_STREAM reaches the generator; another stream on the same connection goes on."""
    with hypercorn.open_http2() as client:
        streams = [client.request("/events"), client.request("/events")]
        publish(hypercorn, data="first")
        for stream in streams:
            stream.until(b"data: first\r\n\r\n")
        streams[0].reset()
        hypercorn.wait_for("/stats", running=1, cleaned=1, causes=["disconnect"])
        publish(hypercorn, data="second")
        streams[1].until(b"data: second\r\n\r\n")
    hypercorn.wait_for("/stats", running=0, cleaned=2, causes=["disconnect"] * 2)
    assert hypercorn.complaints() == []
