"""Writes down what becomes of each request that a real server hands to an application: one line of JSON a piece of
news, in a file that the test reads. A file needs no connection, and serves any number of workers."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..channel import Channel
from ..protect import channel_of
from .faults import Fault
from .records import CURRENT, Record
from .sites import stack_of, told
from .visit import settle
from .watching import watch


class Recorder:
    """Stands between a server and an application, and passes everything on.

    :param app: the application
    :param file: where to write
    """

    def __init__(self, app: ASGIApp, file: str | Path) -> None:
        self._app = app
        self._file = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._name = secrets.token_hex(4)  # workers share the file
        self._numbers = count(1)
        self._running: dict[str, Record] = {}
        self._over: list[tuple[Record, Callable[[], None]]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = _Recorded(scope, receive, send)
        number = f"{self._name}-{next(self._numbers)}"
        open_until_told = ExitStack()
        over = watch(logs=False)
        record = self._running[number] = open_until_told.enter_context(over.record(visit.look))
        self._write(id=number, method=scope["method"], path=scope["path"], began=time.monotonic())

        def tell() -> None:
            open_until_told.close()
            faults = [list(fault) for fault in record.faults]
            self._write(id=number, waits=record.suspensions, faults=faults, **visit.outcome)

        try:
            await record.run(visit.run(self._app))
        finally:
            del self._running[number]
            self._over.append((record, tell))
            if len(self._over) == 1:
                over.backend.aside(self._judge, self._tell)

    async def _judge(self) -> None:
        """Look at those that are over: together, because collecting garbage takes its time."""
        while self._over:
            over = [record for record, _ in self._over]
            await settle(*over)
            for record in over:
                record.look()
            self._tell(len(over))

    def _tell(self, count: int | None = None) -> None:
        """Write down the first ``count`` of them; all, if the event loop ends before anybody has looked."""
        over, self._over[:count] = self._over[:count], []
        for _, tell in over:
            tell()

    def running(self) -> dict[str, str]:
        """Where each request that is not over waits."""
        return {number: record.everywhere() for number, record in self._running.items()}

    def _write(self, **news: Any) -> None:
        os.write(self._file, json.dumps(news).encode() + b"\n")  # whole lines, whoever else writes


class _Recorded:
    """One request, looked at as it passes."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._status: int | None = None
        self._completed = False
        self._left: float | None = None
        self._channel: Channel | None = None
        self._refusals: list[OSError] = []
        self.outcome: dict[str, Any] = {}

    def look(self) -> None:
        self._channel = channel_of(self._scope) or self._channel

    async def run(self, app: ASGIApp) -> None:
        error: Exception | None = None
        try:
            await app(self._scope, self.receive, self.send)
        except Exception as exc:
            if exc not in self._refusals:  # the server's own, on their way back to it
                error = exc
            raise
        finally:
            self._refusals.clear()
            self.outcome = {
                "ended": time.monotonic(),
                "left": self._left,
                "status": self._status,
                "cause": self._channel.cause if self._channel is not None else None,
                "error": f"{error!r}, from\n{told(stack_of(error))}" if error is not None else None,
            }
            del error

    async def receive(self) -> Message:
        with _of_the_server():
            message = await self._receive()
        if message["type"] == "http.disconnect" and not self._completed and self._left is None:
            self._left = time.monotonic()
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
        ends = message["type"] in ("http.response.body", "http.response.pathsend") and not message.get("more_body")
        self._completed = self._completed or ends
        with _of_the_server():
            try:
                await self._send(message)
            except OSError as exc:  # the client has left (ASGI 2.4)
                self._refusals.append(exc)
                raise


@contextmanager
def _of_the_server() -> Iterator[None]:
    """What is started here is the server's own affair: Hypercorn starts the connection's next timeout in ``send``."""
    token = CURRENT.set(None)
    try:
        yield
    finally:
        CURRENT.reset(token)


@dataclass
class ServedVisit:
    """What became of a request to a real server. Times are those of ``time.monotonic``, which all processes share.

    :ivar left: when the application read that its client had left
    :ivar ended: when it returned; ``None``: it has not
    :ivar status: what it answered, whether or not anybody was there
    :ivar cause: why the library ended the work, if it did
    :ivar error: the exception that has reached the server, and from where
    :ivar waits: how often it has waited
    :ivar faults: what it should not have done
    """

    id: str
    method: str
    path: str
    began: float
    left: float | None = None
    ended: float | None = None
    status: int | None = None
    cause: str | None = None
    error: str | None = None
    waits: int = 0
    faults: list[Fault] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.method} {self.path} {self.status}"


class VisitsFile:
    """Those that a recorder has written down, in the order in which they began. What has been read is not read again.

    :param path: which may be gone by the time of a later look
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        self._visits: dict[str, ServedVisit] = {}

    def visits(self) -> list[ServedVisit]:
        """All of them by now."""
        with suppress(FileNotFoundError), self._path.open("rb") as file:
            file.seek(self._read)
            whole = file.read().rpartition(b"\n")[0]  # it may be in the middle of a line
            self._read += len(whole) + bool(whole)
            for news in map(json.loads, whole.splitlines()):
                self._take(news)
        return list(self._visits.values())

    def _take(self, news: dict[str, Any]) -> None:
        if (visit := self._visits.get(news["id"])) is None:
            self._visits[news["id"]] = ServedVisit(**news)
            return
        faults = [Fault(*fault) for fault in news.pop("faults")]
        if news["error"] is not None:
            faults.append(Fault("error", f"reached the server: {news['error']}"))
        self._visits[visit.id] = replace(visit, **{**news, "faults": faults})
