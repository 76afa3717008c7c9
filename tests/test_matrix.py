"""The contract on every server, behind 0 and 5 BaseHTTPMiddleware: a full run writes its part of docs/servers.md."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastapi_cancel.testing import LiveServerError

from .matrix import NOTHING, PAGE, ROOT, Difference, Matrix, Place, is_pinned, written
from .matrix_cell import Cell, Servers
from .matrix_rows import ROWS

DEADLINE = 20.0  # seconds: for what must happen; reached only by a bug
BRIEF = 1.0  # seconds: for what is known not to happen

UVICORN = ["uvicorn", "uvicorn-h11", "uvicorn-uvloop", "gunicorn-uvicorn"]
HYPERCORN = ["hypercorn", "hypercorn-trio", "hypercorn-http2"]
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
        ["gunicorn", *GRANIAN],
        "gunicorn and Granian do not wait at SIGTERM for work whose client has left.",
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
