"""Behind a real nginx and a real HAProxy: nothing is held back, leaving gets through, idle streams stay open."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastapi_cancel.testing.http2 import Http2Client
from fastapi_cancel.testing.live import LiveServer, free_port
from fastapi_cancel.testing.sockets import RawClient

from .conftest import DEADLINE, Start
from .test_clients import APP, Curl, assert_cleaned_up, publish

IDLE = 2  # seconds without a byte from the server, after which an impatient proxy gives up

# Nothing but what it takes to run as a child of the tests: else as it comes.
NGINX = """
daemon off;
master_process off;
pid {directory}/pid;
error_log {directory}/log warn;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    scgi_temp_path {directory}/scgi;
    uwsgi_temp_path {directory}/uwsgi;
    server {{
        listen 127.0.0.1:{default};
        listen 127.0.0.1:{http2} http2;
        location / {{ proxy_pass http://127.0.0.1:{server}; }}  # as HTTP/1.0
    }}
    server {{
        listen 127.0.0.1:{tuned};
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        location / {{ proxy_pass http://127.0.0.1:{server}; }}
    }}
    server {{
        listen 127.0.0.1:{deaf};
        proxy_ignore_headers X-Accel-Buffering;
        location / {{ proxy_pass http://127.0.0.1:{server}; }}
    }}
    server {{
        listen 127.0.0.1:{impatient};
        proxy_read_timeout {idle}s;
        location / {{ proxy_pass http://127.0.0.1:{server}; }}
    }}
}}
"""

# By itself, HAProxy notices that a client has left only when it has something to send to it, and delays
# each event by 0.2 s on HTTP/1.1 (it waits for more to send).
HAPROXY = """
defaults
    mode http
    timeout connect 10s
    timeout client 60s
    timeout server 60s
listen default
    bind 127.0.0.1:{default}
    bind 127.0.0.1:{http2} proto h2
    server one 127.0.0.1:{server}
listen tuned
    bind 127.0.0.1:{tuned}
    option abortonclose
    option http-no-delay
    server one 127.0.0.1:{server}
listen impatient
    bind 127.0.0.1:{impatient}
    timeout client {idle}s
    timeout server {idle}s
    server one 127.0.0.1:{server}
"""

WAYS = ["default", "http2", "tuned", "deaf", "impatient"]
"""The ports of a proxy; HAProxy has no deaf one."""


class Proxy:
    """A proxy before ``server``. Ended by its own process id."""

    def __init__(self, name: str, server: LiveServer, directory: Path) -> None:
        for _ in range(3):  # another process may take a port between our look and the proxy's
            self.ports = free_ports()
            self.process = self._start(name, server, directory)
            if self._answers():
                return
            self.stop()
        raise AssertionError(f"{name} did not start: {(directory / 'log').read_text()}")

    def _start(self, name: str, server: LiveServer, directory: Path) -> subprocess.Popen[bytes]:
        program = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
        assert program is not None, f"these tests need {name}: run scripts/system.py"
        template = NGINX if name == "nginx" else HAPROXY
        config, log = directory / "config", directory / "log"
        config.write_text(template.format(**self.ports, server=server.port, directory=directory, idle=IDLE))
        options = f"-p {directory} -e {log} -c {config}" if name == "nginx" else f"-db -f {config}"
        with log.open("ab") as out:
            return subprocess.Popen([program, *options.split()], stdout=out, stderr=out)

    def _answers(self) -> bool:
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with self.open("default", "/stats") as client:
                    return client.until(b"\r\n").startswith(b"HTTP/1.1 200")
            except OSError:
                time.sleep(0.02)
        return False

    def open(self, way: str, path: str) -> RawClient | Curl:
        if way == "http2":
            return Curl(self.ports[way], path, "--http2-prior-knowledge")
        client = RawClient(self.ports[way])
        client.request(path)
        return client

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(DEADLINE)


def free_ports() -> dict[str, int]:
    ports: set[int] = set()
    while len(ports) < len(WAYS):
        ports.add(free_port())
    return dict(zip(WAYS, ports, strict=True))


def uvicorn(running: Start) -> LiveServer:
    # h11 sends no chunks to an HTTP/1.0 client: such a stream nginx would hold back. Chunks it passes on anyway.
    return running("uvicorn-h11", app=APP)


@pytest.fixture(scope="module")
def nginx(running: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    proxy = Proxy("nginx", uvicorn(running), tmp_path_factory.mktemp("nginx"))
    yield proxy
    proxy.stop()


@pytest.fixture(scope="module")
def haproxy(running: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    proxy = Proxy("haproxy", uvicorn(running), tmp_path_factory.mktemp("haproxy"))
    yield proxy
    proxy.stop()


@pytest.fixture(params=["nginx", "haproxy"])
def proxy(request: pytest.FixtureRequest) -> Proxy:
    proxy: Proxy = request.getfixturevalue(request.param)
    return proxy


@pytest.fixture
def server(running: Start) -> LiveServer:
    return uvicorn(running)


@pytest.mark.parametrize("way", ["default", "http2", "tuned"])
def test_events_arrive_as_they_are_sent(server: LiveServer, proxy: Proxy, way: str) -> None:
    """Issue 3: the next event is sent only once the client has the one before it."""
    with proxy.open(way, "/events") as client:
        for number in range(10):
            publish(server, data=f"{number}")
            client.until(f"data: {number}\r\n\r\n".encode())
        server.json("/drain")
        client.until(b"data: see you\r\n\r\n")


def test_nginx_holds_events_back_unless_told(server: LiveServer, nginx: Proxy) -> None:
    """Issue 3: what ``X-Accel-Buffering: no`` is for: where it is ignored, the events come at the end, together."""
    with nginx.open("deaf", "/events") as client:
        assert isinstance(client, RawClient)
        server.wait_for("/stats", running=1)
        publish(server, data="held")
        with pytest.raises(TimeoutError):
            client.until(b"data: held", timeout=0.5)
        server.json("/drain")
        client.until(b"data: held\r\n\r\nevent: farewell\r\n")


@pytest.mark.parametrize(
    ("way", "leave"),
    [("default", "abort"), ("default", "close"), ("tuned", "abort"), ("tuned", "close"), ("http2", "kill")],
)
def test_leaving_reaches_the_generator(server: LiveServer, proxy: Proxy, way: str, leave: str) -> None:
    """C1, C7, C13: through the proxy too; HAProxy notices it when there is a heartbeat to be sent."""
    with proxy.open(way, "/events?heartbeat=0.1") as client:
        client.until(b": ping")
        getattr(client, leave)()
        assert_cleaned_up(server)


@pytest.mark.parametrize("leave", ["abort", "close"])
def test_leaving_a_silent_stream_reaches_the_generator(server: LiveServer, proxy: Proxy, leave: str) -> None:
    """C1, C7, C13: without heartbeats too: nginx by itself, HAProxy with ``option abortonclose``."""
    with proxy.open("tuned", "/events") as client:
        publish(server, data="last")
        client.until(b"data: last\r\n\r\n")
        getattr(client, leave)()
        assert_cleaned_up(server)


def test_stream_that_is_reset_reaches_the_generator(server: LiveServer, proxy: Proxy) -> None:
    """C1, C7, C13: as browsers leave over HTTP/2, whose connection stays."""
    with Http2Client(proxy.ports["http2"]) as client:
        stream = client.request("/events?heartbeat=0.1")
        stream.until(b": ping")
        stream.reset()
        assert_cleaned_up(server)


def test_heartbeats_keep_an_idle_stream_open(server: LiveServer, proxy: Proxy) -> None:
    """C20, aegra/aegra#323: open for three timeouts of the proxy, which cuts the same stream without heartbeats."""
    with (
        proxy.open("impatient", "/events?heartbeat=0.2") as kept,
        proxy.open("impatient", "/events") as silent,
    ):
        opened = time.monotonic()
        server.wait_for("/stats", running=2)
        assert isinstance(silent, RawClient)
        cut = silent.until_closed()
        assert b"200 OK" in cut and not cut.endswith(b"0\r\n\r\n")
        server.wait_for("/stats", running=1, cleaned=1, causes=["disconnect"])
        while time.monotonic() < opened + 3 * IDLE:
            kept.until(b": ping")
        publish(server, data="still here")
        kept.until(b"data: still here\r\n\r\n")
