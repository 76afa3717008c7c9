"""A client's link goes down without a word, while an event stream is open and a handler works for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from .conftest import NOT_TESTED
from .live import DEADLINE, ROOT
from .silence import SERVER, Cable, Machine, Unavailable, program
from .silent_app import SERVERS

SILENCE = 3  # seconds


class SilentServer:
    """A server on the one machine, with two clients on the other.

    :ivar marks: what the application wrote down
    """

    def __init__(self, name: str, port: int, cable: Cable, directory: Path, stack: ExitStack) -> None:
        self.marks, self.log = directory / f"{name}-marks", directory / f"{name}-log"
        self.marks.touch()
        listening = ["-m", "fastapi_cancel.listening", "--silence", str(SILENCE), f"0.0.0.0:{port}", "--"]
        server = [sys.executable, "-m", *SERVERS[name], "tests.silent_app:app"]
        self._start(cable.server, [sys.executable, *listening, *server], stack)
        client = [program("curl"), "-sN", "--retry", "60", "--retry-connrefused", "--retry-delay", "1"]
        for path in ("stream", "handler"):
            self._start(cable.client, [*client, f"http://{SERVER}:{port}/{path}"], stack)

    def _start(self, machine: Machine, command: list[str], stack: ExitStack) -> None:
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [*machine.enter, *command],
                cwd=ROOT,
                env={**os.environ, "MARKS": str(self.marks)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        stack.callback(process.wait)
        stack.callback(os.killpg, process.pid, signal.SIGKILL)  # a server's workers too

    def wait_for(self, *marks: str) -> None:
        end = time.monotonic() + DEADLINE
        while not set(marks) <= set(self.marks.read_text().splitlines()):
            assert time.monotonic() < end, f"never {marks}, but {self.marks.read_text()!r}\n{self.log.read_text()}"
            time.sleep(0.02)


@pytest.fixture(scope="module")
def went_silent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, SilentServer]]:
    """All servers at once: the seconds that pass are the same for all."""
    directory = tmp_path_factory.mktemp("silent")
    with ExitStack() as stack:
        try:
            cable = stack.enter_context(Cable())
            servers = {
                name: SilentServer(name, 8000 + number, cable, directory, stack) for number, name in enumerate(SERVERS)
            }
        except Unavailable as exc:
            pytest.skip(f"{NOT_TESTED} a network that goes silent, which needs network namespaces: {exc}")
        for server in servers.values():
            server.wait_for("stream open", "handler open")
        cable.cut()
        yield servers


@pytest.mark.parametrize("name", SERVERS)
def test_stream_with_heartbeats_ends(went_silent: dict[str, SilentServer], name: str) -> None:
    """C1, C7: heartbeats that nobody acknowledges."""
    went_silent[name].wait_for("stream cleaned: disconnect")


@pytest.mark.parametrize("name", SERVERS)
def test_handler_that_sends_nothing_ends(went_silent: dict[str, SilentServer], name: str) -> None:
    """C1, C7: nothing to acknowledge: keep-alive tells."""
    went_silent[name].wait_for("handler cleaned: disconnect")
