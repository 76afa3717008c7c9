"""From the client's RST to the end of the cleanup."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from .apps import CLEANUP, MIDDLEWARE, OURS, PEERS, PEERS_MISSING
from .harness import BASE, Row, Section, at_most
from .server import SERVER, Server, many_sockets

CLIENTS = 5
STREAMS = 1_000
PATIENCE = 0.3  # seconds, with peers: what has not been cleaned up by then counts as never

# name: (variant, path, a budget applies)
CASES: dict[str, tuple[str, str, bool]] = {
    "handler on a CancellableRoute": (OURS, "/hold", True),
    "CancellableStreamingResponse": (BASE, "/cancellable-idle", True),
    "CancellableStreamingResponse on a CancellableRoute": (OURS, "/cancellable-idle", True),
    "StreamingResponse on a CancellableRoute": (OURS, "/idle", True),
    "plain handler": (BASE, "/hold", False),
    "plain StreamingResponse": (BASE, "/idle", False),
    **(
        {
            "handler, fastapi-disconnect middleware": (MIDDLEWARE, "/hold", False),
            "StreamingResponse, fastapi-disconnect middleware": (MIDDLEWARE, "/idle", False),
        }
        if PEERS
        else {}
    ),
}


def run(quick: bool) -> Section:
    section = Section(
        "Drop → cleanup finished",
        f"{SERVER}; clients leave with a RST; ms beyond the cleanup's own {CLEANUP * 1000:.0f} ms, the last of "
        f"{CLIENTS} clients, median of the rounds.",
        notes=[PEERS_MISSING] if PEERS_MISSING else [],
    )
    many_sockets()
    for layers in (0, 5):
        what = f"{CLIENTS} clients, {layers} `BaseHTTPMiddleware`"
        with served(layers) as servers:
            for who, (variant, path, ours) in CASES.items():
                rounds = (3 if quick else 10) if ours else 1
                drops = [drop(servers[variant], path, CLIENTS, 5 if ours else PATIENCE) for _ in range(rounds)]
                section.rows.append(row(what, who, drops, ours))
            if layers == 0:
                section.rows += [_at_once(servers[variant], who, path) for who, (variant, path, _) in _many().items()]
    section.rows.sort(key=lambda row: "at once" in row.what)
    return section


def _many() -> dict[str, tuple[str, str, bool]]:
    return {name: case for name, case in CASES.items() if case[2] or name == "plain StreamingResponse"}


@contextmanager
def served(layers: int) -> Iterator[dict[str, Server]]:
    with ExitStack() as stack:
        yield {variant: stack.enter_context(Server(variant, layers)) for variant in {c[0] for c in CASES.values()}}


class Drop:
    """What came of some clients that left.

    :ivar cleaned: how many cleanups ran to their end
    :ivar seconds: from the first client's leaving to the end of the last cleanup
    :ivar late: of a client, the longest that its cleanup took beyond its own time
    :ivar tasks: that were left over
    """

    def __init__(self, cleaned: int, clients: int, seconds: float, late: float, tasks: int) -> None:
        self.cleaned, self.clients = cleaned, clients
        self.seconds, self.late, self.tasks = seconds, late, tasks

    @property
    def complete(self) -> bool:
        return self.cleaned == self.clients


def drop(server: Server, path: str, clients: int, patience: float) -> Drop:
    """Connect so many clients, let all leave, and wait until all cleanups are finished."""
    server.json("/reset")
    tasks = server.json("/stats")["tasks"]
    connected = [server.open(path) for _ in range(clients)]
    while server.json("/stats")["started"] < clients:
        time.sleep(0.005)
    if "idle" in path:
        for client in connected:
            client.until(b"\r\n\r\n")
    left = [client.abort() for client in connected]
    end = time.monotonic() + patience
    stats = server.json("/stats")
    while (len(stats["finished"]) < clients or stats["tasks"] > tasks) and time.monotonic() < end:
        time.sleep(0.01)
        stats = server.json("/stats")
    finished = sorted(stats["finished"])
    late = max((there - then for there, then in zip(finished, left, strict=False)), default=0.0) - CLEANUP
    last = finished[-1] if finished else left[0]
    return Drop(len(finished), clients, last - left[0], late, stats["tasks"] - tasks)


def row(what: str, who: str, drops: list[Drop], ours: bool) -> Row:
    worst = min(drops, key=lambda one: one.cleaned)
    if not worst.complete:
        budget = f"{worst.clients} cleanups" if ours else ""
        return Row(what, who, f"{worst.cleaned} of {worst.clients} cleanups", budget, "over" if ours else "")
    late = statistics.median(one.late for one in drops) * 1000
    return at_most(what, who, late, 10, " ms") if ours else Row(what, who, f"{late:.2f} ms")


def _at_once(server: Server, who: str, path: str) -> Row:
    ours = who != "plain StreamingResponse"
    one = drop(server, path, STREAMS, 5 if ours else 1)
    measured = f"{one.cleaned:,} of {STREAMS:,} cleanups, {one.tasks} tasks left"
    if one.complete:
        measured += f", {one.seconds:.2f} s"
    good = one.complete and one.tasks <= 0 and one.seconds <= 0.5
    kind = "waiting handlers" if path == "/hold" else "idle streams"
    return Row(
        f"{STREAMS:,} {kind} at once",
        who,
        measured,
        "all, 0 tasks, ≤ 0.5 s" if ours else "",
        ("PASS" if good else "over") if ours else "",
    )
