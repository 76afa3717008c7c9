"""Servers are started once and serve many tests; each test begins with fresh counters."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from .live import LiveServer
from .visits import surroundings as surroundings

Start = Callable[..., LiveServer]
NOT_TESTED = "NOT TESTED HERE:"
"""How the reason begins of a test that is skipped for want of something that `make test` cannot provide."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Such a reason is shown by itself, however pytest is run."""
    reasons = [str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", [])]
    for reason in dict.fromkeys(reason for reason in reasons if NOT_TESTED in reason):
        terminalreporter.write_sep("!", reason.removeprefix("Skipped: "), red=True, bold=True)


@pytest.fixture(scope="session")
def running() -> Iterator[Start]:
    """``running(server, middleware)``: a live server of that kind."""
    servers: dict[tuple[str, int], LiveServer] = {}

    def start(server: str, middleware: int = 0) -> LiveServer:
        key = (server, middleware)
        if key not in servers:
            servers[key] = LiveServer(server, middleware=middleware)
        live = servers[key]
        live.fresh()
        return live

    yield start
    for live in servers.values():
        with live:
            pass


@pytest.fixture
def uvicorn(running: Start) -> LiveServer:
    return running("uvicorn-httptools")


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    backend: str = request.param
    return backend
