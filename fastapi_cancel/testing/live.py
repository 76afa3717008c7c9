"""A real server for a test: a process of its own, on a free port, whose log is kept."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL, SIGTERM
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ._probe import APP, READY, RUNNING, TOKEN, VISITS
from ._target import target_of
from .recorder import ServedVisit, VisitsFile
from .servers import find_server
from .sockets import Headers, RawClient

if TYPE_CHECKING:
    from .http2 import Http2Client

PACKAGE = "fastapi_cancel.testing"
ATTEMPTS = 3  # another process may take the port between our look and the server's
TAKEN = re.compile("address already in use", re.IGNORECASE)
LOOK = 0.005  # seconds between two looks
PATIENCE = 1.0  # seconds for the answer to "are you ready": a master accepts before it has workers


class LiveServerError(RuntimeError):
    """The server did not start, did not stop, or has ended by itself. The message ends with its log."""


class LiveServer:
    """A server that runs while the ``with`` block does.

    ::

        def test_an_export_stops_with_its_client():
            with LiveServer(app) as server, server.open("/export") as client:
                client.until(b"row 1")
                client.abort()
                server.wait_for("/exports", running=0)
                assert server.complaints() == []

    It runs in a process of its own, which imports the application anew: what the test changes in its own process is
    not seen there. On Linux and macOS.

    :param app: the application, which must be an attribute of a module that can be imported; or which one that is,
        as ``"module:attribute"``
    :param server: ``"uvicorn"`` (httptools where installed, asyncio), ``"uvicorn-h11"``, ``"uvicorn-uvloop"``,
        ``"gunicorn"`` (its own worker ``asgi``), ``"gunicorn-uvicorn"``, ``"hypercorn"``, ``"hypercorn-trio"``,
        ``"granian"``, ``"granian-rsgi"`` or ``"daphne"``
    :param workers: their number; with more than one, all have logged that they serve before the block begins
    :param options: what else to give to the server on its command line
    :param env: what to add to its environment
    :param probe: whether the application is served behind one that says when it is ready, and records its requests; if
        not, the server is ready when it answers anything on ``/``
    :param access_log: whether the server is to log its requests
    :param deadline: seconds for whatever must happen: its start, its end, what is waited for
    :ivar name: of the server, as above
    :ivar port: where it listens, on 127.0.0.1
    :raises ValueError: a parameter is not as described; the message says which, and what is allowed
    :raises ImportError: the server is not installed
    :raises NotImplementedError: on Windows
    """

    port: int

    def __init__(
        self,
        app: object,
        server: str = "uvicorn",
        *,
        workers: int = 1,
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        probe: bool = True,
        access_log: bool = False,
        deadline: float = 20.0,
    ) -> None:
        if sys.platform == "win32":
            raise NotImplementedError("LiveServer ends a server's workers by their process group: Linux and macOS only")
        self._server = find_server(server)
        if workers < 1 or (workers > 1 and self._server.workers is None):
            allowed = "1, it has no others" if self._server.workers is None else "1 or more"
            raise ValueError(f"workers: for {server} {allowed}, not {workers!r}")
        if isinstance(options, str):
            raise ValueError(f"options: a list of strings, not the one string {options!r}")
        if deadline <= 0:
            raise ValueError(f"deadline: seconds, above 0, not {deadline!r}")
        self.name = server
        self.deadline = deadline
        self._target = target_of(app)
        self._workers = workers
        self._options = list(options)
        self._env = dict(env or {})
        self._probe = probe
        self._access_log = access_log
        self._token = secrets.token_hex(8)
        self._process: subprocess.Popen[bytes] | None = None
        self._mark = self._visits_mark = 0
        self._last_log = b""

    # -- its life --------------------------------------------------------------------------------

    def start(self) -> None:
        """What the ``with`` block begins with.

        :raises LiveServerError: it does not serve
        """
        self._directory = tempfile.TemporaryDirectory(prefix="fastapi-cancel-")
        self._log = Path(self._directory.name, "log")
        self._visits = Path(self._directory.name, "visits")
        self._visits.touch()
        self._requests = VisitsFile(self._visits)
        try:
            for _ in range(ATTEMPTS):
                self.port = free_port()
                self._process = self._run()
                if self._serves():
                    return
                self._kill()
                if not TAKEN.search(self._text()):
                    break
            raise LiveServerError(f"{self.name} did not start, or not all of its workers:\n{self._text()}")
        except BaseException:
            self._end()
            raise

    def _run(self) -> subprocess.Popen[bytes]:
        arguments = self._server.arguments(self.port, self._workers, self._access_log)
        ours = {
            "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
            "PYTHONUNBUFFERED": "1",
            APP: self._target,
            TOKEN: self._token,
            VISITS: str(self._visits),
        }
        self._mark = 0
        with self._log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *arguments, *self._options, self._served()],
                env={**os.environ, **ours, **self._env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _served(self) -> str:
        if self._probe:
            return f"{PACKAGE}.served:{'rsgi_application' if self._server.rsgi else 'app'}"
        return f"{PACKAGE}._rsgi:application" if self._server.rsgi else self._target

    def _serves(self) -> bool:
        """Wait until it does. It may never."""
        end = time.monotonic() + self.deadline
        while not (self._answers() and self._all_workers_serve()):
            if self.process.poll() is not None or time.monotonic() > end:
                return False
            log = self._text()
            if TAKEN.search(log) or self._server.is_at_a_loss(log):
                return False
            time.sleep(LOOK)
        return True

    def _answers(self) -> bool:
        with suppress(OSError, ValueError), RawClient(self.port, timeout=PATIENCE) as client:
            client.request(READY if self._probe else "/", headers="Connection: close\r\n")
            if self._probe:
                return client.response() == (200, self._token.encode())
            return client.head()[0] > 0
        return False

    def _all_workers_serve(self) -> bool:
        return self._workers == 1 or self._server.workers_up(self._text()) >= self._workers

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The server's process, or that of its workers' master."""
        if self._process is None:
            raise RuntimeError("the server has not been started: that is what its with block does")
        return self._process

    @property
    def pid(self) -> int:
        """Of the server's process, or of its workers' master."""
        return self.process.pid

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def send_signal(self, signal: int = SIGTERM) -> None:
        """Send ``signal`` to the server, or to its workers' master, and wait for nothing."""
        self.process.send_signal(signal)

    def wait(self) -> int:
        """Wait until the server has ended.

        :return: its exit code; the negative number of a signal if that ended it
        :raises LiveServerError: it goes on
        """
        try:
            return self.process.wait(self.deadline)
        except subprocess.TimeoutExpired:
            raise LiveServerError(f"{self.name} has not ended within {self.deadline} s:\n{self._text()}") from None

    def stop(self, signal: int = SIGTERM) -> int:
        """Send ``signal``, and wait until the server has ended.

        :return: its exit code; the negative number of a signal if that ended it
        :raises LiveServerError: it goes on
        """
        self.send_signal(signal)
        return self.wait()

    def _kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):  # none is left; macOS: none but who has ended already
            os.killpg(self.pid, SIGKILL)
        self.process.wait()

    def _end(self) -> None:
        if self._process is not None:
            self._kill()
            self._last_log = self._log.read_bytes()
            self._requests.visits()
        self._directory.cleanup()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if exc is None:  # else how it would have ended is not the question
                self.stop()
        finally:
            self._end()

    # -- its log ---------------------------------------------------------------------------------

    @property
    def log(self) -> str:
        """What the server and the application have written since the last :meth:`mark`."""
        return self._text(self._mark)

    def mark(self) -> None:
        """Forget the requests so far, and what has been logged, but for the line that is being written."""
        self._mark = self._bytes().rfind(b"\n") + 1
        self._visits_mark = len(self._requests.visits())

    def wait_for_log(self, text: str, times: int = 1) -> None:
        """Wait until the log has ``text`` in it, so many times.

        :raises AssertionError: it has not
        """
        end = time.monotonic() + self.deadline
        while (found := self.log.count(text)) < times:
            if time.monotonic() > end:
                raise AssertionError(f"{text!r} is {found} times in the log of {self.name}, not {times}:\n{self.log}")
            time.sleep(LOOK)

    def complaints(self, *but: str) -> list[str]:
        """The lines of the log that a person would look at: all but what this server says while all is well.

        :param but: regular expressions of what is no complaint either
        """
        log = self.log
        if self.process.poll() is None:
            log = log.rpartition("\n")[0]  # it may be in the middle of a line
        lines = [line for line in log.splitlines() if not self._server.is_fine(line)]
        return [line for line in lines if not any(re.search(each, line) for each in but)]

    def _text(self, since: int = 0) -> str:
        return self._bytes()[since:].decode(errors="replace")

    def _bytes(self) -> bytes:
        try:
            return self._log.read_bytes()
        except FileNotFoundError:
            return self._last_log

    # -- its requests ----------------------------------------------------------------------------

    @property
    def visits(self) -> list[ServedVisit]:
        """What became of each request since the last :meth:`mark`, in the order in which they began.

        With ``probe=False`` nobody has looked.
        """
        return self._requests.visits()[self._visits_mark :]

    def wait_until_over(self, count: int = 0) -> list[ServedVisit]:
        """Wait until no request runs.

        :param count: of requests that must have been there at least, whoever asked
        :return: all of them
        :raises AssertionError: some go on: the message says where they wait; or there were fewer
        """
        end = time.monotonic() + self.deadline
        while True:
            visits = self.visits
            going_on = [visit for visit in visits if visit.ended is None]
            if not going_on and len(visits) >= count:
                return visits
            if time.monotonic() > end:
                break
            time.sleep(LOOK)
        where = self.json(RUNNING)  # with several workers, of one of them
        told = [f"{visit}, went on at\n{where.get(visit.id, '    another worker')}" for visit in going_on]
        raise AssertionError("\n".join([f"{len(visits)} requests, {len(going_on)} not over", *told]))

    def assert_clean(self, count: int = 0, but: Sequence[str] = ()) -> None:
        """Every request has ended, cleaned up and left nothing; the log has nothing that a person would look at.

        :param count: of requests that must have been there at least, whoever asked
        :param but: regular expressions of what may be in the log
        :raises AssertionError: names each fault, with the line to look at
        """
        __tracebackhide__ = True
        told = [f"{visit}: {fault}" for visit in self.wait_until_over(count) for fault in visit.faults]
        if told := [*told, *(f"logged: {line}" for line in self.complaints(*but))]:
            raise AssertionError("\n".join([f"{self.name}:", *told]))

    # -- its clients -----------------------------------------------------------------------------

    def connect(self, *, receive_buffer: int | None = None, timeout: float | None = None) -> RawClient:
        """A client that has sent nothing yet.

        :param receive_buffer: bytes, see :class:`RawClient`
        :param timeout: seconds, instead of the server's deadline
        :raises LiveServerError: the server has ended
        """
        try:
            return RawClient(self.port, receive_buffer=receive_buffer, timeout=timeout or self.deadline)
        except ConnectionRefusedError as exc:
            raise self._refused(exc) from None

    def _refused(self, error: ConnectionRefusedError) -> Exception:
        """That nobody listens, told with what a server that has ended has to say about it."""
        if (status := self.process.poll()) is None:
            return error
        return LiveServerError(f"{self.name} has ended with {status}:\n{self._text()}")

    def open(
        self,
        path: str,
        method: str = "GET",
        headers: Headers = "",
        body: bytes = b"",
        *,
        receive_buffer: int | None = None,
        timeout: float | None = None,
    ) -> RawClient:
        """A client that has sent this request, see :meth:`RawClient.request`."""
        client = self.connect(receive_buffer=receive_buffer, timeout=timeout)
        try:
            client.request(path, method, headers, body)
        except BaseException:
            client.close()
            raise
        return client

    def open_http2(self, *, receive_buffer: int | None = None, timeout: float | None = None) -> Http2Client:
        """A client that speaks HTTP/2, with no request sent yet. Of the servers, Hypercorn and Granian do so too.

        :raises ImportError: h2 is not installed
        :raises ConnectionError: the server does not speak it
        :raises LiveServerError: the server has ended
        """
        from .http2 import Http2Client

        try:
            return Http2Client(self.port, receive_buffer=receive_buffer, timeout=timeout or self.deadline)
        except ConnectionRefusedError as exc:
            raise self._refused(exc) from None

    def get(self, path: str) -> tuple[int, bytes]:
        """Ask for ``path``: the status and the body of the answer."""
        with self.open(path, headers="Connection: close\r\n") as client:
            return client.response()

    def json(self, path: str) -> Any:
        """What ``path`` answers, decoded.

        :raises AssertionError: with another status than 200
        """
        status, body = self.get(path)
        if status != 200:
            raise AssertionError(f"{path} answered {status}: {body!r}")
        return json.loads(body)

    def wait_for(self, path: str, /, **expected: object) -> dict[str, Any]:
        """Ask ``path`` until the JSON object that it answers is as expected.

        :param expected: values by their names; or functions, to each of which the value is given
        :return: the object
        :raises AssertionError: it never is; the message says what it was at last
        """
        end = time.monotonic() + self.deadline
        while True:
            state: dict[str, Any] = self.json(path)
            if all(_is_as_expected(state.get(name), value) for name, value in expected.items()):
                return state
            if time.monotonic() > end:
                raise AssertionError("\n".join([f"{path}: never {expected}, but {state}", *self.complaints()]))
            time.sleep(LOOK)


def _is_as_expected(value: object, expected: object) -> bool:
    return bool(expected(value)) if callable(expected) else value == expected


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on. It is not reserved: another process may take it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
