"""What the protection of a JSON route costs in instructions: nearly the same in each run, however busy the machine is.

Behind uvicorn's own protocol, which is handed the bytes of the requests in process: all that the server does, and none
of the kernel's part. ``python -m benchmarks.instructions VARIANT PATH`` is what callgrind runs.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
from asyncio import sleep
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from .apps import BARE, OURS, build, gate
from .asgi import LONG
from .harness import BASE, Section, shown

ROWS = [("never waits", "/never"), ("waits for 10 ms", "/wait")]
VARIANTS = [BASE, OURS, BARE]
CONNECTIONS = 16
BATCHES = 20
WARM = 12


def run(quick: bool) -> Section:
    section = Section(
        "A JSON route, in instructions",
        f"Instructions of a request behind uvicorn's httptools protocol, in process, {CONNECTIONS} connections in "
        "turn, counted by callgrind, relative to the same route on plain FastAPI. The kernel's are not counted.",
    )
    if shutil.which("valgrind") is None:
        section.notes.append("valgrind is not installed: these rows are left out.")
        return section
    rows = ROWS[-1:] if quick else ROWS  # most of a minute for each cell, nearly all of it to start
    cells = [(variant, path) for _, path in rows for variant in VARIANTS]
    try:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            costs = dict(zip(cells, threads.map(_count, *zip(*cells, strict=True)), strict=True))
    except subprocess.CalledProcessError as failure:
        section.notes.append(f"callgrind ended with exit status {failure.returncode}: these rows are left out.")
        return section
    for what, path in rows:
        plain = costs[BASE, path]
        section.rows += [shown(what, who, costs[who, path] / plain) for who in VARIANTS if who != BASE]
        section.notes.append(f"{what}: plain = {plain:,.0f} instructions.")
    return section


def _count(variant: str, path: str) -> float:
    """Instructions for one request."""
    with TemporaryDirectory() as folder:
        out = Path(folder, "out")
        subprocess.run(
            [
                *("valgrind", "--tool=callgrind", f"--callgrind-out-file={out}"),
                *("--zero-before=getsid", "--dump-before=getpgid"),
                *(sys.executable, "-m", "benchmarks.instructions", variant, path),
            ],
            env={**os.environ, "PYTHONHASHSEED": "0"},
            check=True,
            capture_output=True,
        )
        found = re.search(r"^summary: (\d+)", Path(f"{out}.1").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) / (BATCHES * CONNECTIONS)


class Wire(asyncio.Transport):
    """Where the responses go."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 50000), "sockname": ("127.0.0.1", 8000)})
        self.writes = 0
        self._protocol: asyncio.BaseProtocol | None = None

    def get_protocol(self) -> asyncio.BaseProtocol:
        assert self._protocol is not None
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes += 1

    def is_closing(self) -> bool:
        return False


async def serve(variant: str, path: str) -> None:
    config = Config(build(variant), lifespan="off", http="httptools", access_log=False, log_config=None)
    config.load()
    state, request = ServerState(), f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:8000\r\n\r\n".encode()
    connections = [(HttpToolsProtocol(config, state, {}), Wire()) for _ in range(CONNECTIONS)]
    for protocol, wire in connections:
        wire.set_protocol(protocol)
        protocol.connection_made(wire)
    for batch in range(WARM + BATCHES):
        if batch == WARM:
            os.getsid(0)  # callgrind begins to count
        for protocol, wire in connections:
            wire.writes = 0
            protocol.data_received(request)
        if path == "/wait":
            while len(gate) < CONNECTIONS:
                await sleep(0)
            await sleep(LONG)
            while gate:
                gate.pop().set_result(None)
        while any(wire.writes < 2 for _, wire in connections):
            await sleep(0)
        await sleep(0)
    os.getpgid(0)  # callgrind has counted


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
