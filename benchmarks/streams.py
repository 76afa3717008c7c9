"""What a chunk of a stream costs, and what an idle stream holds."""

from __future__ import annotations

import asyncio
import gc
import socket
import time
import tracemalloc
from contextlib import ExitStack
from functools import partial

from fastapi import FastAPI

from .apps import MIDDLEWARE, OURS, PEERS, PEERS_MISSING, ROUTES, build, started
from .asgi import Call, answer, cpu_of, discard
from .harness import BASE, Section, at_most, interleave, on_one_core, ratio, ratios, shown, typical
from .server import SERVER, Server

CHUNKS = 2_000
SERVED_CHUNKS = 20_000
IDLE = 2_000

# name: (variant of the application, path); the first of each is what the others are compared with
STREAMS: dict[str, tuple[str, str]] = {
    BASE: (BASE, "/stream"),
    "CancellableStreamingResponse": (BASE, "/cancellable-stream"),
    "CancellableStreamingResponse on a CancellableRoute": (OURS, "/cancellable-stream"),
    "StreamingResponse on a CancellableRoute": (OURS, "/stream"),
}
LINES: dict[str, tuple[str, str]] = {BASE: (BASE, "/lines"), "CancellableRoute": (OURS, "/lines")}
PEER: dict[str, tuple[str, str]] = {MIDDLEWARE: (MIDDLEWARE, "/stream")} if PEERS else {}
KINDS = {"a chunk of a `StreamingResponse`": {**STREAMS, **PEER}, "a JSON line of a `yield` endpoint": LINES}


@on_one_core()
def in_process(quick: bool) -> Section:
    section = Section(
        "Streaming, in process",
        f"CPU time a chunk, {CHUNKS:,} chunks from an async generator that never waits, relative to the plain one.",
        notes=[PEERS_MISSING] if PEERS_MISSING else [],
    )
    loop = asyncio.new_event_loop()
    apps = {variant: build(variant) for variant in [*ROUTES, *PEERS]}
    for what, kinds in KINDS.items():
        for variant, path in kinds.values():
            assert len(answer(loop, apps[variant], f"{path}?chunks=3")) == 5
        costs = interleave(
            {
                name: partial(cpu_of, loop, apps[variant], f"{path}?chunks={CHUNKS}", 1)
                for name, (variant, path) in kinds.items()
            },
            rounds=20 if quick else 150,
            warm=3,
        )
        section.rows += [shown(what, who, value) for who, value in ratios(costs).items()]
        section.notes.append(f"{what}: plain = {typical(costs[BASE]) / CHUNKS * 1e6:.2f} µs on this machine.")
    loop.close()
    return section


def served(quick: bool) -> Section:
    section = Section(
        f"Streaming, through {SERVER}",
        f"Chunks per CPU-second of the server, {SERVED_CHUNKS:,} chunks to a raw socket, relative to the plain one.",
    )
    with ExitStack() as stack:
        variants = {variant for kinds in KINDS.values() for variant, _ in kinds.values()}
        servers = {variant: stack.enter_context(Server(variant)) for variant in sorted(variants)}
        for what, kinds in KINDS.items():
            costs = interleave(
                {
                    name: partial(cpu_a_chunk, servers[variant], f"{path}?chunks={SERVED_CHUNKS}")
                    for name, (variant, path) in kinds.items()
                },
                rounds=2 if quick else 12,
            )
            for who, mine in costs.items():
                if who != BASE:
                    section.rows.append(shown(what, who, ratio(costs[BASE], mine)))
            section.notes.append(f"{what}: plain = {1 / typical(costs[BASE]):,.0f} per CPU-second on this machine.")
    return section


def cpu_a_chunk(server: Server, path: str) -> float:
    """CPU seconds of the server for each of ``SERVED_CHUNKS`` chunks."""
    before = server.cpu()
    end = b""
    with socket.create_connection(("127.0.0.1", server.port), 20) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        while end != b"0\r\n\r\n":
            received = connection.recv(1 << 18)
            assert received, server.log
            end = (end + received[-5:])[-5:]
        time.sleep(0.002)  # what the server does after the last byte counts too
        return (server.cpu() - before) / SERVED_CHUNKS


def idle(quick: bool) -> Section:
    count = IDLE // 4 if quick else IDLE
    section = Section("An idle stream", f"{count:,} at once, in process: tasks, and memory by tracemalloc.")
    what = "extra tasks a stream"
    found = {
        name: idle_stream(build(variant), path, count)
        for name, (variant, path) in {
            BASE: (BASE, "/idle"),
            "CancellableStreamingResponse": (BASE, "/cancellable-idle"),
            "CancellableStreamingResponse on a CancellableRoute": (OURS, "/cancellable-idle"),
            "StreamingResponse on a CancellableRoute": (OURS, "/idle"),
            **({MIDDLEWARE: (MIDDLEWARE, "/idle")} if PEERS else {}),
        }.items()
    }
    section.rows += [
        at_most(what, who, tasks, 1, "") if "ancellable" in who else shown(what, who, tasks, "")
        for who, (tasks, _) in found.items()
    ]
    what = "memory"
    plain = found[BASE][1]
    section.rows += [
        at_most(what, who, size / plain, 1.1) if "ancellable" in who else shown(what, who, size / plain)
        for who, (_, size) in found.items()
        if who != BASE
    ]
    section.notes.append(f"plain = {plain / 1024:.1f} KiB a stream, with FastAPI's own state and the scope.")
    return section


def idle_stream(app: FastAPI, path: str, count: int) -> tuple[float, float]:
    """Extra tasks, and bytes, of one of so many idle streams."""

    async def measure(streams: int) -> tuple[float, float]:
        started.clear()
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        calls = [Call(path) for _ in range(streams)]
        tasks = [asyncio.create_task(app(call.scope, call.receive, discard)) for call in calls]
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(started) == streams
        gc.collect()
        size = (tracemalloc.get_traced_memory()[0] - before) / streams
        extra = len(asyncio.all_tasks()) - 1 - streams
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return extra / streams, size

    tracemalloc.start()
    try:
        asyncio.run(measure(10))
        return asyncio.run(measure(count))
    finally:
        tracemalloc.stop()
