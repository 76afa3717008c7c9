"""What happens to the work on a real server: cleanups, threads, dependencies, policies, background tasks."""

from __future__ import annotations

import signal

import pytest

from fastapi_cancel.testing.live import LiveServer

from .conftest import SERVERS, Start, assert_nothing_left


def leave(server: LiveServer, path: str, method: str = "GET") -> None:
    """Open ``path``, wait until its work has begun, and abort."""
    client = server.open(path, method)
    server.wait_for("/stats", started=1)
    client.abort()


# -- C7: once, and bounded -----------------------------------------------------------------------


@pytest.mark.parametrize("server", ["uvicorn", "gunicorn", "hypercorn"])
@pytest.mark.parametrize("middleware", [0, 5])
@pytest.mark.parametrize(("path", "seen"), [("/swallow", ["swallowed", "forced"]), ("/hang", ["forced"])])
def test_a_work_that_does_not_end_is_forced_and_logged(
    running: Start, server: str, middleware: int, path: str, seen: list[str]
) -> None:
    live = running(server, middleware)
    leave(live, path)
    assert live.wait_for("/stats", seen=seen)
    live.wait_for("/stats", running=0, tasks=[])
    (line,) = live.complaints()
    assert f"GET {path} ({path[1:]})" in line
    assert "0.3 s" in line
    assert "disconnect" in line


@pytest.mark.parametrize("server", SERVERS)
def test_a_cleanup_that_raises_is_logged(running: Start, server: str) -> None:
    """C13: a real error is still an error."""
    live = running(server)
    leave(live, "/raise")
    live.wait_for("/stats", cleaned=1, running=0, tasks=[])
    live.wait_for_log("ValueError: the cleanup failed")


@pytest.mark.parametrize("server", ["uvicorn", "uvicorn-uvloop", "hypercorn"])
@pytest.mark.parametrize("middleware", [0, 5])
def test_tasks_that_the_work_awaits_are_cancelled_once(running: Start, server: str, middleware: int) -> None:
    live = running(server, middleware)
    leave(live, "/tasks")
    assert live.wait_for("/stats", cleaned=1)["seen"] == ["job", "job"]
    assert_nothing_left(live)


@pytest.mark.parametrize("server", ["uvicorn", "uvicorn-h11", "hypercorn", "hypercorn-trio"])
def test_sigterm_during_cleanup_lets_it_finish(server: str) -> None:
    """C14. The other servers do not wait for work whose connection is gone, see docs/servers.md."""
    with LiveServer("tests.app:app", server, probe=False) as own:
        leave(own, "/slow-cleanup")
        own.wait_for("/stats", running=1)
        status = own.stop()
        assert status in (0, -signal.SIGTERM)  # uvicorn ends by the signal that it was sent
        assert "cleaned" in own.log
        assert "Traceback" not in own.log


# -- C8, C9: shields and threads -----------------------------------------------------------------


@pytest.mark.parametrize("server", ["uvicorn", "gunicorn", "granian", "hypercorn-trio"])
@pytest.mark.parametrize("middleware", [0, 5])
def test_a_shielded_commit_is_honoured(running: Start, server: str, middleware: int) -> None:
    live = running(server, middleware)
    leave(live, "/shield")
    assert live.wait_for("/stats", cleaned=1)["seen"] == ["committed"]
    assert_nothing_left(live)


@pytest.mark.parametrize("server", ["uvicorn", "uvicorn-uvloop", "hypercorn", "hypercorn-trio"])
@pytest.mark.parametrize("middleware", [0, 5])
def test_nothing_is_torn_down_under_a_thread(running: Start, server: str, middleware: int) -> None:
    live = running(server, middleware)
    leave(live, "/in-thread")
    assert live.wait_for("/stats", cleaned=1)["seen"] == ["thread finished", "torn down"]
    assert_nothing_left(live)


@pytest.mark.parametrize("server", [*SERVERS, "hypercorn-trio"])
def test_a_def_handler_is_told_through_the_token(running: Start, server: str) -> None:
    live = running(server)
    leave(live, "/thread")
    assert live.wait_for("/stats", cleaned=1)["seen"] == ["disconnect"]
    assert_nothing_left(live)


@pytest.mark.parametrize("path", ["/sync-stream", "/plain-sync-stream", "/sync-sse", "/sync-json-lines"])
@pytest.mark.parametrize("server", ["uvicorn", "hypercorn", "hypercorn-trio"])
def test_a_synchronous_generator_is_closed_in_a_thread(running: Start, server: str, path: str) -> None:
    live = running(server)
    client = live.open(path)
    client.until(b"first")
    client.abort()
    assert live.wait_for("/stats", cleaned=1)["seen"] == [True]
    assert_nothing_left(live)


# -- C10: dependencies ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/order", "/sync-order"])
@pytest.mark.parametrize("middleware", [0, 5])
def test_a_transaction_rolls_back_when_the_client_leaves(running: Start, middleware: int, path: str) -> None:
    live = running("uvicorn", middleware)
    leave(live, path, "POST")
    live.wait_for("/stats", running=0)
    # FastAPI before 0.165 tells a synchronous dependency by GeneratorExit.
    assert live.json("/stats")["seen"] in (["rollback: CancelledError"], ["rollback: GeneratorExit"])
    assert live.json("/orders") == []
    assert_nothing_left(live)


# -- C5, C12: background tasks -------------------------------------------------------------------


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("middleware", [0, 5])
def test_a_background_task_outlives_its_client(running: Start, server: str, middleware: int) -> None:
    live = running(server, middleware)
    with live.open("/background") as client:
        assert client.response() == (200, b'"done"')
        client.abort()
    live.wait_for("/stats", cleaned=1)
    assert_nothing_left(live)


@pytest.mark.parametrize("path", ["/background-of-stream", "/background-of-plain-stream"])
def test_a_background_task_runs_after_a_disconnect(uvicorn: LiveServer, path: str) -> None:
    client = uvicorn.open(path)
    client.until(b"first")
    client.abort()
    assert uvicorn.wait_for("/stats", seen=["background"])["cleaned"] == 1
    assert_nothing_left(uvicorn)


# -- policies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", ["uvicorn", "hypercorn-trio"])
def test_within_the_grace_a_handler_finishes_by_itself(running: Start, server: str) -> None:
    live = running(server)
    leave(live, "/grace")
    assert live.wait_for("/stats", cleaned=1)["seen"] == ["disconnect"]
    assert_nothing_left(live)


@pytest.mark.parametrize("server", [*SERVERS, "hypercorn-trio"])
def test_a_timeout_is_answered_with_504(running: Start, server: str) -> None:
    live = running(server)
    status, body = live.get("/limit")
    assert (status, body) == (504, b'{"detail":"Gateway Timeout"}')
    assert live.wait_for("/stats", running=0, tasks=[])["cleaned"] == 1
    assert live.complaints() == []


def test_a_timeout_in_the_middle_of_a_stream_cuts_the_connection(uvicorn: LiveServer) -> None:
    """The client must be able to tell that this was not the end."""
    with uvicorn.open("/limit-stream") as client:
        client.until(b"first\n\r\n")
        assert client.until_closed() == b""
    assert uvicorn.wait_for("/stats", running=0, tasks=[])["cleaned"] == 1


@pytest.mark.parametrize("middleware", [0, 5])
def test_who_opted_out_is_never_cancelled(running: Start, middleware: int) -> None:
    live = running("uvicorn", middleware)
    leave(live, "/never")
    assert live.wait_for("/stats", cleaned=1)["seen"] == [None]
    assert_nothing_left(live)
