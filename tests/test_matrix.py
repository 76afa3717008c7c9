"""The contract on every server, behind 0 and 5 BaseHTTPMiddleware: a full run writes its part of docs/servers.md."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest

from fastapi_cancel.testing import LiveServerError, ServedVisit

from .matrix import (
    BEGIN,
    END,
    LEGEND,
    MEASURED,
    NOTHING,
    PAGE,
    ROOT,
    Column,
    Difference,
    Matrix,
    Row,
    is_pinned,
    written,
)
from .matrix_cell import Cell, Servers
from .matrix_rows import ROWS

DEADLINE = 20.0  # seconds: for what must happen; reached only by a bug
BRIEF = 0.5  # seconds: for what is known not to happen

UVICORN = ["uvicorn", "uvicorn-h11", "uvicorn-uvloop", "gunicorn-uvicorn"]
GRANIAN = ["granian", "granian-rsgi", "granian-http2", "granian-rsgi-http2"]
GONE = (
    "The last `send` on an HTTP/2 stream or connection that has gone may never return on Hypercorn. We give it up "
    "after a second; `BaseHTTPMiddleware` waits for ever, though the work behind it has ended."
)

DIFFERENCES = [
    Difference(
        ["upload_cut", "upload_cut_behind_the_work"],
        ["daphne"],
        "Daphne starts the application once the whole body is in: one that is cut never gets that far.",
        shown=NOTHING,
        tried=False,
    ),
    Difference(["upload_back_pressure"], ["daphne"], "Daphne takes the whole body before it starts the application."),
    Difference(
        ["expect_refused"],
        ["hypercorn", "hypercorn-trio", "daphne"],
        "Hypercorn and Daphne answer `100 Continue` by themselves, before they start the application.",
    ),
    Difference(
        ["flood", "plain_flood", "sse_full_socket"],
        ["daphne"],
        "On Daphne no `send` ever waits: it buffers without limit what a client does not read.",
        shown=NOTHING,
        tried=False,
    ),
    Difference(
        ["stalled", "stalled_request", "sse_stalled", "sse_unwritten_heartbeat"],
        ["daphne"],
        "On Daphne no `send` ever waits, so `send_timeout` never comes.",
        tried=False,
    ),
    Difference(
        ["flood", "plain_flood"],
        ["hypercorn-http2"],
        "Over HTTP/2 Hypercorn buffers without limit what a stream has no credit for: only the last `send` waits.",
        shown=NOTHING,
        tried=False,  # a gigabyte a second
    ),
    Difference(
        ["stalled", "stalled_request", "sse_unwritten_heartbeat"],
        ["hypercorn-http2"],
        "Over HTTP/2 Hypercorn buffers without limit what a stream has no credit for, "
        "so `send_timeout` does not come before the last `send`.",
        tried=False,
    ),
    Difference(
        ["handler", "sigterm_during_cleanup"],
        ["hypercorn-http2"],
        GONE,
        layers=[5],
    ),
    Difference(
        ["sse_heartbeats", "sse_burst", "sse_full_socket", "sse_stalled"],
        ["hypercorn-http2"],
        GONE,
        layers=[5],
        tried=False,  # it depends on what is on its way
    ),
    Difference(
        ["forced"],
        ["hypercorn-trio"],
        "Trio cancels each `await` anew: a cleanup hangs only under a shield, and that is never broken.",
        shown=NOTHING,
        tried=False,
    ),
    Difference(
        ["access_log"],
        [*UVICORN, "daphne"],
        "uvicorn and Daphne log no request whose client left before the response began.",
    ),
    Difference(
        ["access_log"], ["gunicorn"], "gunicorn says 500 of a request whose client left before the response began."
    ),
    Difference(
        ["sigterm_during_cleanup"],
        ["daphne"],
        "Daphne cancels everything at SIGTERM, cleanups that run included; behind `BaseHTTPMiddleware` AnyIO "
        "keeps that from them.",
        layers=[0],
    ),
    Difference(
        ["farewell"],
        ["daphne"],
        "Daphne cancels everything at SIGTERM, and ends as soon as the first of it has ended.",
    ),
    Difference(
        ["farewell"],
        ["hypercorn-http2"],
        "Over HTTP/2 Hypercorn closes the connection behind the farewell, without ending the streams.",
    ),
    Difference(
        ["stalled", "stalled_request", "sse_stalled", "sse_unwritten_heartbeat"],
        [*UVICORN, "gunicorn", "granian-rsgi", "granian-rsgi-http2"],
        "An error is logged, that the response was not completed: it cannot be, for a client that does not read.",
        layers=[0],
        says="without completing",
    ),
    Difference(
        ["stalled", "stalled_request", "sse_stalled", "sse_unwritten_heartbeat"],
        ["hypercorn-trio"],
        "On Trio Hypercorn shields its own `send`: it ends when the client reads or leaves.",
        layers=[0],
    ),
    Difference(
        ["stalled_request"],
        [*UVICORN, "gunicorn", "hypercorn", "hypercorn-trio", *GRANIAN],
        "The `send` of a `BaseHTTPMiddleware` ends when the client reads or leaves, though the work behind it has "
        "ended.",
        layers=[5],
    ),
    Difference(
        [
            *("flood", "plain_flood", "greedy", "stalled"),
            *("sse_burst", "sse_full_socket", "sse_stalled", "sse_unwritten_heartbeat"),
        ],
        ["hypercorn"],
        "asyncio may warn that `socket.send() raised exception`: the news that the client has left takes some turns of "
        "the event loop through each `BaseHTTPMiddleware`, and Hypercorn writes what comes out of them meanwhile.",
        layers=[5],
        says=r"socket\.send\(\) raised exception",
    ),
]
MATRIX = Matrix(ROWS, DIFFERENCES)


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with Servers() as servers:
        yield servers


@pytest.fixture(scope="module", autouse=True)
def page() -> Iterator[None]:
    """Write it once all is known."""
    yield
    if MATRIX.is_complete() and is_pinned((ROOT / "constraints.txt").read_text()):
        before = PAGE.read_text()
        if (after := written(before, MATRIX)) != before:
            PAGE.write_text(after)


@pytest.mark.parametrize(("server", "layers", "line"), MATRIX.to_run)
def test_line(servers: Servers, server: str, layers: int, line: str) -> None:
    """A line of the contract holds, or does not hold where that is known."""
    place = server, layers, line
    column, row = MATRIX.columns[server], MATRIX.rows[line]
    difference = MATRIX.differences.get(place)
    may_say = difference.says if difference is not None else ""
    must_fail = difference is not None and not may_say
    try:
        live = servers.get(column.server, layers, column.options)
    except ImportError as exc:
        pytest.skip(str(exc))
    holds = False
    cell = Cell(live, layers, column.protocol == "HTTP/2", BRIEF if must_fail else DEADLINE, may_say)
    try:
        with cell:
            row.check(cell)
            cell.assert_over()
        holds = True
    except (AssertionError, OSError, LiveServerError):
        if not must_fail:
            raise
    finally:
        if row.stops or not (holds or is_free(cell)):
            servers.end()
    assert holds != must_fail, f"holds now: {difference}"
    MATRIX.as_told.add(place)


def is_free(cell: Cell) -> bool:
    """Whether what has failed has left no request behind, nor on its way."""
    cell.live.deadline = BRIEF
    try:
        cell.over()
    except (AssertionError, OSError, LiveServerError):
        return False
    return True


# -- the matrix itself ---------------------------------------------------------------------------


def test_the_page_tells_what_is_told_here() -> None:
    """If this fails, the page is written at the end of a full run that is as it should be: look at it."""
    assert MATRIX.told() in PAGE.read_text()


def nothing(cell: Cell) -> None: ...


SMALL = [
    Row("ends", 7, "it ends", nothing, stops=True),
    Row("begins", 1, "it begins", nothing),
    Row("resets", 99, "it resets", nothing, protocol="HTTP/2"),
]
TWO = [Column("a", "uvicorn", "A"), Column("b", "hypercorn", "B", "HTTP/2")]


def test_a_matrix_runs_server_by_server_and_stops_each_at_the_end() -> None:
    assert Matrix(SMALL, [Difference(["begins"], ["a"], "Why.", layers=[5], tried=False)], TWO).to_run == [
        *(("a", 0, "begins"), ("a", 0, "ends"), ("a", 5, "ends")),
        *(("b", 0, "begins"), ("b", 0, "resets"), ("b", 0, "ends")),
        *(("b", 5, "begins"), ("b", 5, "resets"), ("b", 5, "ends")),
    ]


def test_a_matrix_is_complete_once_all_came_out_as_told() -> None:
    matrix = Matrix(SMALL, [Difference(["begins"], ["a"], "Why.", tried=False)], TWO)
    for place in matrix.to_run:
        assert not matrix.is_complete()
        matrix.as_told.add(place)
    assert matrix.is_complete()


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        (Difference(["resets"], ["a"], "HTTP/1."), r"\('a', 0, 'resets'\): there is no such cell"),
        (Difference(["begins"], ["c"], "No column."), r"\('c', 0, 'begins'\): there is no such cell"),
        (Difference(["ends"], ["a", "b"], "Twice."), r"\('a', 5, 'ends'\) is told twice"),
    ],
)
def test_a_difference_belongs_to_one_cell_that_is_there(difference: Difference, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Matrix(SMALL, [Difference(["ends"], ["a"], "Why.", layers=[5]), difference], TWO)


class Late:
    """A server that has begun nothing but what the test itself has asked for."""

    deadline = 0.0

    def __init__(self) -> None:
        self.visits = [ServedVisit("1", "GET", "/stats", began=1, ended=2)]

    def json(self, path: str) -> dict[str, str]:
        return {}


def test_a_request_that_has_not_begun_is_not_over() -> None:
    """It would begin in the next cell."""
    live: Any = Late()
    cell = Cell(live, layers=0, http2=False, deadline=0)
    cell.opened = 1
    assert not is_free(cell)
    live.visits.append(ServedVisit("2", "GET", "/stalled", began=1))
    assert not is_free(cell)
    live.visits[1] = ServedVisit("2", "GET", "/stalled", began=1, ended=2)
    assert is_free(cell)


def test_a_matrix_in_markdown() -> None:
    differences = [
        Difference(["ends"], ["b"], "It goes on.", layers=[5]),
        Difference(["ends"], ["a"], "It murmurs.", layers=[0], says="hm"),
        Difference(["ends"], ["c"], "It knows no end.", shown=NOTHING),
    ]
    columns = [*TWO, Column("c", "daphne", "C"), Column("d", "granian", "D"), Column("e", "granian", "E")]
    assert Matrix(SMALL, differences, columns).told() == (
        "The same everywhere:\n"
        "\n"
        "**Detecting**\n"
        "\n"
        "- it begins\n"
        "\n"
        "**Policies**\n"
        "\n"
        "- it resets (HTTP/2)\n"
        "\n"
        f"Not the same ({LEGEND}):\n"
        "\n"
        "|  | A | B | C | D<br>E |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| **Ending** |  |  |  |  |\n"
        "| it ends | ✓ 1 / ✓ | ✓ / ✗ 2 | – 3 | ✓ |\n"
        "\n"
        "1. It murmurs.\n"
        "2. It goes on.\n"
        "3. It knows no end."
    )


def test_the_page_keeps_what_is_around_the_matrix() -> None:
    matrix = Matrix(SMALL, [], TWO)
    page = written(f"Before.\n{BEGIN}\nold\n{END}\nAfter.\n", matrix)
    assert re.fullmatch(
        rf"Before\.\n{BEGIN}\n\n{re.escape(matrix.told())}\n\nMeasured with uvicorn [^\n]+\.\n\n{END}\nAfter\.\n", page
    )
    assert written(page, matrix) == page


def test_the_page_tells_of_pinned_versions_only() -> None:
    installed = {name: version(name) for name in MEASURED}

    def is_pinned_by(pins: dict[str, str]) -> bool:
        return is_pinned("".join(f"{name}=={pin}\n" for name, pin in pins.items()))

    assert is_pinned_by(installed)
    assert not is_pinned_by({**installed, "uvicorn": "0.1"})
    assert not is_pinned_by({name: pin for name, pin in installed.items() if name != "trio"})
