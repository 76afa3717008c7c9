"""The matrix: the servers, their clients, what is known to differ, and the table of it in docs/servers.md."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

from fastapi_cancel.testing import Http2Client, LiveServer, RawClient, ServedVisit
from fastapi_cancel.testing.http2 import Http2Stream

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "servers.md"
BEGIN, END = "<!-- matrix: begin, written by tests/matrix_lines.py -->", "<!-- matrix: end -->"
LAYERS = (0, 5)  # of BaseHTTPMiddleware
BRIEF = 3.0  # seconds for what is known not to come

EMPTY: Mapping[str, str] = {}

Request: TypeAlias = RawClient | Http2Stream


# -- columns -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A server, and how its clients speak to it.

    :ivar server: as LiveServer calls it
    :ivar title: as the table does
    """

    name: str
    server: str
    title: str
    http2: bool = False


COLUMNS = [
    Column("uvicorn", "uvicorn", "uvicorn"),
    Column("uvicorn-h11", "uvicorn-h11", "uvicorn h11"),
    Column("uvicorn-uvloop", "uvicorn-uvloop", "uvicorn uvloop"),
    Column("gunicorn", "gunicorn", "gunicorn `asgi`"),
    Column("gunicorn-uvicorn", "gunicorn-uvicorn", "gunicorn uvicorn"),
    Column("hypercorn", "hypercorn", "Hypercorn"),
    Column("hypercorn-trio", "hypercorn-trio", "Hypercorn Trio"),
    Column("hypercorn-http2", "hypercorn", "Hypercorn HTTP/2", http2=True),
    Column("granian", "granian", "Granian"),
    Column("granian-rsgi", "granian-rsgi", "Granian RSGI"),
    Column("granian-http2", "granian", "Granian HTTP/2", http2=True),
    Column("granian-rsgi-http2", "granian-rsgi", "Granian RSGI HTTP/2", http2=True),
    Column("daphne", "daphne", "Daphne"),
]
NAMES = [column.name for column in COLUMNS]


def column_named(name: str) -> Column:
    return next(column for column in COLUMNS if column.name == name)


HTTP1 = [column.name for column in COLUMNS if not column.http2]
HTTP2 = [column.name for column in COLUMNS if column.http2]


class Servers:
    """One runs at a time: the one that was asked for last."""

    def __init__(self) -> None:
        self._asked: tuple[str, int] | None = None
        self._running: LiveServer | None = None

    def get(self, column: str, layers: int) -> Served:
        """The server of a column, behind so many layers. It goes on as long as it is asked for."""
        if self._running is None or self._asked != (column, layers):
            self.end()
            server, env = column_named(column).server, {"MIDDLEWARE": str(layers)}
            live = LiveServer("tests.matrix_app:app", server, env=env, access_log=True)
            live.start()
            self._asked, self._running = (column, layers), live
        return Served(column_named(column), layers, self._running)

    def end(self) -> None:
        """The next one that is asked for is a new one."""
        if self._running is not None:
            self._running, live = None, self._running
            live.__exit__(None, None, None)

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()


@dataclass(frozen=True)
class Served:
    column: Column
    layers: int
    live: LiveServer


class Cell:
    """One line on one server: its requests, each from a client of its own; on HTTP/2 all on one connection.

    :ivar opened: how many there were
    :ivar may_say: regular expressions of what the server may log
    :ivar is_clean: whether nothing must be left over, no fault be found, and nothing else be logged
    :ivar stopped: whether the server was
    """

    def __init__(self, served: Served, deadline: float) -> None:
        self.served = served
        self.layers = served.layers
        self.live = served.live
        self.live.deadline = deadline
        self.live.json("/reset")
        self.live.mark()
        self._stack = ExitStack()
        self._connection: Http2Client | None = None
        self.opened = 0
        self.may_say: list[str] = []
        self.is_clean = True
        self.stopped = False

    def __enter__(self) -> Cell:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def connection(self) -> Http2Client:
        if self._connection is None:
            self._connection = self._stack.enter_context(self.live.open_http2())
        return self._connection

    def open(
        self,
        path: str,
        method: str = "GET",
        body: bytes = b"",
        of: int | None = None,
        headers: Mapping[str, str] = EMPTY,
        receive_buffer: int | None = None,
    ) -> Request:
        """Send a request.

        :param of: bytes of the whole body, if ``body`` is only its beginning
        :param receive_buffer: bytes; on HTTP/2 it is the stream's window that counts
        """
        self.opened += 1
        if of is not None:
            headers = {**headers, "content-length": str(of)}
        if self.served.column.http2:
            return self.connection.request(path, method, headers, body, end=of is None)
        client = self._stack.enter_context(self.live.connect(receive_buffer=receive_buffer))
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
            if isinstance(request, Http2Stream):
                request.reset()
            elif number % 2:
                request.abort()
            else:
                request.close()
        told(len(requests) - 1)
        if isinstance(requests[-1], Http2Stream):
            self.connection.close()
        else:
            requests[-1].abort()
        told(len(requests))

    def stop(self) -> int:
        """Tell the server to stop, and wait for its end."""
        self.stopped = True
        return self.live.stop()

    def until(self, **expected: object) -> dict[str, Any]:
        """Wait until the application says so of itself."""
        return self.live.wait_for("/stats", **expected)

    def visits(self, *paths: str) -> list[ServedVisit]:
        """What has become of the requests for ``paths``, so far."""
        return [visit for visit in self.live.visits if visit.path in paths]

    def over(self, *paths: str) -> list[ServedVisit]:
        """The same, once they are over."""
        end = time.monotonic() + self.live.deadline
        while not (visits := self.visits(*paths)) or any(visit.ended is None for visit in visits):
            assert time.monotonic() < end, [str(visit) for visit in visits if visit.ended is None]
            time.sleep(0.005)
        return visits

    def assert_over(self) -> None:
        """All is over, and nothing is left of it."""
        if self.stopped:
            assert self.live.complaints(*self.may_say) == []
        elif self.is_clean:
            self.live.assert_clean(self.opened, self.may_say)
        else:
            self.live.wait_until_over(self.opened)


def leave(*requests: Request) -> None:
    """On HTTP/1 the connection goes, with a RST; on HTTP/2 the stream alone."""
    for request in requests:
        if isinstance(request, Http2Stream):
            request.reset()
        else:
            request.abort()


# -- rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A line of the contract.

    :ivar number: of the line
    :ivar text: for the table
    :ivar check: raises if it does not hold
    """

    name: str
    number: str
    text: str
    check: Callable[[Cell], None]


@dataclass(frozen=True)
class Difference:
    """Where a line is known not to hold.

    :ivar rows: their names
    :ivar columns: likewise
    :ivar reason: a sentence for the table's notes
    :ivar shown: in the table
    :ivar tried: whether it is tried all the same, and must fail
    """

    rows: Sequence[str]
    columns: Sequence[str]
    reason: str
    shown: str = "no"
    tried: bool = True
    layers: Sequence[int] = LAYERS


Place: TypeAlias = tuple[str, str, int]
"""A cell: the names of its row and of its column, and the layers."""


class Matrix:
    """What has come out."""

    def __init__(self, rows: Sequence[Row], differences: Iterable[Difference]) -> None:
        self.rows = rows
        self.differences: dict[Place, Difference] = {}
        for difference in differences:
            for place in _places(difference.rows, difference.columns, difference.layers):
                assert place not in self.differences, f"{place} is told twice"
                self.differences[place] = difference
        self.as_told: set[Place] = set()
        everywhere = _places([row.name for row in rows], NAMES, LAYERS)
        assert self.differences.keys() <= set(everywhere), self.differences.keys() - set(everywhere)
        self.to_run = [place for place in everywhere if place not in self.differences or self.differences[place].tried]

    def is_complete(self) -> bool:
        """Whether all that can be tried was tried, and is as it should be."""
        return self.as_told == set(self.to_run)

    def table(self) -> str:
        """In Markdown, with its notes."""
        notes: list[str] = []
        lines = [_line(["", *(column.title for column in COLUMNS)]), "|---" * (len(COLUMNS) + 1) + "|"]
        lines += [_line([row.text, *(self._shown(row, name, notes) for name in NAMES)]) for row in self.rows]
        lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]
        return "\n".join(lines)

    def _shown(self, row: Row, column: str, notes: list[str]) -> str:
        shown = []
        for layers in LAYERS:
            difference = self.differences.get((row.name, column, layers))
            if difference is None:
                shown.append("yes")
                continue
            if difference.reason not in notes:
                notes.append(difference.reason)
            shown.append(f"{difference.shown} ({notes.index(difference.reason) + 1})")
        return " / ".join(dict.fromkeys(shown))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def _places(rows: Sequence[str], columns: Sequence[str], layers: Sequence[int]) -> list[Place]:
    return [(row, column, number) for column in columns for number in layers for row in rows]


# -- the page ------------------------------------------------------------------------------------

MEASURED = {
    "uvicorn": "uvicorn",
    "httptools": "httptools",
    "h11": "h11",
    "uvloop": "uvloop",
    "gunicorn": "gunicorn",
    "uvicorn-worker": "uvicorn-worker",
    "Hypercorn": "Hypercorn",
    "trio": "Trio",
    "granian": "Granian",
    "daphne": "Daphne",
    "fastapi": "FastAPI",
    "starlette": "Starlette",
    "anyio": "AnyIO",
}
"""Distributions, and what the page calls them."""


def is_pinned() -> bool:
    """Whether what is installed is what constraints.txt says: the page tells of nothing else."""
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text().lower(), re.M))
    try:
        return all(version(name) == pins.get(name.lower()) for name in MEASURED)
    except PackageNotFoundError:
        return False


def written(page: str, matrix: Matrix) -> str:
    """``page`` with the table in its place."""
    versions = ", ".join(f"{called} {version(name)}" for name, called in MEASURED.items())
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{matrix.table()}\n\nMeasured with {versions}.\n\n{END}{after}"
