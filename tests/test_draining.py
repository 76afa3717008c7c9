"""How a stream learns that its server stops, in process. With real servers: test_shutdown."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from types import FrameType
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest
import trio

from fastapi_cancel import CancellableStreamingResponse, SSEResponse, shutdown
from fastapi_cancel._heart import AT_ONCE, Heart
from fastapi_cancel._listeners import address_of, listening

from .asgi import Connection

pytestmark = pytest.mark.anyio


class Streams:
    """So many open streams, each with a farewell."""

    def __init__(self, count: int = 1, server: tuple[str, int] | None = None) -> None:
        self.connections = [Connection() for _ in range(count)]
        for connection in self.connections:
            connection.scope["server"] = server
        self.open = 0

    async def content(self) -> AsyncIterator[str]:
        self.open += 1
        yield "first"
        await anyio.sleep_forever()

    async def run(self, stop: Any) -> None:
        """Have ``stop`` called once all are open; return when all have ended."""
        with anyio.fail_after(10):
            async with anyio.create_task_group() as group:
                for connection in self.connections:
                    group.start_soon(connection.run, SSEResponse(self.content(), farewell="bye"))
                while self.open + self.told < len(self.connections):
                    await anyio.sleep(0.001)
                stop()

    @property
    def told(self) -> int:
        return sum(b"data: bye" in connection.body for connection in self.connections)


@pytest.fixture
def heard() -> Iterator[list[int]]:
    """A server's own handlers of SIGTERM and SIGINT, and what they were called with."""
    signums: list[int] = []

    def handle(signum: int, frame: FrameType | None) -> None:
        signums.append(signum)

    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGTERM, signal.SIGINT)}
    yield signums
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_all_streams_and_reaches_its_handler(heard: list[int], signum: int) -> None:
    """C22: more of them than are told in one turn."""
    streams = Streams(2 * shutdown.AT_ONCE + 1)
    await streams.run(lambda: signal.raise_signal(signum))
    assert streams.told == len(streams.connections)
    assert heard == [signum]


async def test_a_stream_that_begins_after_the_signal_ends_at_once(heard: list[int]) -> None:
    """A request on a connection that the server has not closed yet."""
    await Streams().run(lambda: signal.raise_signal(signal.SIGTERM))
    late = Streams()
    await late.run(int)
    assert late.told == 1
    plain = CancellableStreamingResponse(late.content(), media_type="text/event-stream")
    connection = Connection()
    with anyio.fail_after(10):
        await connection.run(plain)
    assert connection.sent[-1] == {"type": "http.response.body"}


async def test_a_later_server_starts_anew(heard: list[int]) -> None:
    """sysid/sse-starlette#211: what was heard went with the handler that heard it."""
    await Streams().run(lambda: signal.raise_signal(signal.SIGTERM))
    signal.signal(signal.SIGTERM, lambda signum, frame: None)
    signal.signal(signal.SIGINT, lambda signum, frame: None)
    streams = Streams()

    async def stop_later() -> None:
        await anyio.sleep(2 * shutdown.LOOK)
        assert streams.told == 0
        shutdown.drain()

    async with anyio.create_task_group() as group:
        await streams.run(lambda: group.start_soon(stop_later))
    assert streams.told == 1


async def test_where_nobody_takes_the_signal_nor_do_we() -> None:
    """It would keep the process from ending (Hypercorn's workers)."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        await Streams().run(shutdown.drain)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_closed_listening_socket_ends_the_streams_that_came_in_there() -> None:
    """A server that stops without a signal. Where no socket is found, there is nothing to see (Granian)."""
    one = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    other = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    servers = [one, other]
    ours, theirs, unknown = (
        Streams(2, one.sockets[0].getsockname()),
        Streams(1, other.sockets[0].getsockname()),
        Streams(1, ("127.0.0.1", 1)),
    )

    async def stop() -> None:
        while shutdown.drain.__module__ and ours.told < 2:
            await asyncio.sleep(0.01)
        assert (theirs.told, unknown.told) == (0, 0)
        shutdown.drain()

    async with anyio.create_task_group() as group:
        group.start_soon(stop)
        group.start_soon(theirs.run, int)
        group.start_soon(unknown.run, int)
        await ours.run(one.close)
        late = Streams(1, ("127.0.0.1", ours.connections[0].scope["server"][1]))
        await late.run(int)
    assert late.told == theirs.told == unknown.told == 1
    for server in servers:
        server.close()


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_listening_sockets_on_trio() -> None:
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, trio.aclose_forcefully, 0)
        port = listeners[0].socket.getsockname()[1]
        await anyio.sleep(0.01)
        still = listening()[port]
        assert still()
        nursery.cancel_scope.cancel()
    assert not still()


def test_addresses() -> None:
    assert address_of(("127.0.0.1", 80)) == 80
    assert address_of(("/run/app.sock", None)) == "/run/app.sock"
    assert address_of(None) is None


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_unix_sockets(tmp_path: Any) -> None:
    path = str(tmp_path / "socket")
    server = await asyncio.start_unix_server(lambda reader, writer: None, path)
    servers = [server]
    # From outside, as a timer does: what a task holds shows while it waits.
    found = await anyio.to_thread.run_sync(anyio.from_thread.run_sync, listening)
    assert found[path]()
    servers[0].close()
    assert path not in await anyio.to_thread.run_sync(anyio.from_thread.run_sync, listening)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_many_heartbeats_at_one_time_leave_the_loop_its_turns() -> None:
    loop = asyncio.get_running_loop()
    heart = Heart(loop.call_later)
    beats: list[float] = []

    def beat(now: float) -> float:
        beats.append(now)
        return now + 100

    pulses = [heart.add(beat, 0) for _ in range(3 * AT_ONCE)]
    most = 0
    before = 0
    while len(beats) < len(pulses):
        await asyncio.sleep(0)
        most = max(most, len(beats) - before)
        before = len(beats)
    assert most == AT_ONCE
    for pulse in pulses:
        pulse.stop()


def test_without_sse_starlette() -> None:
    """The core does not import it; what needs it says so."""
    program = """
import sys
sys.modules["sse_starlette"] = None
import fastapi_cancel
fastapi_cancel.CancellableRoute
try:
    fastapi_cancel.SSEResponse
except ImportError as exc:
    print(exc)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "SSEResponse needs sse-starlette: pip install 'fastapi-cancel[sse]'\n", done.stderr
