"""A real Redis server on a free port; or Valkey, where it is installed: all that needs the one runs on both."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import pytest
import redis

from fastapi_cancel.testing.live import free_port

DEADLINE = 20.0  # seconds
STORES = {"redis": "redis-server"}
if shutil.which("valkey-server") is not None:
    STORES["valkey"] = "valkey-server"


class RedisServer:
    """A process of its own, with a directory of its own. Ended by its process id.

    :param options: for its command line, such as ``"--appendonly yes"``; without any it keeps nothing on disk
    :cvar program: ``"redis-server"`` or ``"valkey-server"``
    """

    program: ClassVar[str] = STORES["redis"]

    def __init__(self, options: str = "") -> None:
        found = shutil.which(self.program)
        assert found is not None, f"these tests need {self.program} (Debian's package is called so)"
        self._program = found
        self._options = options.split()
        self.directory = tempfile.TemporaryDirectory()
        # Another process may take the port between our look and the server's; and a cluster's node wants the one
        # 10,000 above it as well, which one in five has not.
        for _ in range(20):
            self.port = free_port()
            if self.start():
                return
        self.directory.cleanup()
        raise AssertionError(f"{self.program} did not start")

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


@contextmanager
def servers_of(kind: str) -> Iterator[None]:
    """Have those that are started meanwhile be of this kind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RedisServer, "program", STORES[kind])
        yield


@pytest.fixture(scope="module", params=list(STORES))
def store(request: pytest.FixtureRequest) -> Iterator[None]:
    """Have the test once with each kind of server."""
    with servers_of(request.param):
        yield


@pytest.fixture(scope="module")
def redis_server(store: None) -> Iterator[RedisServer]:
    """One for a whole module."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def own_redis(store: None) -> Iterator[RedisServer]:
    """One to be killed."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def persistent_redis(store: None) -> Iterator[RedisServer]:
    """One that may be killed, and has its data when it is back. By itself it writes them up to two seconds late."""
    with RedisServer("--appendonly yes --appendfsync always") as server:
        yield server
