"""Real servers on free ports, and a raw socket that leaves. Everything about a disconnect is tested so."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEADLINE = 20.0  # seconds: for what must happen; reached only by a bug

COMMANDS: dict[str, list[str]] = {
    "uvicorn-httptools": ["uvicorn", "--http", "httptools", "--loop", "asyncio", "--port", "{port}", "{app}"],
    "uvicorn-h11": ["uvicorn", "--http", "h11", "--loop", "asyncio", "--port", "{port}", "{app}"],
    "uvicorn-uvloop": ["uvicorn", "--http", "httptools", "--loop", "uvloop", "--port", "{port}", "{app}"],
    "uvicorn-workers": ["uvicorn", "--workers", "2", "--port", "{port}", "{app}"],
    "uvicorn-limited": ["uvicorn", "--limit-max-requests", "6", "--port", "{port}", "{app}"],
    "gunicorn-limited": ["gunicorn", "-k", "asgi", "--max-requests", "6", "-b", "127.0.0.1:{port}", "{app}"],
    "hypercorn-limited": ["hypercorn", "--max-requests", "5", "-b", "127.0.0.1:{port}", "{app}"],
    "gunicorn": ["gunicorn", "-k", "asgi", "-w", "1", "-b", "127.0.0.1:{port}", "--access-logfile", "-", "{app}"],
    "gunicorn-workers": ["gunicorn", "-k", "asgi", "-w", "2", "-b", "127.0.0.1:{port}", "{app}"],
    "gunicorn-uvicorn": [
        *("gunicorn", "-k", "uvicorn_worker.UvicornWorker", "-w", "2", "-b", "127.0.0.1:{port}", "{app}")
    ],
    "hypercorn": ["hypercorn", "-b", "127.0.0.1:{port}", "--access-logfile", "-", "{app}"],
    "hypercorn-trio": ["hypercorn", "-k", "trio", "-b", "127.0.0.1:{port}", "--access-logfile", "-", "{app}"],
    "granian": ["granian", "--interface", "asgi", "--port", "{port}", "--access-log", "{app}"],
    "granian-workers": [
        "granian",
        "--interface",
        "asgi",
        "--workers",
        "2",
        "--backpressure",
        "2000",
        "--port",
        "{port}",
        "{app}",
    ],
    "granian-rsgi": [
        *("granian", "--interface", "rsgi", "--port", "{port}", "--access-log", "tests.rsgi_app:application")
    ],
    "granian-rsgi-workers": [
        *("granian", "--interface", "rsgi", "--workers", "2", "--backpressure", "2000"),
        *("--port", "{port}", "tests.rsgi_app:application"),
    ],
    "daphne": ["daphne", "-b", "127.0.0.1", "-p", "{port}", "{app}"],
}
SERVERS = ["uvicorn-httptools", "uvicorn-h11", "gunicorn", "hypercorn", "granian", "daphne"]

# What a server may say while all is well.
HARMLESS = re.compile(
    r"\[INFO\]|INFO[ :]|\"(GET|POST|PUT|HEAD) .* HTTP/|^\s*$|(GET|POST|PUT|HEAD) /\S* 1\.1"
    r"|HTTP/2 support not enabled|Starting server at|Configuring endpoint|Listening on TCP"
    r"|^\d+\.\d+\.\d+\.\d+:\d+ - - \["  # Daphne's access log
    r"|Workers handling signal"
)


class LiveServer:
    """A server process that answers. Ended by its own process id."""

    def __init__(self, server: str, app: str = "tests.app:app", **environment: object) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.log = Path(self.directory.name, "log")
        self.mark = 0
        self._start(server, app, {name.upper(): str(value) for name, value in environment.items()})

    def _start(self, server: str, app: str, environment: dict[str, str]) -> None:
        for _ in range(3):  # another process may take the port between our look and the server's
            self.port = free_port()
            command = [part.format(port=self.port, app=app) for part in COMMANDS[server]]
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", *command],
                    cwd=ROOT,
                    env={**os.environ, "APP": app, **environment},
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            if self._answers():
                return
        raise AssertionError(f"{server} did not start:\n{self.text()}")

    def _answers(self) -> bool:
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
                    connection.sendall(b"GET /stats HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                    if connection.recv(12).startswith(b"HTTP/1.1 200"):
                        return True
            except OSError:
                time.sleep(0.02)
        return False

    def fresh(self) -> None:
        """Forget what earlier tests left in the counters and the log."""
        self.wait("/stats", running=0)
        self.json("/reset")
        self.mark = len(self.log.read_text())

    def text(self) -> str:
        """What the server has written since the last ``fresh``."""
        return self.log.read_text()[self.mark :]

    def wait_for_text(self, text: str, times: int = 1) -> None:
        end = time.monotonic() + DEADLINE
        while self.text().count(text) < times:
            assert time.monotonic() < end, f"never {text!r}, but {self.text()!r}"
            time.sleep(0.01)

    def complaints(self) -> list[str]:
        """The lines of the log that a person would look at."""
        whole = self.text().rpartition("\n")[0]  # it may be in the middle of a line
        return [line for line in whole.splitlines() if not HARMLESS.search(line)]

    def stop(self, sig: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(sig)
        try:
            return self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise

    def __enter__(self) -> LiveServer:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.stop()
        finally:
            with contextlib.suppress(ProcessLookupError):  # a master's workers
                os.killpg(self.process.pid, signal.SIGKILL)
            self.directory.cleanup()

    # -- clients -----------------------------------------------------------------------------

    def get(self, path: str) -> tuple[int, bytes]:
        with self.open(path, close=True) as client:
            return client.response()

    def json(self, path: str) -> Any:
        status, body = self.get(path)
        assert status == 200, (status, body)
        return json.loads(body)

    def open(self, path: str, method: str = "GET", headers: str = "", body: bytes = b"", close: bool = False) -> Client:
        client = Client(self.port)
        client.request(path, method, headers + ("Connection: close\r\n" if close else ""), body)
        return client

    def wait(self, path: str, **expected: object) -> dict[str, Any]:
        """Ask ``path`` until it answers with ``expected``, or fail with what it said last."""
        end = time.monotonic() + DEADLINE
        while True:
            state: dict[str, Any] = self.json(path)
            if all(state.get(key) == value for key, value in expected.items()):
                return state
            assert time.monotonic() < end, f"never {expected}, but {state}\n" + "\n".join(self.complaints())
            time.sleep(0.005)


class Client:
    """A raw socket. ``abort`` sends RST, ``close`` FIN."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), DEADLINE)
        self.buffer = b""

    def request(self, path: str, method: str = "GET", headers: str = "", body: bytes = b"") -> None:
        if body and "length" not in headers.lower():
            headers += f"Content-Length: {len(body)}\r\n"
        self.socket.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode() + body)

    def until(self, marker: bytes) -> bytes:
        """Read up to and including ``marker``."""
        while marker not in self.buffer:
            received = self.socket.recv(65536)
            assert received, f"closed before {marker!r}: {self.buffer!r}"
            self.buffer += received
        end = self.buffer.index(marker) + len(marker)
        read, self.buffer = self.buffer[:end], self.buffer[end:]
        return read

    def head(self) -> tuple[int, dict[str, str]]:
        lines = self.until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        return int(lines[0].split()[1]), {k.lower(): v for k, _, v in (line.partition(": ") for line in lines[1:])}

    def response(self) -> tuple[int, bytes]:
        """One whole response."""
        status, headers = self.head()
        if "content-length" in headers:
            return status, self.exactly(int(headers["content-length"]))
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self.until(b"\r\n"), 16):
                body += self.exactly(size)
                self.until(b"\r\n")
            self.until(b"\r\n")
            return status, body
        body = self.buffer
        while received := self.socket.recv(65536):
            body += received
        return status, body

    def rest(self) -> bytes:
        """What is left of a chunked body, framing included; it has ended as it should."""
        while b"\r\n0\r\n\r\n" not in self.buffer:
            received = self.socket.recv(65536)
            assert received, f"cut off after {self.buffer!r}"
            self.buffer += received
        return self.buffer

    def exactly(self, size: int) -> bytes:
        while len(self.buffer) < size:
            received = self.socket.recv(65536)
            assert received, f"closed after {len(self.buffer)} of {size} bytes"
            self.buffer += received
        read, self.buffer = self.buffer[:size], self.buffer[size:]
        return read

    def abort(self) -> float:
        """Leave with a RST. When: on the clock that all processes of the machine share."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return self.close()

    def close(self) -> float:
        left = time.monotonic()
        self.socket.close()
        return left

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def live(server: str, app: str = "tests.app:app", **environment: object) -> Iterator[LiveServer]:
    with LiveServer(server, app, **environment) as running:
        yield running
