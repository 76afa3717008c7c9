"""A real Redis, or Valkey, server on a free port."""

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
    """A process of its own, with a directory of its own. Ended by its process id.

    :param options: for its command line, such as ``"--appendonly yes"``; without any it keeps nothing on disk
    :param program: ``"redis-server"`` or ``"valkey-server"``
    """

    def __init__(self, options: str = "", program: str = "redis-server") -> None:
        found = shutil.which(program)
        assert found is not None, f"these tests need {program} (Debian's package is called so)"
        self._program = found
        self._options = options.split()
        self.directory = tempfile.TemporaryDirectory()
        for _ in range(3):  # another process may take the port between our look and the server's
            self.port = free_port()
            if self.start():
                return
        self.directory.cleanup()
        raise AssertionError(f"{program} did not start")

    def start(self) -> bool:
        """Again after :meth:`kill`: at the same port, with what it finds in its directory. Whether it answers."""
        options = f"--port {self.port} --bind 127.0.0.1 --dir {self.directory.name} --logfile log --save".split()
        self._process = subprocess.Popen(
            [self._program, *options, "", *self._options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        return self._answers()

    def kill(self) -> None:
        """As ``kill -9`` does."""
        self._process.kill()
        self._process.wait(DEADLINE)

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
