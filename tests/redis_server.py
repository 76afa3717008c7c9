"""A real Redis server on a free port."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator

import pytest
import redis

from fastapi_cancel.testing.live import free_port

from .conftest import DEADLINE


class RedisServer:
    """A process of its own, with a directory of its own. Ended by its process id."""

    def __init__(self) -> None:
        program = shutil.which("redis-server")
        assert program is not None, "these tests need redis-server (Debian's package is called so)"
        self.directory = tempfile.TemporaryDirectory()
        for _ in range(3):  # another process may take the port between our look and the server's
            self.port = free_port()
            options = f"--port {self.port} --bind 127.0.0.1 --dir {self.directory.name} --save".split()
            self._process = subprocess.Popen(
                [program, *options, "", "--logfile", "log"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            if self._answers():
                return
        self.directory.cleanup()
        raise AssertionError("redis-server did not start")

    def _answers(self) -> bool:
        end = time.monotonic() + DEADLINE
        with self.client() as client:
            while time.monotonic() < end and self._process.poll() is None:
                try:
                    return bool(client.info("server")["process_id"] == self._process.pid)
                except redis.ConnectionError:
                    time.sleep(0.01)
        return False

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port)

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
        self._process.wait(DEADLINE)
        self.directory.cleanup()


@pytest.fixture(scope="module", name="redis_server")
def a_redis_server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server
