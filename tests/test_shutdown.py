"""The server is told to stop while event streams are open."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from fastapi_cancel import shutdown
from fastapi_cancel.testing.live import LiveServer, free_port
from fastapi_cancel.testing.sockets import RawClient

from .conftest import DEADLINE
from .shutdown_app import app

APP = "tests.shutdown_app:app"
SERVERS = {
    # what the process exits with, by itself: uvicorn re-raises the signal when it has ended
    ("uvicorn", 1): -signal.SIGTERM,
    ("uvicorn-uvloop", 1): -signal.SIGTERM,
    ("uvicorn", 2): 0,
    ("gunicorn", 1): 0,
    ("gunicorn", 2): 0,
    ("gunicorn-uvicorn", 2): 0,
    ("hypercorn", 1): 0,
    ("hypercorn-trio", 1): 0,
    ("granian", 1): 0,
    ("granian", 2): 0,
    ("granian-rsgi", 1): 0,
    ("granian-rsgi", 2): 0,
}
LIMITED = {"uvicorn": "--limit-max-requests=6", "gunicorn": "--max-requests=6", "hypercorn": "--max-requests=5"}
OPTIONS = {
    ("granian", 2): ["--backpressure", "2000"],  # by itself it takes 512 connections a worker
    ("granian-rsgi", 2): ["--backpressure", "2000"],
    # by itself 3 s, which 1,000 streams on a busy machine exceed
    ("hypercorn", 1): ["--graceful-timeout", "60"],
    ("hypercorn-trio", 1): ["--graceful-timeout", "60"],
}


class Streams(LiveServer):
    """A server with open streams, and what its processes left in a file."""

    def __init__(
        self, directory: Path, server: str = "uvicorn", workers: int = 1, options: Sequence[str] = (), **env: str
    ) -> None:
        self.marks = directory / "marks"
        self.marks.touch()
        self.clients: list[RawClient] = []
        env["MARKS"] = str(self.marks)
        super().__init__(APP, server, workers=workers, options=options, env=env, probe=False, deadline=60)

    def __exit__(self, *exc: Any) -> None:
        for client in self.clients:
            client.close()
        super().__exit__(*exc)

    def stream(self, path: str, count: int = 1) -> None:
        for _ in range(count):
            client = self.open(path)
            self.clients.append(client)
            client.until(b"first")

    def rest(self) -> list[str]:
        """What came after the first event, on each stream; each has ended as a response should."""
        return [client.rest().decode() for client in self.clients]

    def left(self, mark: str) -> int:
        return self.marks.read_text().splitlines().count(mark)


FAREWELL = "retry: 1500\r\n\r\nevent: bye\r\ndata: come back\r\n\r\n"


@pytest.mark.parametrize(("server", "workers"), SERVERS)
def test_every_stream_gets_its_farewell(server: str, workers: int, tmp_path: Path) -> None:
    """C22: farewell with retry, a proper end, the awaiting cleanup; and the server leaves as it would without."""
    with Streams(tmp_path, server, workers, OPTIONS.get((server, workers), ())) as streams:
        streams.stream("/events", 1000)
        assert streams.stop() == SERVERS[server, workers]
        assert [rest for rest in streams.rest() if FAREWELL not in rest] == []
        assert streams.left("closed") == 1000
        assert streams.left("cleaned") == (1000 if server != "hypercorn-trio" else 0)  # Trio has level semantics
        assert streams.complaints() == []


@pytest.mark.parametrize("path", ["/plain/events", "/native", "/cancellable"])
def test_other_event_streams_end_too(path: str, tmp_path: Path) -> None:
    """C21: those of a plain route, FastAPI's own, and Starlette's with that media type."""
    with Streams(tmp_path) as streams:
        streams.stream(path, 3)
        assert streams.stop() == -signal.SIGTERM
        streams.rest()
        assert streams.left("cleaned") == 3
        assert streams.complaints() == []


def test_behind_middleware(tmp_path: Path) -> None:
    with Streams(tmp_path, MIDDLEWARE="5") as streams:
        streams.stream("/events", 5)
        assert streams.stop() == -signal.SIGTERM
        assert [rest for rest in streams.rest() if FAREWELL not in rest] == []
        assert streams.left("cleaned") == 5
        assert streams.complaints() == []


def test_sigint_drains_too(tmp_path: Path) -> None:
    with Streams(tmp_path) as streams:
        streams.stream("/events")
        streams.stop(signal.SIGINT)
        assert FAREWELL in streams.rest()[0]
        assert streams.left("cleaned") == 1


def test_content_that_is_told_ends_by_itself(tmp_path: Path) -> None:
    """sysid/sse-starlette#167: `shutdown_event` tells the content; nothing cancels it within its grace."""
    with Streams(tmp_path) as streams:
        streams.stream("/cooperating")
        streams.stop()
        (rest,) = streams.rest()
        assert "data: my own end\r\n\r\n" in rest
        assert rest.index("my own end") < rest.index("data: bye")
        assert streams.left("cleaned") == 1


def test_content_goes_on_during_the_grace(tmp_path: Path) -> None:
    """C22: and the farewell, made by a function, is the last event."""
    with Streams(tmp_path) as streams:
        streams.stream("/graceful")
        streams.stop()
        (rest,) = streams.rest()
        assert rest.count("data: tick") >= 2
        assert f"id: {rest.count('data: tick') + 1}\r\nevent: bye\r\n\r\n" in rest
        assert rest.index("event: bye") > rest.rindex("data: tick")


def test_a_stream_that_may_not_be_interrupted_finishes(tmp_path: Path) -> None:
    """sysid/sse-starlette#157: the policy leaves out the cause."""
    with Streams(tmp_path) as streams:
        streams.stream("/uninterrupted")
        streams.stop()
        (rest,) = streams.rest()
        assert "data: finished" in rest
        assert "never" not in rest


def test_signal_handlers_of_the_application_still_run(tmp_path: Path) -> None:
    with Streams(tmp_path, OWN_HANDLER="1") as streams:
        streams.stream("/events")
        streams.stop()
        assert streams.left("own handler") == 1
        assert FAREWELL in streams.rest()[0]
        assert streams.left("lifespan shutdown") == 1


def test_automatic_draining_can_be_switched_off(tmp_path: Path) -> None:
    """sysid/sse-starlette#157: its `disable_automatic_graceful_drain`; then `should_exit` is the application's."""
    with Streams(tmp_path, NO_DRAIN="1") as streams:
        streams.stream("/events")
        streams.send_signal()
        streams.wait_for_log("Shutting down")
        (client,) = streams.clients
        client.until(b"still here")
        client.until(FAREWELL.encode())
        assert streams.wait() == -signal.SIGTERM


@pytest.mark.parametrize("server", LIMITED)
def test_a_server_that_stops_without_a_signal(server: str, tmp_path: Path) -> None:
    """After so many requests: seen by its listening sockets."""
    with Streams(tmp_path, server, options=[LIMITED[server]]) as streams:
        streams.stream("/events", 2)
        with suppress(OSError):  # it no longer listens
            for _ in range(10):
                streams.get("/stats")
        assert [rest for rest in streams.rest() if FAREWELL not in rest] == []
        assert streams.complaints() == []


class InThread:
    """A uvicorn in a thread of this process, which no signal reaches."""

    def __init__(self) -> None:
        config = uvicorn.Config(app, port=free_port(), log_level="warning")
        self.server = uvicorn.Server(config)
        self.port = config.port
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> InThread:
        self.thread.start()
        end = time.monotonic() + DEADLINE
        while not self.server.started:
            assert time.monotonic() < end
            time.sleep(0.01)
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(DEADLINE)
        assert not self.thread.is_alive()

    def open(self) -> RawClient:
        client = RawClient(self.port)
        client.request("/events")
        client.until(b"first")
        return client


def test_two_servers_in_one_process_do_not_disturb_each_other() -> None:
    """sysid/sse-starlette#211: one is stopped, in whose thread nobody hears signals; the other goes on, and a third."""
    with InThread() as one, InThread() as other, one.open() as first, other.open() as second:
        one.stop()
        assert FAREWELL in first.rest().decode()
        with InThread() as third, third.open() as late:
            with pytest.raises(TimeoutError):
                second.until(b"bye", timeout=4 * shutdown.LOOK)
            late.close()
        other.stop()
        assert FAREWELL in second.rest().decode()
