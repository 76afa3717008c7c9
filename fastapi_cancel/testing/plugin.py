"""The pytest plugin. Loaded with every run of pytest where the library is installed: it imports nothing by itself.

Fixtures:

``asgi_server``
    starts a real server: ``asgi_server(app, "uvicorn", ...)`` takes what :class:`.live.LiveServer` takes, and returns
    one that runs. One server serves all tests that ask for the same; each test begins with an empty log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .live import LiveServer

Start = Callable[..., "LiveServer"]


@pytest.fixture(scope="session")
def _asgi_servers() -> Iterator[tuple[ExitStack, dict[Any, Any]]]:
    with ExitStack() as running:
        yield running, {}


@pytest.fixture
def asgi_server(_asgi_servers: tuple[ExitStack, dict[Any, Any]]) -> Start:
    """Starts a real server: takes what ``LiveServer`` takes, and returns one that runs.

    One server serves all tests that ask for the same; each test begins with an empty log.
    """
    from .live import LiveServer

    running, servers = _asgi_servers

    def start(app: object, server: str = "uvicorn", **options: Any) -> LiveServer:
        key = (id(app) if not isinstance(app, str) else app, server, repr(sorted(options.items())))
        if key not in servers:
            servers[key] = running.enter_context(LiveServer(app, server, **options)), app
        live: LiveServer = servers[key][0]
        live.mark()
        return live

    return start


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    """``assert visit.faults == []``: tell the faults as they tell themselves."""
    if op == "==" and right == [] and isinstance(left, list) and left and type(left[0]).__name__ == "Fault":
        return [f"{len(left)} faults", *(line for fault in left for line in str(fault).splitlines())]
    return None
