"""The contract on every server, behind 0 and 5 BaseHTTPMiddleware: a full run writes its part of docs/servers.md."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastapi_cancel.testing import LiveServerError

from .matrix import PAGE, ROOT, Difference, Matrix, Place, is_pinned, written
from .matrix_cell import Cell, Servers
from .matrix_rows import ROWS

DEADLINE = 6.0  # seconds: for what must happen; reached only by a bug
BRIEF = 1.0  # seconds: for what is known not to happen

DIFFERENCES: list[Difference] = []
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


@pytest.mark.parametrize("place", MATRIX.to_run, ids=lambda place: "-".join(map(str, place)))
def test_line(servers: Servers, place: Place) -> None:
    """A line of the contract holds, or does not hold where that is known."""
    name, layers, row = place
    column, line = MATRIX.columns[name], MATRIX.rows[row]
    difference = MATRIX.differences.get(place)
    may_say = difference.says if difference is not None else ""
    must_fail = difference is not None and not may_say
    as_new = False
    try:
        live = servers.get(column.server, layers)
        with Cell(live, layers, column.protocol == "HTTP/2", BRIEF if must_fail else DEADLINE, may_say) as cell:
            line.check(cell)
            cell.assert_over()
        as_new = not line.stops
    except ImportError as exc:
        pytest.skip(str(exc))
    except (AssertionError, OSError, LiveServerError):
        if not must_fail:
            raise
    else:
        assert not must_fail, f"holds now: {difference}"
    finally:
        if not as_new:
            servers.end()
    MATRIX.as_told.add(place)
