"""Changing the import is the whole migration (C19): the examples of sse-starlette's README, run on ours.

They are read from the installed distribution: nothing of them is kept here. A block that returns a response is made
the body of a function; names that the prose explains are given; an hour of sleep takes no time.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import textwrap
import threading
from collections.abc import AsyncIterator, Callable
from functools import cache
from importlib.metadata import metadata
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from sse_starlette import EventSourceResponse
from starlette.requests import Request
from starlette.types import Message

import fastapi_cancel
from fastapi_cancel import CancellableRoute, SSEResponse, drain

from .asgi import Connection

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """The examples sleep on asyncio."""
    return "asyncio"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sleeping is a turn of the event loop."""
    turn = asyncio.sleep

    async def sleep(seconds: float) -> None:
        await turn(0)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(anyio, "sleep", sleep)


@cache
def blocks() -> list[str]:
    readme = metadata("sse-starlette")["Description"]
    return re.findall(r"^```python\n(.*?)^```", readme, re.M | re.S)


def run(containing: str, **given: Any) -> dict[str, Any]:
    """Run the only block that contains this text, with ours for theirs.

    :return: its names; what it returns is among them as ``returned``
    """
    (code,) = (block for block in blocks() if containing in block)
    module = {"asyncio": asyncio, "anyio": anyio, "EventSourceResponse": SSEResponse, **given}
    if any(isinstance(statement, ast.Return) for statement in ast.parse(code).body):
        code = f"def block():\n{textwrap.indent(code, '    ')}\nreturned = block()\n"
    code = re.sub(r"from sse_starlette import (.*EventSourceResponse.*)", replace_import, code)
    exec(compile(code, containing, "exec"), module)
    return module


def replace_import(line: re.Match[str]) -> str:
    assert line[1] == "EventSourceResponse"
    return "from fastapi_cancel import SSEResponse as EventSourceResponse"


class Shared(Connection):
    """As uvicorn has it, several may read at once: a route that is not ours leaves its request with the server's
    ``receive``, which the examples peek at.
    """

    async def receive(self) -> Message:
        if self.pieces:
            return {"type": "http.request", "body": self.pieces.pop(0), "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}


def application(respond: Callable[[Request], SSEResponse], route_class: type[APIRoute]) -> FastAPI:
    app, router = FastAPI(), APIRouter(route_class=route_class)

    @router.get("/")
    async def endpoint(request: Request) -> Any:
        return respond(request)

    app.include_router(router)
    return app


routes = pytest.mark.parametrize("route_class", [APIRoute, CancellableRoute])


async def wire(response: Any, connection: Connection | None = None) -> bytes:
    connection = connection or Connection()
    with anyio.fail_after(10):
        await connection.run(response)
    assert connection.sent[-1].get("more_body", False) is False
    return connection.body


def numbered(text: str, numbers: range) -> bytes:
    return b"".join(f"data: {text} {number}\r\n\r\n".encode() for number in numbers)


async def generate_events() -> AsyncIterator[dict[str, str]]:
    yield {"data": "given"}


def test_every_example_of_the_readme_is_tested() -> None:
    """A new version may bring new ones."""
    tests = "".join(inspect.getsource(each) for name, each in globals().items() if name.startswith("test_"))
    known = [*re.findall(r"run\(\s*\"(.+?)\"", tests), "reset_sse_app_status"]  # the last is about their own tests
    assert [block for block in blocks() if not any(each in block for each in known)] == []


async def test_quick_start() -> None:
    app = run("app = Starlette(")["app"]
    connection = Connection(path="/events")
    with anyio.fail_after(10):
        await connection.run(app)
    assert connection.status == 200
    assert dict(connection.sent[0]["headers"])[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert connection.body == numbered("Event", range(10))


async def test_basic_usage() -> None:
    class Item:
        def __init__(self, id: int) -> None:
            self.id = id

        def __str__(self) -> str:
            return f"item {self.id}"

    response = run("async def stream_data():", data=[Item(1), Item(2)])["returned"]
    assert await wire(response) == (
        b"id: 1\r\nevent: update\r\ndata: item 1\r\n\r\nid: 2\r\nevent: update\r\ndata: item 2\r\n\r\n"
    )


@pytest.mark.parametrize(
    ("containing", "expected"),
    [
        ("retry=5000", b"id: msg-123\r\nevent: notification\r\ndata: Custom message\r\nretry: 5000\r\n\r\n"),
        ("import JSONServerSentEvent", b'data: {"field":"value"}\r\n\r\n'),
    ],
)
async def test_events(containing: str, expected: bytes) -> None:
    """`run("retry=5000")` and `run("import JSONServerSentEvent")`."""
    event = run(containing)["event"]
    assert isinstance(event, (fastapi_cancel.ServerSentEvent, fastapi_cancel.JSONServerSentEvent))
    assert await wire(SSEResponse([event])) == expected


async def test_custom_ping() -> None:
    """Their heartbeat comes every ten seconds; ours when nothing else has."""
    connection = Connection()

    async def generate() -> AsyncIterator[str]:
        while b": Custom" not in connection.body:
            await anyio.lowlevel.checkpoint()
        yield "seen"

    response = run("def custom_ping", generate_events=generate)["returned"]
    assert response.ping_interval == 10
    response.ping_interval = 0.01
    assert re.fullmatch(rb"(: Custom ping message\r\n\r\n)+data: seen\r\n\r\n", await wire(response, connection))


def test_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their responses are made in threads that have an event loop of their own; here they are sent there, too."""
    bodies: list[bytes] = []

    def respond(content: Any) -> SSEResponse:
        response = SSEResponse(content)
        bodies.append(asyncio.get_event_loop().run_until_complete(wire(response)))
        return response

    monkeypatch.setattr(fastapi_cancel, "SSEResponse", respond, raising=False)
    before = threading.enumerate()
    run("run_sse_in_thread")
    for thread in set(threading.enumerate()) - set(before):
        thread.join(10)
    assert bodies == [numbered("Thread event", range(5))] * 3


@routes
async def test_database_streaming(route_class: type[APIRoute]) -> None:
    """The session is closed when the stream is through."""
    closed: list[bool] = []

    class Session:
        async def __aenter__(self) -> Session:
            return self

        async def __aexit__(self, *exc: object) -> None:
            await anyio.lowlevel.checkpoint()
            closed.append(True)

        async def execute(self, statement: object) -> list[SimpleNamespace]:
            return [SimpleNamespace(id=1, name="Ada"), SimpleNamespace(id=2, name="Bob")]

    def respond(request: Request) -> Any:
        given = {"AsyncSession": Session, "select": lambda model: None, "User": object, "request": request}
        return run("async def stream_database_results", **given)["returned"]

    body = await wire(application(respond, route_class), Shared())
    assert body == b"id: 1\r\ndata: Ada\r\n\r\nid: 2\r\ndata: Bob\r\n\r\n"
    assert closed == [True]


@routes
async def test_error_handling_and_timeouts(route_class: type[APIRoute]) -> None:
    def respond(request: Request) -> Any:
        return run("async def robust_stream", request=request)["returned"]

    connection = Shared()
    assert await wire(application(respond, route_class), connection) == numbered("Item", range(100))
    assert dict(connection.sent[0]["headers"])[b"cache-control"] == b"no-cache"


async def test_memory_channels() -> None:
    """The channel is closed: AnyIO warns of one that is not."""
    response = await run("async def data_producer")["channel_endpoint"](None)
    assert await wire(response) == numbered("Item", range(10))
    with pytest.raises(anyio.ClosedResourceError):
        response.body_iterator.receive_nowait()


async def test_cooperative_shutdown() -> None:
    """The generator sees `shutdown_event` and says its own farewell, uninterrupted."""
    connection = Connection()
    response = await run("async def graceful_stream")["graceful_stream"](None)
    async with anyio.create_task_group() as group:
        group.start_soon(wire, response, connection)
        while b"tick" not in connection.body:
            await anyio.lowlevel.checkpoint()
        assert drain() == 1
    assert connection.body == b"data: tick\r\n\r\nevent: shutdown\r\ndata: Server is shutting down\r\n\r\n"


@routes
async def test_client_disconnection(route_class: type[APIRoute]) -> None:
    stream = run("async def monitored_stream")["monitored_stream"]
    app = application(lambda request: SSEResponse(stream(request)), route_class)
    assert await wire(app, Shared()) == numbered("Event", range(100))


@routes
async def test_client_disconnection_is_noticed(
    route_class: type[APIRoute], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The generator is interrupted while it sleeps."""
    stream = run("async def monitored_stream")["monitored_stream"]
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: anyio.Event().wait())
    connection = Shared()
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(connection.run, application(lambda request: SSEResponse(stream(request)), route_class))
            while b"Event 0" not in connection.body:
                await anyio.lowlevel.checkpoint()
            connection.leave()
    assert capsys.readouterr().out == "Stream cancelled\n"


async def test_connection_limits() -> None:
    limiter = run("class ConnectionLimiter", generate_events=generate_events)["ConnectionLimiter"]()
    assert await wire(await limiter.limited_endpoint(None)) == b"data: given\r\n\r\n"


# -- what an application may have relied on ------------------------------------------------------


def parameters(kind: type) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(kind).parameters)


def test_arguments_by_position_are_theirs() -> None:
    """C19: the same arguments, in the same places; our own come behind, by name only."""
    theirs, ours = parameters(EventSourceResponse), parameters(SSEResponse)
    assert list(ours)[: len(theirs)] == list(theirs)
    behind = list(ours)[list(ours).index("heartbeat") :]
    assert {ours[name].kind for name in behind} == {inspect.Parameter.KEYWORD_ONLY}


def test_it_is_an_event_source_response() -> None:
    response = SSEResponse([])
    assert isinstance(response, EventSourceResponse)
    assert response.ping_interval == EventSourceResponse.DEFAULT_PING_INTERVAL
    assert response.media_type == "text/event-stream"


@pytest.mark.parametrize(("value", "error"), [("ten", TypeError), (-1, ValueError)])
def test_a_bad_ping_interval_is_refused(value: Any, error: type[Exception]) -> None:
    response = SSEResponse([])
    with pytest.raises(error):
        response.ping_interval = value
    with pytest.raises(error):
        SSEResponse([], ping=value)


@pytest.mark.parametrize("sep", ["\n\n", "", "x"], ids=repr)
def test_a_bad_separator_is_refused(sep: str) -> None:
    with pytest.raises(ValueError, match="sep"):
        SSEResponse([], sep=sep)


@pytest.mark.parametrize("method", ["HEAD", "head"])
async def test_head_opens_no_stream(method: str) -> None:
    """sysid/sse-starlette#218: in whatever case."""
    connection = Connection(method=method)

    async def endless() -> AsyncIterator[str]:
        pytest.fail("the stream was opened")
        yield ""

    with anyio.fail_after(5):
        await connection.run(SSEResponse(endless()))
    assert connection.sent[1:] == [{"type": "http.response.body", "body": b"", "more_body": False}]


async def test_a_memory_channel_is_closed() -> None:
    """Whoever feeds it is told that nobody listens any more."""
    sender, receiver = anyio.create_memory_object_stream[str](1)
    connection = Connection()
    async with anyio.create_task_group() as group:
        group.start_soon(connection.run, SSEResponse(receiver))
        await sender.send("x")
        while b"x" not in connection.body:
            await anyio.lowlevel.checkpoint()
        connection.leave()
    with sender, pytest.raises(anyio.BrokenResourceError):
        sender.send_nowait("y")


async def test_a_shutdown_does_not_wait_for_a_client_that_does_not_read() -> None:
    """C22: the farewell and the end of the response are tried, and given up."""
    connection = Connection()

    async def feed() -> AsyncIterator[str]:
        await anyio.Event().wait()
        yield ""

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(connection.run, SSEResponse(feed(), farewell="bye"))
            while not connection.sent:
                await anyio.lowlevel.checkpoint()
            connection.unblocked = anyio.Event()
            assert drain() == 1
