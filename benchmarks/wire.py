"""What the protection of a JSON route costs behind a real server, under wrk."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from signal import SIGCONT, SIGSTOP
from time import sleep

from .apps import BARE, OURS, PEERS_MISSING, VARIANTS
from .harness import BASE, Ratio, Section, at_least, ratio, shown, typical
from .server import CORES, SERVER, Server

CONNECTIONS = 16
CROWD = 256
TURN = 0.05  # seconds
ROWS = [
    ("never waits", "/never", VARIANTS, CONNECTIONS),
    ("waits for one turn of the loop, `sleep(0)`", "/turn", VARIANTS, CONNECTIONS),
    ("waits for a timer, `sleep(0.001)`", "/sleep", [*VARIANTS, BARE], CONNECTIONS),
    ("waits for a timer, `sleep(0.02)`", "/sleep-long", [*VARIANTS, BARE], CONNECTIONS),
    (f"the same with {CROWD} connections", "/sleep-long", [*VARIANTS, BARE], CROWD),
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
        all_servers = {variant: stack.enter_context(Server(variant)) for variant in [*VARIANTS, BARE]}
        for what, path, variants, connections in ROWS:
            servers = {variant: all_servers[variant] for variant in variants}
            rounds = [cpu_a_request(servers, path, connections) for _ in range(4 if quick else 13)]
            costs = {name: [each[name] for each in rounds[1:]] for name in servers}  # the first one warms up
            for who, mine in costs.items():
                if who == OURS:
                    section.rows.append(at_least(what, who, rate(mine, costs[BASE]), 0.90))
                elif who != BASE:
                    section.rows.append(shown(what, who, rate(mine, costs[BASE])))
            section.notes.append(f"{what}: plain = {1 / typical(costs[BASE]):,.0f} per CPU-second on this machine.")
    return section


def rate(costs: list[float], base: list[float]) -> Ratio:
    return ratio(base, costs)


def cpu_a_request(servers: Mapping[str, Server], path: str, connections: int) -> dict[str, float]:
    """CPU seconds of each server for one request.

    All are asked during the same seconds, by wrk on the other core, and take turns of ``TURN``: long enough for a
    server to have its core's caches to itself, short enough for the machine to be as fast for the one as for the other.
    """
    before = {name: server.cpu() for name, server in servers.items()}
    at_work = {name: _wrk(server, path, connections, seconds=len(servers)) for name, server in servers.items()}
    while any(wrk.poll() is None for wrk in at_work.values()):
        for server in servers.values():
            for each in servers.values():
                os.kill(each.pid, SIGCONT if each is server else SIGSTOP)
            sleep(TURN)
    costs = {}
    for name, server in servers.items():
        os.kill(server.pid, SIGCONT)
        said, _ = at_work[name].communicate()
        found = re.search(r"(\d+) requests in", said)
        assert found and "Non-2xx" not in said, said + server.log
        costs[name] = (server.cpu() - before[name]) / int(found[1])
    return costs


def _wrk(server: Server, path: str, connections: int, seconds: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", f"http://127.0.0.1:{server.port}{path}"],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=partial(os.sched_setaffinity, 0, CORES[-1:]),
    )
