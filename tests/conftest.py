"""Servers are started once and serve many tests; each test begins with fresh counters."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fastapi_cancel import protect
from fastapi_cancel.channel import Channel
from fastapi_cancel.testing.live import LiveServer

pytest.register_assert_rewrite("tests.matrix_cell", "tests.matrix_rows")

from .redis_server import own_redis as own_redis  # noqa: E402
from .redis_server import persistent_redis as persistent_redis  # noqa: E402
from .redis_server import redis_server as redis_server  # noqa: E402
from .redis_server import store as store  # noqa: E402
from .visits import surroundings as surroundings  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
DEADLINE = 20.0  # seconds: for what must happen; reached only by a bug

Start = Callable[..., LiveServer]
NOT_TESTED = "NOT TESTED HERE:"
"""How the reason begins of a test that is skipped for want of something that `make test` cannot provide."""


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # a worker's coverage is measured, not that of the servers that it starts
        os.environ.pop("COVERAGE_PROCESS_CONFIG", None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Such a reason is shown by itself, however pytest is run."""
    reasons = [str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", [])]
    for reason in dict.fromkeys(reason for reason in reasons if NOT_TESTED in reason):
        terminalreporter.write_sep("!", reason.removeprefix("Skipped: "), red=True, bold=True)


def named(value: object) -> str:
    """A test's id by ``repr``, the same in each process: pytest-xdist compares them."""
    return re.sub(" at 0x[0-9a-f]+", "", repr(value))


def fresh(server: LiveServer) -> LiveServer:
    """Forget what earlier tests left in the counters and the log."""
    server.wait_for("/stats", running=0)
    server.json("/reset")
    server.mark()
    return server


def assert_nothing_left(server: LiveServer) -> None:
    """No request, no task, no line in the log."""
    server.wait_for("/stats", running=0, tasks=[])
    assert server.complaints() == []


@pytest.fixture(scope="session")
def running() -> Iterator[Start]:
    """``running(server, middleware, app)``: a live server of that kind, whose application looks at itself."""
    servers: dict[tuple[str, int, str], LiveServer] = {}
    with ExitStack() as stack:

        def start(server: str, middleware: int = 0, app: str = "tests.app:app") -> LiveServer:
            key = (server, middleware, app)
            if key not in servers:
                live = LiveServer(app, server, env={"MIDDLEWARE": str(middleware)}, probe=False, access_log=True)
                servers[key] = stack.enter_context(live)
            return fresh(servers[key])

        yield start
        for live in servers.values():
            live.send_signal()  # so that all of them end at once


@pytest.fixture
def uvicorn(running: Start) -> LiveServer:
    return running("uvicorn")


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    backend: str = request.param
    return backend


@pytest.fixture(params=["no ladder yet", "a ladder from the beginning"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On asyncio a request gets its ladder when somebody needs it; to its watcher that makes no difference."""

    def laddered(*args: Any) -> Channel:
        channel = Channel(*args[:-1])
        channel.take(protect.ladder_for(channel.policy, channel.scope))
        return channel

    if request.param != "no ladder yet":
        monkeypatch.setattr(protect, "LightChannel", laddered)


@pytest.fixture
def certificate(tmp_path: Path) -> str:
    """The folder of a server's ``cert`` and ``key``."""
    assert shutil.which("openssl") is not None, "this test needs openssl"
    options = (
        "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout key -out cert -days 2 -subj /CN=localhost"
    )
    command = ["openssl", "req", "-x509", *options.split(), "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    return str(tmp_path)
