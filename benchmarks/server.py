"""uvicorn (httptools, asyncio loop) on a free port, and its CPU time."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.live import Client, free_port

ROOT = Path(__file__).resolve().parent.parent
SERVER = "uvicorn, httptools, asyncio loop"
CORES = sorted(os.sched_getaffinity(0))


class Server:
    """One variant, served. Runs on the first core; whoever asks should keep to another.

    :param factory: makes the application
    """

    def __init__(self, variant: str, layers: int = 0, factory: str = "benchmarks.apps:served") -> None:
        self.port = free_port()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the server)
        options = ["--http", "httptools", "--loop", "asyncio", "--no-access-log", "--backlog", "4096"]
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "uvicorn",
                *options,
                "--port",
                str(self.port),
                "--factory",
                factory,
            ],
            cwd=ROOT,
            env={**os.environ, "BENCH_VARIANT": variant, "BENCH_LAYERS": str(layers), "PYTHONHASHSEED": "0"},
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def ready(self) -> None:
        """Wait until it answers, and bind it to its core."""
        end = time.monotonic() + 20
        while True:
            try:
                self.json("/stats")
                return os.sched_setaffinity(self._process.pid, CORES[:1])
            except OSError:
                if self._process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"the server did not start:\n{self.log()}") from None
                time.sleep(0.05)

    def cpu(self) -> float:
        """CPU seconds so far."""
        # The clock that clock_getcpuclockid(3) gives: as in /proc/<pid>/stat, in ns instead of ticks.
        return time.clock_gettime((~self._process.pid << 3) | 2)

    def memory(self) -> int:
        """Bytes of its that are in memory."""
        pages = Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize()

    def json(self, path: str) -> Any:
        with Client(self.port) as client:
            client.request(path, headers="Connection: close\r\n")
            status, body = client.response()
        assert status == 200, (status, body)
        return json.loads(body)

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()  # nothing to shut down: some variants would wait for ever
        self._process.wait()
        self._log.close()


def many_sockets() -> None:
    """Let this process, and the servers it starts, open as many sockets as is allowed."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
