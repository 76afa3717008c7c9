"""What the protection of a JSON route costs behind a real server, under wrk."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from contextlib import ExitStack
from functools import partial

from .apps import OURS, PEERS_MISSING, ROUTES, VARIANTS
from .harness import BASE, Ratio, Section, at_least, interleave, ratio, shown, typical
from .server import CORES, SERVER, Server

CONNECTIONS = 16
ROWS = [
    ("never waits", "/never"),
    ("waits for one turn of the loop, `sleep(0)`", "/turn"),
    ("waits for a timer, `sleep(0.001)`", "/sleep"),
]


def run(quick: bool) -> Section:
    section = Section(
        f"A JSON route, through {SERVER}",
        "Requests per CPU-second of the server under wrk, relative to the same route on plain FastAPI.",
    )
    if shutil.which("wrk") is None:
        section.notes.append("wrk is not installed: these rows are left out.")
        return section
    if PEERS_MISSING:
        section.notes.append(PEERS_MISSING)
    with ExitStack() as stack:
        measured = ROUTES if quick else VARIANTS
        servers = {variant: stack.enter_context(Server(variant)) for variant in measured}
        for what, path in ROWS:
            variants = {name: partial(cpu_a_request, server, path) for name, server in servers.items()}
            costs = interleave(variants, rounds=2 if quick else 9, warm=0 if quick else 1)
            for who, mine in costs.items():
                if who == OURS:
                    section.rows.append(at_least(what, who, rate(mine, costs[BASE]), 0.90))
                elif who != BASE:
                    section.rows.append(shown(what, who, rate(mine, costs[BASE])))
            section.notes.append(f"{what}: plain = {1 / typical(costs[BASE]):,.0f} per CPU-second on this machine.")
    return section


def rate(costs: list[float], base: list[float]) -> Ratio:
    return ratio(base, costs)


def cpu_a_request(server: Server, path: str) -> float:
    """CPU seconds of the server for one request, from one second of wrk on the other core."""
    before = server.cpu()
    done = subprocess.run(
        ["wrk", "-t1", f"-c{CONNECTIONS}", "-d1s", f"http://127.0.0.1:{server.port}{path}"],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=partial(os.sched_setaffinity, 0, CORES[-1:]),
    )
    after = server.cpu()
    found = re.search(r"(\d+) requests in", done.stdout)
    assert found and "Non-2xx" not in done.stdout, done.stdout + server.log
    return (after - before) / int(found[1])
