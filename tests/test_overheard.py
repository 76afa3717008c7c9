"""Connections of uvicorn's whose loss is overheard. In process; its own protocols, mostly on a wire cut by hand."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import ssl
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import pytest
import uvloop
from starlette.types import Message, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import Server, ServerState

from fastapi_cancel import CancelPolicy
from fastapi_cancel._overheard import Overheard, overhear
from fastapi_cancel.channel import Channel
from fastapi_cancel.protect import KEY, protect

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("either_way")]

Work = Callable[[Scope, Receive, Send], Any]

GET = b"GET / HTTP/1.1\r\nHost: testserver\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: testserver\r\nContent-Length: 70000\r\n"
START = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]}
END = {"type": "http.response.body", "body": b"x"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=[HttpToolsProtocol, H11Protocol])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


class Wire(asyncio.Transport):
    """The event loop's end of a connection, on which the server writes."""

    def __init__(self, server: Any) -> None:
        super().__init__({"peername": ("127.0.0.1", 50000), "sockname": ("127.0.0.1", 8000)})
        self._protocol: Any = server
        self._closing = False
        self.reads = True
        self.written = b""
        server.connection_made(self)

    def get_protocol(self) -> Any:
        return self._protocol

    def set_protocol(self, protocol: Any) -> None:
        self._protocol = protocol

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        self._closing = True

    def receives(self, data: bytes) -> None:
        self._protocol.data_received(data)

    def lose(self) -> None:
        """The client leaves."""
        self._closing = True
        self._protocol.connection_lost(None)

    @property
    def overheard(self) -> bool:
        """Whether somebody listens."""
        return isinstance(self._protocol, Overheard) and bool(self._protocol._listeners)


class Deaf(Wire):
    """One that keeps to the protocol it has."""

    def set_protocol(self, protocol: Any) -> None:
        raise NotImplementedError


class Connection:
    """One connection to a server that runs ``work``.

    :ivar sends: whether its ``send`` gets through
    """

    sends = True

    def __init__(self, kind: Any, work: Work, wire: type[Wire] = Wire, **policy: Any) -> None:
        self._work = work
        self._policy = CancelPolicy(**policy)
        self._cycles: list[Any] = []
        config = Config(self, lifespan="off", log_config=None, access_log=False)
        config.load()
        self.server = ServerState()
        self.wire = wire(kind(config, self.server, {}))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._cycles.append(receive.__self__)  # type: ignore[attr-defined]
        await protect(self._work, scope, receive, send if self.sends else broken, self._policy)

    @property
    def readers(self) -> int:
        """How many wait inside the server's ``receive``."""
        return sum(len(cycle.message_event._waiters) for cycle in self._cycles)

    async def ask(self, data: bytes = GET) -> None:
        """Have the work begin, and wait."""
        self.wire.receives(data)
        await turns(3)

    async def over(self) -> None:
        """All requests have ended."""
        await until(lambda: not self.server.tasks)


async def broken(message: Message) -> None:
    """As that of a middleware that has had enough of this client."""
    raise OSError


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(2):
        while not condition():
            await asyncio.sleep(0)


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def silent(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """C13."""
    yield
    assert [record for record in caplog.get_records("call") if record.levelno >= logging.WARNING] == []


class Job:
    """A work that waits, and sees why it ends."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self.seen.append("interrupted")
            await asyncio.sleep(0.001)
            self.seen.append(scope[KEY].cause)


async def test_nobody_waits_inside_receive(kind: Any) -> None:
    """And the cleanup begins within two turns of the event loop (C3), all the same."""
    job = Job()
    connection = Connection(kind, job)
    await connection.ask()
    assert (connection.readers, connection.wire.overheard) == (0, True)
    connection.wire.lose()
    assert not connection.server.connections  # the server knows
    await turns(2)
    assert job.seen == ["interrupted"]
    await connection.over()
    assert job.seen == ["interrupted", "disconnect"]


async def test_who_left_before_is_noticed_at_the_first_wait(kind: Any) -> None:
    job = Job()
    connection = Connection(kind, job)
    connection.wire.receives(GET)
    connection.wire.lose()
    await connection.over()
    assert job.seen == ["interrupted", "disconnect"]


async def test_who_is_just_leaving_is_noticed_when_the_server_says_so(kind: Any) -> None:
    """The transport closes, and the protocol has not been told yet."""
    job = Job()
    connection = Connection(kind, job)
    connection.wire.close()
    await connection.ask()
    assert (connection.readers, connection.wire.overheard) == (1, False)
    connection.wire.lose()
    await connection.over()
    assert job.seen == ["interrupted", "disconnect"]


async def test_each_request_of_a_connection(kind: Any) -> None:
    """One listener after the other at the same place, and none when nobody runs."""
    gates: list[asyncio.Future[None]] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        gates.append(asyncio.get_running_loop().create_future())
        await gates[-1]
        await send(START)
        await send(END)

    connection = Connection(kind, work)
    places = set()
    for _ in range(3):
        await connection.ask()
        assert connection.wire.overheard
        places.add(connection.wire.get_protocol())
        gates[-1].set_result(None)
        await connection.over()
        assert not connection.wire.overheard
    assert len(places) == 1
    assert connection.wire.written.count(b"200 OK") == 3
    connection.wire.lose()


async def test_all_else_goes_on_to_the_server(kind: Any) -> None:
    """The rest of an upload, back-pressure, and a half-closed connection."""
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(0.001)
        more = True
        while more:
            message = await receive()
            more = message["more_body"]
            seen.append(len(message["body"]))
        seen.append("sends")
        await send(START)
        await send(END)
        seen.append("sent")

    connection = Connection(kind, work)
    await connection.ask(POST + b"\r\nx")
    await until(lambda: connection.wire.overheard)
    through = connection.wire.get_protocol()
    assert through.eof_received() is None
    through.pause_writing()
    connection.wire.receives(69_999 * b"x")
    await until(lambda: "sends" in seen)
    await turns(5)
    through.resume_writing()
    assert seen[-1] == "sends"
    await connection.over()
    assert seen[-1] == "sent"
    assert sum(seen[:-2]) == 70_000


@pytest.mark.parametrize("more", [b"", b"\r\n\r\nx", b"\r\nExpect: 100-continue\r\n\r\n"])
async def test_an_unread_body_stays_with_the_server(kind: Any, more: bytes) -> None:
    """C4: nothing is read ahead, and nothing invited."""
    job = Job()
    connection = Connection(kind, job)
    await connection.ask(POST[:-2] + more if more else GET)
    (cycle,) = connection._cycles
    assert bytes(cycle.body) == (b"x" if more.endswith(b"x") else b"")
    assert (connection.readers, connection.wire.overheard, connection.wire.written) == (0, True, b"")
    connection.wire.lose()
    await connection.over()
    assert job.seen == ["interrupted", "disconnect"]
    assert b"100 Continue" not in connection.wire.written


async def test_a_server_that_has_stopped_reading_is_read(kind: Any) -> None:
    """It holds as much of a body as it keeps, and would not hear of the loss. One message is read ahead (C4)."""
    job = Job()
    connection = Connection(kind, job)
    connection.wire.receives(POST + b"\r\n" + 69_999 * b"x")
    assert not connection.wire.reads
    await turns(3)
    assert connection.wire.reads
    (cycle,) = connection._cycles
    assert (bytes(cycle.body), connection.readers, connection.wire.overheard) == (b"", 0, True)
    connection.wire.lose()
    await connection.over()
    assert job.seen == ["interrupted", "disconnect"]


@pytest.mark.parametrize("wait", [0.001, 0])
async def test_an_application_that_asks_itself_is_told(kind: Any, wait: float) -> None:
    seen: list[str] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        if wait:
            await asyncio.sleep(wait)
        while seen[-1:] != ["http.disconnect"]:
            seen.append((await receive())["type"])
        seen.append(scope[KEY].cause)

    connection = Connection(kind, work)
    await connection.ask()
    await until(lambda: connection.readers)
    connection.wire.lose()
    await connection.over()
    assert seen == ["http.request", "http.disconnect", "disconnect"]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Channel]:
    """Whose watcher has begun to read."""
    noted: list[Channel] = []
    read_on = Channel._read_on

    def note(channel: Channel) -> None:
        noted.append(channel)
        read_on(channel)

    monkeypatch.setattr(Channel, "_read_on", note)
    return noted


async def test_who_reads_already_hears_of_it_there(kind: Any, reads: list[Channel]) -> None:
    """C1: one reader. And C7: that is its one interruption."""
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.0001)
        while seen[-1:] != ["http.disconnect"]:
            seen.append((await receive())["type"])
        await asyncio.sleep(0.001)
        seen.append(scope[KEY].cause)

    connection = Connection(kind, work)
    await connection.ask(POST + b"\r\nx")
    await until(lambda: connection.readers)
    assert connection.wire.overheard
    connection.wire.lose()
    await connection.over()
    assert seen == ["http.request", "http.disconnect", "disconnect"]
    assert reads == []


async def test_who_has_heard_of_it_before_reads_no_more(kind: Any, reads: list[Channel]) -> None:
    """By a ``send`` that failed."""
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.0001)
        try:
            await send(START)
        finally:
            connection.wire.lose()
            await asyncio.sleep(0.001)
            seen.append(scope[KEY].cause)

    connection = Connection(kind, work)
    connection.sends = False
    await connection.ask()
    await connection.over()
    assert (seen, reads) == (["disconnect"], [])


async def test_a_stream_is_cut(kind: Any) -> None:
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START | {"headers": []})
        try:
            while True:
                await send({"type": "http.response.body", "body": b"piece", "more_body": True})
                await asyncio.sleep(0.001)
        finally:
            await asyncio.sleep(0.001)
            seen.append(scope[KEY].cause)

    connection = Connection(kind, work)
    await connection.ask()
    await until(lambda: connection.wire.written.count(b"piece") > 2)
    assert (connection.readers, connection.wire.overheard) == (0, True)
    connection.wire.lose()
    await connection.over()
    assert seen == ["disconnect"]


async def test_a_background_task_is_not_interrupted(kind: Any) -> None:
    """C5."""
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.0001)
        await send(START)
        await send(END)
        await asyncio.sleep(0.01)
        seen.append(scope[KEY].cause)

    connection = Connection(kind, work)
    await connection.ask()
    await until(lambda: b"200 OK" in connection.wire.written)
    connection.wire.lose()
    await connection.over()
    assert seen == [None]


async def test_nor_by_who_leaves_in_the_next_request(kind: Any) -> None:
    """A client may send the next one while the background task of the last still runs."""
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        number = len(seen)
        seen.append("begun")
        await asyncio.sleep(0.0001)
        if number == 0:
            await send(START)
            await send(END)
        try:
            await asyncio.sleep(0.05 if number == 0 else 60)
        finally:
            seen[number] = scope[KEY].cause

    connection = Connection(kind, work)
    await connection.ask()
    await until(lambda: b"200 OK" in connection.wire.written)
    await connection.ask()
    await asyncio.sleep(0.005)
    connection.wire.lose()
    await connection.over()
    assert seen == [None, "disconnect"]


async def test_a_request_within_the_request_listens_too(kind: Any) -> None:
    """With a scope of its own, and the same ``receive``."""
    inner, outer = Job(), Job()

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        server = scope[KEY].server_receive
        within = asyncio.create_task(protect(inner, {**scope, KEY: None}, server, send, CancelPolicy()))
        try:
            await outer(scope, receive, send)
        finally:
            await within

    async def alone(scope: Scope, receive: Receive, send: Send) -> None:
        await work(scope, receive, send)

    connection = Connection(kind, alone)
    await connection.ask()
    connection.wire.lose()
    await connection.over()
    assert inner.seen == outer.seen == ["interrupted", "disconnect"]


async def test_who_is_told_is_told_in_the_context_of_the_request(kind: Any) -> None:
    name: ContextVar[str] = ContextVar("name")
    seen: list[str] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        name.set("the request's")
        scope[KEY].ladder.listen(lambda: seen.append(name.get("nobody's")))
        await asyncio.get_running_loop().create_future()

    connection = Connection(kind, work)
    await connection.ask()
    connection.wire.lose()
    await connection.over()
    assert seen == ["the request's"]


@contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("leaves", [True, False])
async def test_nothing_is_kept_of_a_request_that_is_over(kind: Any, leaves: bool) -> None:
    channels: list[weakref.ref[Any]] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        channels.append(weakref.ref(scope[KEY]))
        await asyncio.sleep(60 if leaves else 0.001)
        await send(START)
        await send(END)

    with no_collector():
        connection = Connection(kind, work)
        await connection.ask()
        assert connection.wire.overheard
        if leaves:
            connection.wire.lose()
        await connection.over()
        await turns(3)
        assert channels[0]() is None


class Talking(HttpToolsProtocol):
    """Another release: it says so somewhere else, too."""

    def connection_lost(self, exc: Exception | None) -> None:
        if self.cycle is not None:
            self.cycle.disconnected = True
        super().connection_lost(exc)

    def give_up(self) -> None:
        self.cycle.disconnected = True


class Silent(HttpToolsProtocol):
    """It says so in a way that we have not read."""

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)


def filling(*arguments: Any) -> Any:
    """It has its data put into a buffer of its own."""

    class Filling(asyncio.BufferedProtocol):
        def __init__(self) -> None:
            self.connection_made = protocol.connection_made  # type: ignore[assignment]
            self.data_received = protocol.data_received

        def connection_lost(self, exc: Exception | None) -> None:
            self.disconnected = True
            protocol.connection_lost(exc)

    protocol = HttpToolsProtocol(*arguments)
    return Filling()


@pytest.mark.parametrize("kind", [Talking, Silent, filling])
async def test_a_server_that_may_say_it_elsewhere_is_read(kind: Any) -> None:
    connection = Connection(kind, job := Job())
    await connection.ask()
    assert (connection.readers, connection.wire.overheard) == (1, False)
    connection.wire.lose()
    await connection.over()
    assert job.seen == ["interrupted", "disconnect"]


async def test_so_is_one_on_a_transport_that_keeps_its_protocol(kind: Any) -> None:
    connection = Connection(kind, job := Job(), Deaf)
    await connection.ask()
    assert connection.readers == 1
    connection.wire.lose()
    await connection.over()
    assert job.seen == ["interrupted", "disconnect"]


async def test_what_is_not_uvicorn_s_is_not_overheard() -> None:
    async def receive() -> Message:
        raise AssertionError

    assert overhear(receive) is None
    assert overhear(asyncio.Queue().get) is None


async def test_a_server_that_fails_at_that_has_its_error() -> None:
    """And who listens is told all the same."""

    class Failing(asyncio.Protocol):
        def connection_lost(self, exc: Exception | None) -> None:
            told.append(str(exc))
            raise ZeroDivisionError

    class Listener:
        def connection_lost(self) -> None:
            told.append("told")

    told: list[str] = []
    overheard = Overheard(Failing())
    overheard.add(Listener())
    with pytest.raises(ZeroDivisionError):
        overheard.connection_lost(OSError("reset"))
    assert told == ["reset", "told"]


@pytest.mark.parametrize("encrypted", [True, False])
@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_on_a_real_socket(kind: Any, loop: Any, encrypted: bool, certificate: str) -> None:
    """Of each event loop, with and without TLS; three requests on each connection before."""
    jobs: list[Job] = []
    channels: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/":
            await asyncio.sleep(0.0001)
            await send(START)
            await send(END)
        else:
            channels.append(scope[KEY])
            jobs.append(Job())
            await jobs[-1](scope, receive, send)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await protect(work, scope, receive, send, CancelPolicy())

    def overheard() -> int:
        return sum(channel._overheard is not None and not channel._reading for channel in channels)

    async def visit(server: Server, address: tuple[str, int]) -> None:
        clients = [await asyncio.open_connection(*address, ssl=trusting) for _ in range(10)]
        for read, write in clients:
            for _ in range(3):
                write.write(GET)
                assert (await read.readuntil(b"\r\n\r\nx")).startswith(b"HTTP/1.1 200")
            write.write(GET.replace(b"/", b"/job", 1))
        await until(lambda: overheard() == len(clients))
        for number, (_, write) in enumerate(clients):
            if number % 2:
                write.transport.abort()
            else:
                write.close()
        await until(lambda: len(jobs) == len(clients) and all(job.seen[1:] for job in jobs))
        assert {tuple(job.seen) for job in jobs} == {("interrupted", "disconnect")}
        await until(lambda: not server.server_state.connections)

    async def main() -> None:
        server = Server(Config(app, http=kind, lifespan="off", log_config=None, access_log=False, **files))
        sock = socket.create_server(("127.0.0.1", 0))
        serving = asyncio.create_task(server.serve([sock]))
        try:
            await until(lambda: server.started)
            await visit(server, sock.getsockname())
        finally:
            server.should_exit = server.force_exit = True
            await serving

    files: dict[str, Any] = (
        {"ssl_certfile": f"{certificate}/cert", "ssl_keyfile": f"{certificate}/key"} if encrypted else {}
    )
    trusting = ssl.create_default_context(cafile=f"{certificate}/cert") if encrypted else None
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())
