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
from starlette.types import Message, Receive, Scope, Send

import fastapi_cancel
from fastapi_cancel import CancellableRoute, SSEResponse, drain
from fastapi_cancel.testing import LeavingClient, Visit, after_event, after_start

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


def application(respond: Callable[[Request], SSEResponse], route_class: type[APIRoute]) -> FastAPI:
    app, router = FastAPI(), APIRouter(route_class=route_class)

    @router.get("/")
    async def endpoint(request: Request) -> Any:
        return respond(request)

    app.include_router(router)
    return app


routes = pytest.mark.parametrize("route_class", [APIRoute, CancellableRoute])


async def visited(app: Any, path: str = "/") -> Visit:
    """By a client that stays to the end."""
    visit = await LeavingClient(app).get(path)
    visit.assert_clean()
    return visit


async def body_of(app: Any) -> bytes:
    return (await visited(app)).body


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
    visit = await visited(app, "/events")
    assert visit.status == 200
    assert visit.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert visit.body == numbered("Event", range(10))


async def test_basic_usage() -> None:
    class Item:
        def __init__(self, id: int) -> None:
            self.id = id

        def __str__(self) -> str:
            return f"item {self.id}"

    response = run("async def stream_data():", data=[Item(1), Item(2)])["returned"]
    assert await body_of(response) == (
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
    assert await body_of(SSEResponse([event])) == expected


async def test_custom_ping() -> None:
    """Their heartbeat comes every ten seconds; ours when nothing else has."""

    async def generate() -> AsyncIterator[str]:
        while b": Custom" not in visit.body:
            await anyio.lowlevel.checkpoint()
        yield "seen"

    response = run("def custom_ping", generate_events=generate)["returned"]
    assert response.ping_interval == 10
    response.ping_interval = 0.01
    async with LeavingClient(response).visit("GET", "/") as visit:
        pass
    assert re.fullmatch(rb"(: Custom ping message\r\n\r\n)+data: seen\r\n\r\n", visit.body)


def test_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their responses are made in threads that have an event loop of their own; here they are sent there, too."""
    bodies: list[bytes] = []

    def respond(content: Any) -> SSEResponse:
        response = SSEResponse(content)
        bodies.append(asyncio.get_event_loop().run_until_complete(body_of(response)))
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

    body = await body_of(application(respond, route_class))
    assert body == b"id: 1\r\ndata: Ada\r\n\r\nid: 2\r\ndata: Bob\r\n\r\n"
    assert closed == [True]


@routes
async def test_error_handling_and_timeouts(route_class: type[APIRoute]) -> None:
    def respond(request: Request) -> Any:
        return run("async def robust_stream", request=request)["returned"]

    visit = await visited(application(respond, route_class))
    assert visit.body == numbered("Item", range(100))
    assert visit.headers["cache-control"] == "no-cache"


async def test_memory_channels() -> None:
    """The channel is closed: AnyIO warns of one that is not."""
    response = await run("async def data_producer")["channel_endpoint"](None)
    assert await body_of(response) == numbered("Item", range(10))
    with pytest.raises(anyio.ClosedResourceError):
        response.body_iterator.receive_nowait()


async def test_cooperative_shutdown() -> None:
    """The generator sees `shutdown_event` and says its own farewell, uninterrupted."""
    response = await run("async def graceful_stream")["graceful_stream"](None)
    async with LeavingClient(response).visit("GET", "/") as visit:
        await visit.until(after_event("tick"))
        assert drain() == 1
    visit.assert_clean()
    assert visit.body == b"data: tick\r\n\r\nevent: shutdown\r\ndata: Server is shutting down\r\n\r\n"


@routes
async def test_client_disconnection(route_class: type[APIRoute]) -> None:
    stream = run("async def monitored_stream")["monitored_stream"]
    app = application(lambda request: SSEResponse(stream(request)), route_class)
    assert await body_of(app) == numbered("Event", range(100))


@routes
async def test_client_disconnection_is_noticed(
    route_class: type[APIRoute], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The generator is interrupted while it sleeps."""
    stream = run("async def monitored_stream")["monitored_stream"]
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: anyio.Event().wait())
    app = application(lambda request: SSEResponse(stream(request)), route_class)
    (await LeavingClient(app).get("/", leave=after_event("Event 0"))).assert_clean()
    assert capsys.readouterr().out == "Stream cancelled\n"


async def test_connection_limits() -> None:
    limiter = run("class ConnectionLimiter", generate_events=generate_events)["ConnectionLimiter"]()
    assert await body_of(await limiter.limited_endpoint(None)) == b"data: given\r\n\r\n"


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

    async def endless() -> AsyncIterator[str]:
        pytest.fail("the stream was opened")
        yield ""

    async def asked(scope: Scope, receive: Receive, send: Send) -> None:
        await SSEResponse(endless())({**scope, "method": method}, receive, send)

    assert await body_of(asked) == b""


async def test_a_memory_channel_is_closed() -> None:
    """Whoever feeds it is told that nobody listens any more."""
    sender, receiver = anyio.create_memory_object_stream[str](1)
    sender.send_nowait("x")
    (await LeavingClient(SSEResponse(receiver)).get("/", leave=after_event("x"))).assert_clean()
    with sender, pytest.raises(anyio.BrokenResourceError):
        sender.send_nowait("y")


async def test_a_shutdown_does_not_wait_for_a_client_that_does_not_read() -> None:
    """C22: the farewell and the end of the response are tried, and given up."""

    async def feed() -> AsyncIterator[str]:
        await anyio.Event().wait()
        yield ""

    async def behind(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_the_start(message: Message) -> None:
            await (send(message) if message["type"] == "http.response.start" else anyio.Event().wait())

        await SSEResponse(feed(), farewell="bye")(scope, receive, send_the_start)

    async with LeavingClient(behind).visit("GET", "/") as visit:
        await visit.until(after_start())
        assert drain() == 1
    assert not visit.completed
