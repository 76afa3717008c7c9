"""A cell of the matrix: one line of the contract on one running server, and the clients that try it."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from signal import SIGKILL
from typing import Any, TypeAlias

from fastapi_cancel.testing import Http2Client, LiveServer, RawClient, ServedVisit
from fastapi_cancel.testing._probe import RUNNING
from fastapi_cancel.testing.http2 import Http2Stream

APP = "tests.matrix_app:app"
STUCK = 0.1  # seconds in one ``send``
LOOK = 0.005  # seconds between two looks
OF_THE_TEST = frozenset({"/stats", "/reset", "/orders", "/open-gates"})
"""What a line asks for itself, besides what its clients do."""

EMPTY: Mapping[str, str] = {}

Request: TypeAlias = RawClient | Http2Stream


class Servers:
    """One runs at a time: the one that was asked for last."""

    def __init__(self) -> None:
        self._asked: tuple[str, int] | None = None
        self._running: LiveServer | None = None

    def get(self, server: str, layers: int, options: Sequence[str] = ()) -> LiveServer:
        """One that runs ``APP`` behind so many layers. It goes on for as long as it is asked for, and not ended."""
        if self._running is None or self._asked != (server, layers):
            self.end()
            live = LiveServer(
                APP, server, options=options, env={"MIDDLEWARE": str(layers), "LIFESPAN": "1"}, access_log=True
            )
            live.start()
            self._asked, self._running = (server, layers), live
        return self._running

    def end(self) -> None:
        """By force: how it would have ended is a line of its own."""
        if self._running is not None:
            live, self._running = self._running, None
            live.deadline = 20.0
            live.stop(SIGKILL)
            live.__exit__(None, None, None)

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()


class Cell:
    """One line on one server: its requests, each from a client of its own; on HTTP/2 all on one connection.

    :param layers: of middleware, in the server's application
    :param http2: whether the clients speak HTTP/2
    :param deadline: seconds for whatever must happen
    :param may_say: a regular expression of what may be logged or found all the same; nothing if empty
    :ivar opened: how many requests there were
    :ivar is_clean: whether nothing must be left over, no fault be found, and nothing be logged
    :ivar stopped: whether the server was
    """

    def __init__(self, live: LiveServer, layers: int, http2: bool, deadline: float, may_say: str = "") -> None:
        self.live = live
        self.layers = layers
        self.is_clean = True
        self.stopped = False
        self.opened = 0
        self.http2 = http2
        self._may_say = [may_say] if may_say else []
        self._stack = ExitStack()
        self._connection: Http2Client | None = None
        live.deadline = deadline

    def __enter__(self) -> Cell:
        self.live.json("/reset")
        self.live.mark()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    # -- its clients -----------------------------------------------------------------------------

    @property
    def connection(self) -> Http2Client:
        if self._connection is None:
            self._connection = self._stack.enter_context(self.live.open_http2())
            self._connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as browsers do
        return self._connection

    def open(
        self,
        path: str,
        method: str = "GET",
        body: bytes = b"",
        of: int | None = None,
        headers: Mapping[str, str] = EMPTY,
        room: int = 65536,
    ) -> Request:
        """Send a request.

        :param of: bytes of the whole body, if ``body`` is only its beginning
        :param room: bytes that the client's system takes unread; on HTTP/2 the stream's credit counts
        """
        self.opened += 1
        if of is not None:
            headers = {**headers, "content-length": str(of)}
        if self.http2:
            return self.connection.request(path, method, headers, body, end=of is None)
        client = self._stack.enter_context(self.live.connect(receive_buffer=room))
        client.request(path, method, headers, body)
        return client

    def begin(self, path: str, method: str = "GET", count: int = 1) -> list[Request]:
        """Open ``path`` so many times, and wait until the work behind it has begun as often."""
        before = self.live.json("/stats")["started"]
        requests = [self.open(path, method) for _ in range(count)]
        self.until(started=before + count)
        return requests

    def leave_all(self, requests: Sequence[Request], told: Callable[[int], Any]) -> None:
        """Every client leaves in one of the ways that there are.

        HTTP/1: a RST or a FIN. HTTP/2: the streams are reset but for the last, and then the connection is closed.

        :param told: waits until so many have been noticed
        """
        for number, request in enumerate(requests[:-1], 1):
            if isinstance(request, RawClient) and number % 2 == 0:
                request.close()
            else:
                leave(request)
        told(len(requests) - 1)
        self.hang_up(requests[-1])
        told(len(requests))

    def hang_up(self, request: Request) -> None:
        """The connection of ``request`` goes."""
        if isinstance(request, RawClient):
            request.abort()
        else:
            self.connection.close()

    # -- what has come of it ---------------------------------------------------------------------

    def stop(self) -> None:
        """Tell the server to stop."""
        self.stopped = True
        self.live.send_signal()

    def wait(self) -> int:
        """Wait until the server has ended: its exit code.

        Granian asks an HTTP/2 client first whether it is still there (PING): that one answers, as browsers do.
        """
        if self._connection is not None and self._connection.socket.fileno() >= 0:  # it has not left
            end = time.monotonic() + self.live.deadline
            with suppress(ConnectionError):
                while True:
                    self._connection._pump("the server's end", end, self._connection._inbox)
        return self.live.wait()

    def until(self, **expected: object) -> dict[str, Any]:
        """Wait until the application says so of itself."""
        return self.live.wait_for("/stats", **expected)

    def until_stuck(self, count: int = 1, or_seen: str | None = None) -> None:
        """Wait until so many ``send`` wait, or until the application says that it has seen ``or_seen``."""
        end = time.monotonic() + self.live.deadline
        while or_seen not in (state := self.until())["seen"]:
            if sum(seconds > STUCK for seconds in state["sending"]) == count:
                break
            assert time.monotonic() < end, f"not {count} of {state['sending']} wait"
            time.sleep(LOOK)

    def visits(self, *paths: str) -> list[ServedVisit]:
        """What has become of the requests for ``paths``, or of all that were opened, so far."""
        return [
            visit for visit in self.live.visits if (visit.path in paths if paths else visit.path not in OF_THE_TEST)
        ]

    def over(self, *paths: str) -> list[ServedVisit]:
        """The same, once they have begun and are over."""
        count = 1 if paths else self.opened
        end = time.monotonic() + self.live.deadline
        while len(visits := self.visits(*paths)) < count or any(visit.ended is None for visit in visits):
            assert time.monotonic() < end, f"{len(visits)} of {count}, {self.live.json(RUNNING)}"
            time.sleep(LOOK)
        return visits

    def assert_over(self) -> None:
        """All is over, and nothing is left of it."""
        assert self.opened, "nothing was tried"
        if self.stopped:
            assert self.live.complaints(*self._may_say) == []
            return
        self.over()
        if self.is_clean:
            faults = [str(fault) for visit in self.live.wait_until_over() for fault in visit.faults]
            faults = [fault for fault in faults if not any(re.search(each, fault) for each in self._may_say)]
            assert faults + self.live.complaints(*self._may_say) == []


def leave(*requests: Request) -> None:
    """On HTTP/1 the connection goes, with a RST; on HTTP/2 the stream alone."""
    for request in requests:
        if isinstance(request, Http2Stream):
            request.reset()
        else:
            request.abort()
