"""A pytest plugin for our own tests with old versions: one server for each event loop is enough.

FastAPI, Starlette, AnyIO and sse-starlette are above us, the servers are below: which of these it is makes no
difference to how we get on with a version of those. So a test that has a parameter ``server`` runs on two of them
alone, and the files that look further down still are left out. Everything else runs, and so does what is added.
"""

from __future__ import annotations

from pathlib import Path

import pytest

SERVERS = {"uvicorn": "asyncio", "hypercorn-trio": "Trio"}
LEFT_OUT = {
    "test_clients.py": "what clients make of bytes that the tests in process look at",
    "test_many_streams.py": "how much one server holds",
    "test_proxies.py": "what proxies make of what a server sends",
}
passed_over: set[str] = set()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if collection_path.name not in LEFT_OUT:
        return None
    passed_over.add(collection_path.name)
    return True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    others = [item for item in items if server_of(item) not in {None, *SERVERS}]
    items[:] = [item for item in items if server_of(item) in {None, *SERVERS}]
    config.hook.pytest_deselected(items=others)
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS:  # not some tests that somebody named
        names = (SERVERS.keys() | LEFT_OUT.keys()) - {server_of(item) for item in items} - passed_over
        if names:
            raise pytest.UsageError(f"{Path(__file__).name} names what is not there: {', '.join(sorted(names))}")


def pytest_report_collectionfinish(items: list[pytest.Item]) -> str:
    servers = [f"{sum(server_of(item) == server for item in items)} on {server}" for server in SERVERS]
    return f"{len(items)} tests, of them {' and '.join(servers)}; without {', '.join(sorted(passed_over))}"


def server_of(item: pytest.Item) -> str | None:
    """On which server a test runs, if it says so."""
    call = getattr(item, "callspec", None)
    return None if call is None or "server" not in call.params else str(call.params["server"])
