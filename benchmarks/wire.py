"""What the protection of a JSON route costs behind a real server, under wrk."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from signal import SIGCONT, SIGINT, SIGSTOP
from time import sleep

from .apps import BARE, OURS, PEERS_MISSING, VARIANTS
from .harness import BASE, Ratio, Section, at_least, ratio, shown, typical
from .server import CORES, SERVER, Server

CONNECTIONS = 16
CROWD = 64
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
            costs = cpu_a_request(servers, path, connections, rounds=3 if quick else 12)
            for who, mine in costs.items():
                if who == OURS:
                    section.rows.append(at_least(what, who, rate(mine, costs[BASE]), 0.90))
                elif who != BASE:
                    section.rows.append(shown(what, who, rate(mine, costs[BASE])))
            section.notes.append(f"{what}: plain = {1 / typical(costs[BASE]):,.0f} per CPU-second on this machine.")
    return section


def rate(costs: list[float], base: list[float]) -> Ratio:
    return ratio(base, costs)


def cpu_a_request(servers: Mapping[str, Server], path: str, connections: int, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each server for one request, in each round.

    All are asked during the same seconds, by wrk on the other core, and take turns of ``TURN``: long enough for a
    server to have its core's caches to itself, short enough for the machine to be as fast for the one as for the other.
    Nobody comes or leaves within a round: whoever leaves in the middle of a request costs what a drop costs.
    """
    costs: dict[str, list[float]] = {name: [] for name in servers}
    with ExitStack() as stack:
        for server in servers.values():
            stack.enter_context(_asked(server, path, connections, seconds=2 * len(servers) * (rounds + 1)))
        _take_turns(servers.values())  # to warm up
        for _ in range(rounds):
            before = _costs(servers)
            _take_turns(servers.values())
            for name, (cpu, answered) in _costs(servers).items():
                costs[name].append((cpu - before[name][0]) / (answered - before[name][1]))
    return costs


@contextmanager
def _asked(server: Server, path: str, connections: int, seconds: int) -> Iterator[None]:
    """Have it asked by wrk, for so many seconds at most."""
    wrk = subprocess.Popen(
        ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", f"http://127.0.0.1:{server.port}{path}"],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=partial(os.sched_setaffinity, 0, CORES[-1:]),
    )
    try:
        yield
        assert wrk.poll() is None, "it has not asked to the end"
    finally:
        os.kill(server.pid, SIGCONT)
        wrk.send_signal(SIGINT)
        said, _ = wrk.communicate()
    assert "requests in" in said and "Non-2xx" not in said, said + server.log


def _take_turns(servers: Collection[Server]) -> None:
    """Have each of them run for a second, in all."""
    for _ in range(round(1 / TURN)):
        for server in servers:
            _only(server, servers)
            sleep(TURN)


def _costs(servers: Mapping[str, Server]) -> dict[str, tuple[float, int]]:
    costs = {}
    for name, server in servers.items():
        _only(server, servers.values())
        costs[name] = server.json("/cost")
    return costs


def _only(server: Server, servers: Collection[Server]) -> None:
    for each in servers:
        os.kill(each.pid, SIGCONT if each is server else SIGSTOP)
