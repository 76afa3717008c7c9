"""uvicorn (httptools, asyncio loop) on a free port, and its CPU time."""

from __future__ import annotations

import os
import resource
from signal import SIGKILL
from typing import Any

from fastapi_cancel.testing.live import LiveServer
from tests.crowd import Process

SERVER = "uvicorn, httptools, asyncio loop"
CORES = sorted(os.sched_getaffinity(0))


class Server(LiveServer):
    """One variant, served. Runs on the first core; whoever asks should keep to another.

    :param factory: makes the application
    """

    def __init__(self, variant: str, layers: int = 0, factory: str = "benchmarks.apps:served") -> None:
        super().__init__(
            factory,
            options=["--http", "httptools", "--backlog", "4096", "--factory"],
            env={"BENCH_VARIANT": variant, "BENCH_LAYERS": str(layers), "PYTHONHASHSEED": "0"},
            probe=False,
        )
        self.variant = variant

    def start(self) -> None:
        super().start()
        os.sched_setaffinity(self.pid, CORES[:1])

    def cpu(self) -> float:
        """CPU seconds so far."""
        return Process(self.pid).cpu()

    def memory(self) -> int:
        """Bytes of its that are in memory."""
        return Process(self.pid).memory()

    def __exit__(self, *exc: Any) -> None:
        self.stop(SIGKILL)  # nothing to shut down: some variants would wait for ever
        super().__exit__(*exc)


def many_sockets() -> None:
    """Let this process, and the servers it starts, open as many sockets as is allowed."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
