"""What an event of an ``SSEResponse`` costs, what an idle stream holds, and how fast many of them are gone."""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import NamedTuple

from .apps import CLEANUP, OURS
from .asgi import answer, cpu_of
from .drops import CLIENTS, PATIENCE, drop, row
from .feeds import ENCODED, build
from .harness import BASE, Row, Section, at_least, at_most, interleave, on_one_core, ratio, shown, typical
from .server import CORES, SERVER, Server, many_sockets
from .streams import IDLE, SERVED_CHUNKS, cpu_a_chunk, idle_stream

EVENTS = 2_000
CROWD = 10_000
PING = 2  # seconds between two heartbeats of the crowd
WINDOW = 2 * PING

RESPONSE, ROUTED = "SSEResponse", "SSEResponse on a CancellableRoute"
PEER, NATIVE, RAW = "sse-starlette", "FastAPI native", "a raw `StreamingResponse`"
CASES: dict[str, tuple[str, str]] = {  # name: (variant of the application, path)
    RESPONSE: (BASE, "/ours"),
    ROUTED: (OURS, "/ours"),
    PEER: (BASE, "/sse-starlette"),
    NATIVE: (BASE, "/native"),
    RAW: (BASE, "/raw"),
}


class Feed(NamedTuple):
    """Events that are compared.

    :ivar content: what ours yields, and sse-starlette; the raw response yields bytes, FastAPI its own event
    :ivar peers: whom ours is compared with: how many times their events per CPU-second are the budget
    """

    what: str
    pace: str
    content: str
    peers: dict[str, float | None]

    def path(self, who: str, events: int) -> str:
        content = {NATIVE: "model", RAW: "bytes"}.get(who, self.content)
        return f"{CASES[who][1]}/{self.pace}?content={content}&events={events}"


PACES = [
    Feed("one event in each turn of the event loop", "turns", "event", {PEER: None, RAW: None}),
    Feed("a wait for each event", "waits", "event", {PEER: None, RAW: None}),
]
EVENT = "a `ServerSentEvent` with data, event and id"
IN_PROCESS = [
    Feed(EVENT, "burst", "event", {PEER: 2.5, NATIVE: 10, RAW: None}),
    Feed("a dict of these", "burst", "fields", {PEER: None, RAW: None}),
    Feed("a str", "burst", "text", {PEER: None}),
    Feed("FastAPI's `ServerSentEvent`", "burst", "model", {NATIVE: None}),
    *PACES,
]
SERVED = [Feed(EVENT, "burst", "event", {PEER: 3, NATIVE: None, RAW: 1.5}), *PACES]


@on_one_core()
def in_process(quick: bool) -> Section:
    section = Section(
        "Server-sent events, in process",
        f"Events per CPU-second, {EVENTS:,} events from an async generator, as a multiple of the peer's. All send the "
        "same fields; the raw response is given the bytes.",
    )
    apps = {variant: build(variant) for variant, _ in CASES.values()}
    with asyncio.Runner() as runner:  # which ends what sse-starlette leaves running
        loop = runner.get_loop()
        for feed in IN_PROCESS:
            for who in [RESPONSE, ROUTED, *feed.peers]:
                sent = answer(loop, apps[CASES[who][0]], feed.path(who, 3))
                body = b"".join(message.get("body", b"") for message in sent)
                assert body == 3 * ENCODED or (who == NATIVE and body.count(b"\n\n") == 3) or feed.content == "text", (
                    body
                )
            costs = interleave(
                {
                    who: partial(cpu_of, loop, apps[CASES[who][0]], feed.path(who, EVENTS), 1)
                    for who in [RESPONSE, ROUTED, *feed.peers]
                },
                rounds=10 if quick else 60,
                warm=3,
            )
            _compare(section, feed, costs)
            each = ", ".join(f"{who} {typical(mine) / EVENTS * 1e6:.2f} µs" for who, mine in costs.items())
            section.notes.append(f"{feed.what}: {each} on this machine.")
    return section


def served(quick: bool) -> Section:
    section = Section(
        f"Server-sent events, through {SERVER}",
        f"Events per CPU-second of the server, {SERVED_CHUNKS:,} events to a raw socket, as a multiple of the peer's.",
    )
    with _servers(0) as servers:
        for feed in SERVED:
            costs = interleave(
                {
                    who: partial(cpu_a_chunk, servers[who], feed.path(who, SERVED_CHUNKS))
                    for who in [RESPONSE, ROUTED, *feed.peers]
                },
                rounds=3 if quick else 10,
            )
            _compare(section, feed, costs)
            each = ", ".join(f"{who} {1 / typical(mine):,.0f}" for who, mine in costs.items())
            section.notes.append(f"{feed.what}: {each} per CPU-second on this machine.")
    return section


def _compare(section: Section, feed: Feed, costs: dict[str, list[float]]) -> None:
    for who in (RESPONSE, ROUTED):
        for peer, budget in feed.peers.items():
            value, name = ratio(costs[peer], costs[who]), f"{who}, against {peer}"
            section.rows.append(
                shown(feed.what, name, value) if budget is None else at_least(feed.what, name, value, budget)
            )


def idle(quick: bool) -> Section:
    count = IDLE // 4 if quick else IDLE
    section = Section(
        "An idle event stream",
        f"{count:,} at once, in process: tasks, and memory by tracemalloc, relative to {RAW}.",
    )
    found = {who: idle_stream(build(variant), _idle(who), count) for who, (variant, _) in CASES.items()}
    for who, (tasks, _) in found.items():
        what, ours = "extra tasks a stream", who in (RESPONSE, ROUTED)
        section.rows.append(at_most(what, who, tasks, 1, "") if ours else shown(what, who, tasks, ""))
    raw = found[RAW][1]
    for who, (_, size) in found.items():
        what, ours = "memory", who in (RESPONSE, ROUTED)
        if who != RAW:
            section.rows.append(at_most(what, who, size / raw, 1.1) if ours else shown(what, who, size / raw))
    section.notes.append(f"{RAW} = {raw / 1024:.1f} KiB a stream, with FastAPI's own state and the scope.")
    return section


def drops(quick: bool) -> Section:
    section = Section(
        "Event stream dropped → cleanup finished",
        f"{SERVER}; clients leave with a RST; ms beyond the cleanup's own {CLEANUP * 1000:.0f} ms, the last of "
        f"{CLIENTS} clients, median of the rounds.",
    )
    for layers in (0, 5):
        with _servers(layers) as servers:
            for who, server in servers.items():
                ours = who in (RESPONSE, ROUTED)
                rounds = (3 if quick else 10) if ours else 1
                patience = 5 if ours else PATIENCE
                dropped = [drop(server, _idle(who), CLIENTS, patience) for _ in range(rounds)]
                section.rows.append(row(f"{CLIENTS} clients, {layers} `BaseHTTPMiddleware`", who, dropped, ours))
    return section


def crowd(quick: bool) -> Section:
    count = CROWD // 10 if quick else CROWD
    section = Section(
        f"{count:,} idle event streams, through {SERVER}",
        f"All on one server, over sockets that do not read, a heartbeat every {PING} s. Memory is what the server's "
        f"process grows by; heartbeats are counted by the clients, within {WINDOW} s.",
    )
    many_sockets()
    rounds: dict[str, list[Stay]] = {who: [] for who in (RESPONSE, PEER, RAW)}
    with _servers(0) as servers:
        for number in range(2 if quick else 3):
            for who, stays in rounds.items():
                if who != RAW or number == 0:
                    stays.append(_stay(servers[who], who, count))
    raw = rounds.pop(RAW)[0]
    for who, stays in rounds.items():  # in the first round: what a process has grown to, it keeps
        section.rows.append(shown("memory", who, stays[0].memory / raw.memory))
    section.notes.append(f"memory: {RAW} = {raw.memory / count / 1024:.1f} KiB a stream, with its connection.")
    for who, stays in {**rounds, RAW: [raw]}.items():
        section.rows.append(shown("tasks a stream", who, stays[0].tasks / count, ""))
    for who, stays in rounds.items():
        if who != PEER:
            value = ratio([stay.cpu for stay in rounds[PEER]], [stay.cpu for stay in stays])
            section.rows.append(shown("heartbeats per CPU-second", f"{who}, against {PEER}", value))
    each = ", ".join(f"{who} {typical([s.cpu for s in stays]) * 10_000:.2f} s" for who, stays in rounds.items())
    section.notes.append(f"CPU of 10,000 heartbeats: {each} on this machine.")
    for who, stays in {**rounds, RAW: [raw]}.items():
        section.rows.append(_dropped(who, stays, count))
    return section


class Stay(NamedTuple):
    """What came of a crowd of idle streams.

    :ivar memory: bytes that the server grew by
    :ivar tasks: that it had more
    :ivar cpu: seconds a heartbeat
    :ivar cleaned: how many cleanups ran to their end
    :ivar left: tasks that were left over
    :ivar seconds: from the first client's leaving to the end of the last cleanup
    """

    memory: int
    tasks: int
    cpu: float
    cleaned: int
    left: int
    seconds: float


def _stay(server: Server, who: str, count: int) -> Stay:
    ours = who in (RESPONSE, ROUTED)
    server.json("/reset")
    memory, before = server.memory(), server.json("/crowd")["tasks"]
    sockets = _connect(server, f"{_idle(who)}&ping={PING}", count)
    memory, tasks = server.memory() - memory, server.json("/crowd")["tasks"] - before
    _heartbeats(sockets)
    cpu = server.cpu()
    if who != RAW:
        time.sleep(WINDOW)
    cpu = (server.cpu() - cpu) / max(1, _heartbeats(sockets))
    begin = time.monotonic()
    for each in sockets:
        each.close()
    end = begin + (20 if ours else 3)
    state = server.json("/crowd")
    while (state["finished"] < count or state["tasks"] > before) and time.monotonic() < end:
        time.sleep(0.05)
        state = server.json("/crowd")
    return Stay(memory, tasks, cpu, state["finished"], state["tasks"] - before, max(0.0, state["last"] - begin))


def _connect(server: Server, path: str, count: int) -> list[socket.socket]:
    request = f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    sockets: list[socket.socket] = []
    while len(sockets) < count:
        for _ in range(min(500, count - len(sockets))):  # no more than its backlog takes
            connection = socket.create_connection(("127.0.0.1", server.port), 20)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # leaves with a RST
            connection.sendall(request)
            connection.setblocking(False)
            sockets.append(connection)
        while server.json("/crowd")["started"] < len(sockets):
            time.sleep(0.01)
    return sockets


def _heartbeats(sockets: list[socket.socket]) -> int:
    """How many have arrived."""
    found = 0
    for connection in sockets:
        with suppress(BlockingIOError):
            while received := connection.recv(65536):
                found += received.count(b": ping")
    return found


def _dropped(who: str, stays: list[Stay], count: int) -> Row:
    ours = who in (RESPONSE, ROUTED)
    cleaned, left = min(stay.cleaned for stay in stays), max(stay.left for stay in stays)
    seconds = statistics.median(stay.seconds for stay in stays)
    measured = f"{cleaned:,} of {count:,} cleanups, {left:,} tasks left"
    if cleaned == count:
        measured += f", {seconds:.2f} s"
    good = cleaned == count and left <= 0 and seconds <= 5
    budget, verdict = ("all, 0 tasks, ≤ 5 s", "PASS" if good else "over") if ours else ("", "")
    return Row("dropped at once", who, measured, budget, verdict)


def _idle(who: str) -> str:
    content = {NATIVE: "model", RAW: "bytes"}.get(who, "event")
    return f"{CASES[who][1]}/idle?content={content}"


@contextmanager
def _servers(layers: int) -> Iterator[dict[str, Server]]:
    """One for each of ``CASES``, through which one stream has gone. We keep to another core meanwhile."""
    with ExitStack() as stack:
        servers = {
            who: stack.enter_context(Server(case[0], layers, "benchmarks.feeds:served")) for who, case in CASES.items()
        }
        for who, server in servers.items():
            assert server.get(Feed("", "burst", "event", {}).path(who, 1))[0] == 200
        os.sched_setaffinity(0, CORES[-1:])
        try:
            yield servers
        finally:
            os.sched_setaffinity(0, CORES)
