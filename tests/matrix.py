"""The matrix: lines of the contract, servers, where they are known to differ, and the page that tells of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby, product
from pathlib import Path
from typing import Literal, TypeAlias

from .matrix_cell import Cell

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "servers.md"
BEGIN, END = "<!-- matrix: begin, written by tests/test_matrix.py -->", "<!-- matrix: end -->"
LAYERS = (0, 5)  # of BaseHTTPMiddleware
HOLDS, FAILS, NOTHING = "✓", "✗", "–"
LEGEND = (
    f"{HOLDS} holds, {FAILS} does not, {NOTHING} cannot be asked for; without / with the five layers, where that "
    "matters; the numbers are those of the notes"
)
SECTIONS = {"Detecting": 6, "Ending": 15, "Streams": 22, "Policies": 99}
"""Of the contract: the last line of each."""

Protocol: TypeAlias = Literal["HTTP/1", "HTTP/2"]


@dataclass(frozen=True)
class Column:
    """A server, and how its clients speak to it.

    :ivar server: as LiveServer calls it
    :ivar title: as the page does
    :ivar options: of the server
    """

    name: str
    server: str
    title: str
    protocol: Protocol = "HTTP/1"
    options: tuple[str, ...] = ()


COLUMNS = [
    Column("uvicorn", "uvicorn", "uvicorn"),
    Column("uvicorn-h11", "uvicorn-h11", "uvicorn h11"),
    Column("uvicorn-uvloop", "uvicorn-uvloop", "uvicorn uvloop"),
    # It cancels what waits in `send` for a client that has gone, after 3 seconds as it comes.
    Column("gunicorn", "gunicorn", "gunicorn `asgi`", options=("--asgi-disconnect-grace-period", "1")),
    Column("gunicorn-uvicorn", "gunicorn-uvicorn", "gunicorn `uvicorn_worker`"),
    Column("hypercorn", "hypercorn", "Hypercorn"),
    Column("hypercorn-trio", "hypercorn-trio", "Hypercorn Trio"),
    Column("hypercorn-http2", "hypercorn", "Hypercorn HTTP/2", "HTTP/2"),
    Column("granian", "granian", "Granian"),
    Column("granian-rsgi", "granian-rsgi", "Granian RSGI"),
    Column("granian-http2", "granian", "Granian HTTP/2", "HTTP/2"),
    Column("granian-rsgi-http2", "granian-rsgi", "Granian RSGI HTTP/2", "HTTP/2"),
    Column("daphne", "daphne", "Daphne"),
]


@dataclass(frozen=True)
class Row:
    """A line of the contract.

    :ivar number: of the line; 99 of what is not one of the contract
    :ivar text: for the page
    :ivar check: raises if it does not hold
    :ivar protocol: the only one where it can be asked for, if there is one
    :ivar stops: whether the check stops the server
    """

    name: str
    number: int
    text: str
    check: Callable[[Cell], None]
    protocol: Protocol | None = None
    stops: bool = False

    def __str__(self) -> str:
        return f"{self.text} ({self.protocol})" if self.protocol else self.text


@dataclass(frozen=True)
class Difference:
    """Where a line is known not to hold, or to hold only in silence of something.

    :ivar rows: their names
    :ivar columns: likewise
    :ivar reason: a sentence for the page
    :ivar says: a regular expression of what is said there, against the line that nothing is; else all of it holds
    :ivar shown: on the page
    :ivar tried: whether it is tried all the same; without ``says`` it must fail
    """

    rows: Sequence[str]
    columns: Sequence[str]
    reason: str
    layers: Sequence[int] = LAYERS
    says: str = ""
    shown: str = ""
    tried: bool = True

    @property
    def mark(self) -> str:
        return self.shown or (HOLDS if self.says else FAILS)


Place: TypeAlias = tuple[str, int, str]
"""A cell: the name of its column, the layers, and the name of its row."""


class Matrix:
    """What there is to try, and what has come out.

    :ivar to_run: the server of a column can serve all its lines in this order
    :ivar as_told: what came out as it is told
    """

    def __init__(
        self, rows: Sequence[Row], differences: Iterable[Difference], columns: Sequence[Column] = COLUMNS
    ) -> None:
        self.rows = {row.name: row for row in rows}
        self.columns = {column.name: column for column in columns}
        in_order = sorted(rows, key=lambda row: row.stops)
        places = [
            (column.name, layers, row.name)
            for column, layers, row in product(columns, LAYERS, in_order)
            if row.protocol in (None, column.protocol)
        ]
        self.differences: dict[Place, Difference] = {}
        for difference in differences:
            for place in product(difference.columns, difference.layers, difference.rows):
                if place not in places:
                    raise ValueError(f"{place}: there is no such cell")
                if place in self.differences:
                    raise ValueError(f"{place} is told twice")
                self.differences[place] = difference
        self.to_run = [place for place in places if place not in self.differences or self.differences[place].tried]
        self.as_told: set[Place] = set()

    def is_complete(self) -> bool:
        """Whether all that is to be tried was, and came out as it is told."""
        return self.as_told == set(self.to_run)

    def told(self) -> str:
        """All of it, in Markdown."""
        notes: list[str] = []
        in_order = sorted(self.rows.values(), key=lambda row: row.number)
        shown = {row: [self._shown(row, column, notes) for column in self.columns.values()] for row in in_order}
        same = [row for row, marks in shown.items() if {*marks} <= {HOLDS, NOTHING}]
        others = [row for row in shown if row not in same]
        alike: dict[tuple[str, ...], list[str]] = {}  # columns that read the same
        for number, column in enumerate(self.columns.values()):
            alike.setdefault(tuple(shown[row][number] for row in others), []).append(column.title)
        lines = ["The same everywhere:"]
        for section, rows in groupby(same, _section):
            lines += ["", f"**{section}**", "", *(f"- {row}" for row in rows)]
        lines += ["", f"Not the same ({LEGEND}):", "", _cells(["", *map("<br>".join, alike.values())])]
        lines += [_cells(["---"] * (len(alike) + 1))]
        number = 0
        for section, rows in groupby(others, _section):
            lines += [_cells([f"**{section}**", *[""] * len(alike)])]
            for row in rows:
                lines += [_cells([str(row), *(marks[number] for marks in alike)])]
                number += 1
        return "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, 1))])

    def _shown(self, row: Row, column: Column, notes: list[str]) -> str:
        if row.protocol not in (None, column.protocol):
            return NOTHING
        shown = []
        for layers in LAYERS:
            difference = self.differences.get((column.name, layers, row.name))
            if difference is None:
                shown.append(HOLDS)
                continue
            if difference.reason not in notes:
                notes.append(difference.reason)
            shown.append(f"{difference.mark} {notes.index(difference.reason) + 1}")
        return " / ".join(dict.fromkeys(shown))


def _section(row: Row) -> str:
    return next(name for name, last in SECTIONS.items() if row.number <= last)


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


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


def is_pinned(constraints: str) -> bool:
    """Whether what is installed is what ``constraints`` pins: the page tells of nothing else."""
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", constraints.lower(), re.M))
    try:
        return all(version(name) == pins.get(name.lower()) for name in MEASURED)
    except PackageNotFoundError:
        return False


def written(page: str, matrix: Matrix) -> str:
    """``page`` with all of it in its place."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    versions = ", ".join(f"{called} {version(name)}" for name, called in MEASURED.items())
    return f"{before}{BEGIN}\n\n{matrix.told()}\n\nMeasured with {versions}.\n\n{END}{after}"
