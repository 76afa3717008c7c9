"""The watcher of a request on each server: when it starts, and what it runs in."""

from __future__ import annotations

import time

import pytest

from .conftest import Start, assert_nothing_left


@pytest.mark.parametrize(
    ("server", "middleware", "alone"),
    [
        ("uvicorn", 0, True),
        ("uvicorn-h11", 0, True),
        ("uvicorn-uvloop", 0, True),
        ("hypercorn", 0, True),
        ("daphne", 0, True),
        ("granian-rsgi", 0, True),
        ("granian", 0, False),
        ("uvicorn", 5, False),
    ],
)
def test_who_needs_no_task_on_a_server(running: Start, server: str, middleware: int, alone: bool) -> None:
    live = running(server, middleware)
    client = live.open("/handler")
    live.wait_for("/stats", started=1)
    live.wait_for("/stats", tasks=lambda tasks: any(task.endswith("Channel.watch_on") for task in tasks) is not alone)
    client.abort()
    live.wait_for("/stats", cleaned=1)
    assert_nothing_left(live)


@pytest.mark.parametrize("middleware", [0, 5])
@pytest.mark.parametrize("server", ["uvicorn", "hypercorn", "daphne", "granian", "granian-rsgi", "gunicorn"])
def test_a_client_that_leaves_at_once_is_noticed(running: Start, server: str, middleware: int) -> None:
    """Before its handler begins to wait, or just when it does."""
    live = running(server, middleware)
    for milliseconds in range(8):
        client = live.open("/handler")
        time.sleep(milliseconds / 1000)
        client.abort()
    client = live.open("/handler")
    started = live.wait_for("/stats", started=lambda started: started > 0)["started"]
    client.abort()
    state = live.wait_for("/stats", running=0, started=lambda now: now >= started)
    assert state["cleaned"] == state["started"]
    assert_nothing_left(live)
