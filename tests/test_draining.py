"""How a stream learns that its server stops, in process. With real servers: test_shutdown."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from time import monotonic
from types import FrameType
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest
import trio
from sse_starlette.sse import AppStatus
from starlette.types import Receive, Scope, Send

import fastapi_cancel
from fastapi_cancel import CancellableStreamingResponse, SSEResponse, shutdown
from fastapi_cancel._heart import AT_ONCE, Heart
from fastapi_cancel._listeners import OLDEST, address_of, listening
from fastapi_cancel.testing import LeavingClient, Visit, after_chunks

pytestmark = pytest.mark.anyio


class Streams:
    """So many open streams, each with a farewell."""

    def __init__(self, count: int = 1, server: tuple[str, int] | None = None) -> None:
        self.count = count
        self.server = server
        self.visits: list[Visit] = []

    async def content(self) -> AsyncIterator[str]:
        yield "first"
        await anyio.sleep_forever()

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        await SSEResponse(self.content(), farewell="bye")({**scope, "server": self.server}, receive, send)

    async def run(self, stop: Any) -> None:
        """Have ``stop`` called once all are open; return when all have ended."""
        async with AsyncExitStack() as stack:
            client = LeavingClient(self.app)
            self.visits = [await stack.enter_async_context(client.visit("GET", "/")) for _ in range(self.count)]
            for visit in self.visits:
                await visit.until(after_chunks(1))
            stop()
        for visit in self.visits:
            visit.assert_clean()

    @property
    def told(self) -> int:
        return sum(visit.events[-1].data == "bye" for visit in self.visits if visit.events)


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
    assert streams.told == streams.count
    assert heard == [signum]


async def test_a_stream_that_begins_after_the_signal_ends_at_once(heard: list[int]) -> None:
    """A request on a connection that the server has not closed yet."""
    await Streams().run(lambda: signal.raise_signal(signal.SIGTERM))
    late = Streams()
    await late.run(int)
    assert late.told == 1
    plain = CancellableStreamingResponse(late.content(), media_type="text/event-stream")
    (await LeavingClient(plain).get("/")).assert_clean()


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


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_other_threads_hear_no_signals(heard: list[int]) -> None:
    """As their servers hear none."""
    other, opened = Streams(2), threading.Event()
    told: list[int] = []

    async def in_thread() -> None:
        def stop() -> None:
            told.append(other.told)
            shutdown.drain()

        def stop_later() -> None:
            opened.set()
            asyncio.get_running_loop().call_later(0.5, stop)

        await other.run(stop_later)

    async with anyio.create_task_group() as group:
        group.start_soon(anyio.to_thread.run_sync, partial(asyncio.run, in_thread()))
        await anyio.to_thread.run_sync(opened.wait)
        ours = Streams()
        await ours.run(lambda: signal.raise_signal(signal.SIGTERM))
        assert ours.told == 1
    assert told == [0]
    assert other.told == 2


async def test_a_stream_that_finishes_leaves_the_others_open() -> None:
    streams = Streams()

    async def finish_one() -> None:
        await LeavingClient(SSEResponse(["1"])).get("/")
        assert streams.told == 0
        assert shutdown.drain() == 1

    async with anyio.create_task_group() as group:
        await streams.run(lambda: group.start_soon(finish_one))
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
    address = one.sockets[0].getsockname()
    ours, late = Streams(2, address), Streams(1, address)
    theirs = Streams(1, other.sockets[0].getsockname())
    unknown = Streams(1, ("127.0.0.1", 1))

    async with anyio.create_task_group() as group:
        group.start_soon(theirs.run, int)
        group.start_soon(unknown.run, int)
        await ours.run(one.close)
        await late.run(int)
        assert (ours.told, late.told, theirs.told, unknown.told) == (2, 1, 0, 0)
        shutdown.drain()
    assert theirs.told == unknown.told == 1
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


class LooksLikeOne:
    is_serving = True


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_only_looks_like_a_server_is_passed_over() -> None:
    """And long lists are: they are somebody's data."""

    async def hold(things: list[object]) -> None:
        await asyncio.sleep(60)

    tasks = [asyncio.create_task(hold([LooksLikeOne()])), asyncio.create_task(hold([LooksLikeOne()] * 1000))]
    await asyncio.sleep(0)
    assert isinstance(listening(), dict)
    for task in tasks:
        task.cancel()


def test_a_loop_that_was_closed_with_open_streams(heard: list[int]) -> None:
    """The server's handler is called all the same."""
    loop = asyncio.new_event_loop()

    async def open_one() -> None:
        shutdown._open[loop.call_soon_threadsafe] = shutdown._Streams(loop.call_soon_threadsafe, hears=True)

    loop.run_until_complete(open_one())
    loop.close()
    signal.signal(signal.SIGTERM, shutdown._Listener(signal.getsignal(signal.SIGTERM)))  # type: ignore[arg-type]
    signal.raise_signal(signal.SIGTERM)
    assert heard == [signal.SIGTERM]
    del shutdown._open[loop.call_soon_threadsafe]


def test_a_handler_of_ours_looks_like_the_one_it_stands_for() -> None:
    """sse-starlette finds uvicorn's server by the handler's `__self__`."""

    class Server:
        def handle_exit(self, signum: int, frame: object) -> None: ...

    server = Server()
    listener: Any = shutdown._Listener(server.handle_exit)
    assert listener.__self__ is server


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


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_pulses_that_stop_before_they_are_due() -> None:
    heart = Heart(asyncio.get_running_loop().call_later)
    beats: list[str] = []
    beaten = anyio.Event()

    def beat(name: str) -> Callable[[float], float]:
        def look(now: float) -> float:
            beats.append(name)
            if name == "last":
                beaten.set()
            return now + 100

        return look

    now = monotonic()
    pulses = {
        name: heart.add(beat(name), now + 0.1 * number) for number, name in enumerate(["a", "b", "c", "d", "e", "last"])
    }
    pulses["b"].stop()
    await anyio.sleep(0.25)
    pulses["d"].stop()
    pulses["d"].stop()
    with anyio.fail_after(5):
        await beaten.wait()
    assert beats == ["a", "c", "e", "last"]
    for pulse in pulses.values():
        pulse.stop()
    assert heart._due == []


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_only_the_first_tasks_are_looked_into() -> None:
    """To look into a task costs it some kilobytes."""

    async def hold(things: list[object]) -> None:
        await trio.sleep_forever()

    async with trio.open_nursery() as servers, trio.open_nursery() as requests:
        no_sockets: list[object] = [5]
        servers.start_soon(hold, no_sockets)
        listeners = await servers.start(trio.serve_tcp, trio.aclose_forcefully, 0)
        for _ in range(2 * OLDEST):
            requests.start_soon(trio.sleep_forever)
        await anyio.sleep(0.01)
        assert listeners[0].socket.getsockname()[1] in listening()
        servers.cancel_scope.cancel()


async def test_draining_that_is_switched_off(heard: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """sse-starlette's `AppStatus.disable_automatic_graceful_drain`: the signal goes to the server only."""
    monkeypatch.setattr(AppStatus, "enable_automatic_graceful_drain", False)
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port: int = listener.extra(anyio.abc.SocketAttribute.local_port)
    monkeypatch.setattr(shutdown, "listening", lambda: {port: lambda: not closed})
    closed: list[bool] = []
    streams = Streams(1, ("127.0.0.1", port))

    async def stop_later() -> None:
        closed.append(True)
        signal.raise_signal(signal.SIGTERM)
        await anyio.sleep(2 * shutdown.LOOK)
        assert streams.told == 0
        shutdown.drain()

    async with anyio.create_task_group() as group:
        await streams.run(lambda: group.start_soon(stop_later))
    assert heard == [signal.SIGTERM]
    await listener.aclose()


@pytest.mark.parametrize(
    ("missing", "error", "message"),
    [
        ("sse_starlette.sse", ImportError, "SSEResponse needs sse-starlette: pip install"),
        ("fastapi_cancel._beside", ModuleNotFoundError, "_beside"),
    ],
)
def test_what_needs_sse_starlette_says_so(
    monkeypatch: pytest.MonkeyPatch, missing: str, error: type[Exception], message: str
) -> None:
    monkeypatch.delitem(sys.modules, "fastapi_cancel.sse")
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(vars(fastapi_cancel), "SSEResponse", raising=False)  # else it is there since the first import
    with pytest.raises(error, match=message):
        _ = fastapi_cancel.SSEResponse
    with pytest.raises(AttributeError, match="no attribute 'SSE'"):
        _ = fastapi_cancel.SSE


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


@pytest.mark.parametrize("installed", [True, False])
def test_draining_outside_of_the_event_loop_is_refused(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Trio and without: the error says what to do, not that a package is missing."""
    if not installed:
        monkeypatch.delitem(sys.modules, "trio")
    with pytest.raises(RuntimeError, match=r"no event loop runs in this thread: call drain\(\) in the one"):
        shutdown.drain()
