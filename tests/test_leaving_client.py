"""The client that leaves, in process: requests, moments, servers' habits, what came of a visit. On asyncio and Trio."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from fastapi import FastAPI, Request
from starlette.responses import FileResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import fastapi_cancel.testing as kit
from fastapi_cancel import CancellableRoute, CancellableStreamingResponse
from fastapi_cancel.testing import (
    Habits,
    LeavingClient,
    Moment,
    NeverCame,
    Patience,
    Visit,
    after_body,
    after_chunks,
    after_event,
    after_start,
    at_wait,
    before_body,
    during_send,
    when,
)
from fastapi_cancel.testing.habits import SERVERS

from .conftest import named

pytestmark = pytest.mark.anyio
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])
on_trio = pytest.mark.parametrize("anyio_backend", ["trio"])

SHORT = 0.001
DEADLINE = 10
"""Seconds after which a test has hung."""

START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}


def chunk(body: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


END = chunk(b"", more=False)


async def read(receive: Receive) -> tuple[list[bytes], str]:
    """The pieces of the body, and the type of the last message."""
    pieces = []
    while True:
        message = await receive()
        if message["type"] == "http.request":
            pieces.append(message["body"])
        if not message.get("more_body", False):
            return pieces, message["type"]


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Tells what it was asked."""
    pieces, _ = await read(receive)
    told = {
        "method": scope["method"],
        "path": scope["path"],
        "raw_path": scope["raw_path"].decode(),
        "query": scope["query_string"].decode(),
        "headers": [[name.decode(), value.decode()] for name, value in scope["headers"]],
        "pieces": [piece.decode() for piece in pieces],
    }
    await send(START)
    await send(chunk(json.dumps(told).encode(), more=False))


def counting(chunks: int = 3) -> ASGIApp:
    """Sends ``x1``, ``x2``, ... and then waits for its client to leave."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read(receive)
        await send(START)
        for number in range(1, chunks + 1):
            await send(chunk(b"x%d" % number))
        assert (await receive())["type"] == "http.disconnect"

    return app


def sending(*messages: Message, start: Message = START) -> ASGIApp:
    """Sends these, and returns."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in (start, *messages):
            await send(message)

    return app


def with_state(app: ASGIApp) -> FastAPI:
    """``app`` in one that has a lifespan."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
        yield {"begun": True}

    outer = FastAPI(lifespan=lifespan)
    outer.mount("/", app)
    return outer


async def asked(app: ASGIApp = echo, method: str = "GET", path: str = "/", **options: Any) -> Any:
    visit = await LeavingClient(app).request(method, path, **options)
    visit.assert_clean()
    return json.loads(visit.body)


@asynccontextmanager
async def failing(
    error: type[Exception], client: LeavingClient, match: str | None = None, **options: Any
) -> AsyncIterator[Visit]:
    """A visit whose block ends with this error."""
    with anyio.fail_after(DEADLINE), pytest.raises(error, match=match):
        async with client.visit("GET", "/", **options) as visit:
            yield visit


def kinds(visit: Visit) -> list[str]:
    return [fault.kind for fault in visit.faults]


# -- a request ---------------------------------------------------------------------------------


async def test_a_client_that_stays(anyio_backend: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        await send(chunk(b"one"))
        await send(chunk(b""))
        await send(chunk(b"two", more=False))

    visit = await LeavingClient(app).get("/path")
    assert (visit.status, visit.headers["Content-Type"], visit.chunks) == (200, "text/plain", [b"one", b"two"])
    assert (visit.body, visit.completed, visit.over) == (b"onetwo", True, True)
    assert (visit.left, visit.lasted, visit.cause, visit.error, visit.faults) == (None, None, None, None, [])
    assert repr(visit) == "<Visit GET /path 200, 2 chunks>"
    visit.assert_clean()


async def test_what_is_asked(anyio_backend: str) -> None:
    told = await asked(
        method="put",
        path="/a%20b/grüße?x=1",
        params=[("y", "2 3"), ("z", [4, 5])],
        headers={"X-One": "1", "HOST": "example.org"},
    )
    assert (told["method"], told["path"], told["raw_path"]) == ("PUT", "/a b/grüße", "/a%20b/gr%C3%BC%C3%9Fe")
    assert told["query"] == "x=1&y=2+3&z=4&z=5"
    assert told["headers"] == [["host", "example.org"], ["x-one", "1"]]


async def test_headers_of_every_request(anyio_backend: str) -> None:
    client = LeavingClient(echo, headers={"Authorization": "me", "Accept": "text/html"})
    visit = await client.get("/", headers={"accept": "text/plain"})
    expected = [["host", "testserver"], ["authorization", "me"], ["accept", "text/plain"]]
    assert json.loads(visit.body)["headers"] == expected


async def in_time() -> AsyncIterator[bytes]:
    yield b"one"
    await anyio.sleep(SHORT)
    yield b"two"


@pytest.mark.parametrize(
    ("options", "pieces", "header"),
    [
        ({}, [""], None),
        ({"content": b""}, [""], ["content-length", "0"]),
        ({"content": b"one"}, ["one"], ["content-length", "3"]),
        ({"content": "grüße"}, ["grüße"], ["content-length", "7"]),
        ({"content": [b"one", b"two"]}, ["one", "two"], ["content-length", "6"]),
        ({"content": (b"one", b"two")}, ["one", "two"], ["content-length", "6"]),
        ({"json": {"a": [1]}}, ['{"a": [1]}'], ["content-length", "10"]),
    ],
)
async def test_a_body(anyio_backend: str, options: dict[str, Any], pieces: list[str], header: list[str] | None) -> None:
    told = await asked(method="POST", **options)
    assert told["pieces"] == pieces
    assert header is None or header in told["headers"]
    assert (["content-type", "application/json"] in told["headers"]) is ("json" in options)


async def test_a_body_that_comes_in_time(anyio_backend: str) -> None:
    visit = await LeavingClient(echo).post("/", content=in_time())
    told = json.loads(visit.body)
    assert "".join(told["pieces"]) == "onetwo" and visit.uploaded == 6
    assert ["transfer-encoding", "chunked"] in told["headers"]


async def test_a_json_of_another_type(anyio_backend: str) -> None:
    told = await asked(json=[], headers={"Content-Type": "application/problem+json"})
    assert [value for name, value in told["headers"] if name == "content-type"] == ["application/problem+json"]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"path": "relative"}, ValueError, "path: begins with a slash, unlike 'relative'"),
        ({"json": 1, "content": b""}, ValueError, "content, json: one of them"),
        ({"content": ["text"]}, TypeError, "content: bytes, text, or an iterable of bytes, not of 'text'"),
    ],
)
async def test_a_request_that_cannot_be_made(
    anyio_backend: str, arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as info:
        await LeavingClient(echo).get(**{"path": "/", **arguments})
    assert str(info.value) == text


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: LeavingClient("app"), TypeError, "app: an ASGI application, not 'app'"),  # type: ignore[arg-type]
        (lambda: LeavingClient(echo, server="apache"), ValueError, "server: one of uvicorn, gunicorn, hypercorn"),
        (lambda: Habits(cancels_after=-1), ValueError, "cancels_after: seconds (>= 0) or None, not -1"),
        (lambda: Habits(after_completion="?"), ValueError, "after_completion: 'http.disconnect' or 'waits', not '?'"),  # type: ignore[arg-type]
        (
            lambda: Habits(extensions=frozenset({"x", "http.response.push"})),
            ValueError,
            "extensions: some of http.response.pathsend, http.response.trailers, not http.response.push, x",
        ),
        (lambda: Patience(untold=0), ValueError, "untold: seconds (> 0), not 0"),
        (lambda: Patience(cancelled="x"), ValueError, "cancelled: seconds (> 0), not 'x'"),  # type: ignore[arg-type]
        (lambda: after_body(-1), ValueError, "size: a number (>= 0), not -1"),
        (lambda: after_chunks(0), ValueError, "count: a number (>= 1), not 0"),
        (lambda: during_send(0), ValueError, "chunk: a number (>= 1), not 0"),
        (lambda: at_wait("1"), ValueError, "number: a number (>= 1), not '1'"),  # type: ignore[arg-type]
        (lambda: after_event(1), TypeError, "match: text, or a function, not 1"),  # type: ignore[arg-type]
        (lambda: when(1), TypeError, "condition: an event or a function, not 1"),  # type: ignore[arg-type]
    ],
)
def test_a_bad_argument_is_named(make: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as info:
        make()
    assert str(info.value).startswith(text)


def test_what_the_kit_offers() -> None:
    for name in kit.__all__:
        assert getattr(kit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kit.nothing  # noqa: B018


# -- when it leaves ----------------------------------------------------------------------------


@pytest.mark.parametrize("moment", [before_body(), after_body(0)])
async def test_before_the_body(anyio_backend: str, moment: Moment) -> None:
    heard = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        heard.append(await read(receive))

    visit = await LeavingClient(app).post("/", content=b"one", leave=moment)
    assert heard == [([], "http.disconnect")]
    assert (visit.uploaded, visit.status, visit.faults) == (0, None, [])
    assert visit.left is not None and visit.lasted is not None and visit.lasted >= 0


@pytest.mark.parametrize(
    ("size", "pieces"),
    [
        (2, [b"on"]),
        (3, [b"one"]),
        (4, [b"one", b"t"]),
        (9, [b"one", b"two", b"six"]),
    ],
)
async def test_after_a_part_of_the_body(anyio_backend: str, size: int, pieces: list[bytes]) -> None:
    heard: list[list[bytes]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        heard.append((await read(receive))[0])
        assert (await receive())["type"] == "http.disconnect"

    visit = await LeavingClient(app).post("/", content=[b"one", b"two", b"six"], leave=after_body(size))
    assert (heard, visit.uploaded, visit.faults) == ([pieces], size, [])


async def test_in_the_middle_of_a_body_that_comes_in_time(anyio_backend: str) -> None:
    app = FastAPI()
    app.router.route_class = CancellableRoute
    uploaded = bytearray()

    @app.post("/")
    async def upload(request: Request) -> None:
        async for piece in request.stream():
            uploaded.extend(piece)

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"four"
            await anyio.sleep(SHORT)

    visit = await LeavingClient(app).post("/", content=endless(), leave=after_body(10))
    assert (bytes(uploaded), visit.cause, visit.faults) == (b"fourfourfo", "disconnect", [])


async def test_after_the_start(anyio_backend: str) -> None:
    visit = await LeavingClient(counting()).get("/", leave=after_start())
    assert (visit.status, visit.chunks, visit.completed) == (200, [], False)


async def test_after_some_chunks(anyio_backend: str) -> None:
    visit = await LeavingClient(counting()).get("/", leave=after_chunks(2))
    assert visit.chunks == [b"x1", b"x2"]


@pytest.mark.parametrize("match", ["b", lambda event: event.data.endswith("b")])
async def test_after_an_event(anyio_backend: str, match: Any) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        for piece in (b"data: a\n", b"\ndata: a", b"b\n", b"\n", b"data: c\n\n"):
            await send(chunk(piece))

    visit = await LeavingClient(app).get("/", leave=after_event(match))
    assert [event.data for event in visit.events] == ["a", "ab"]


async def test_during_a_send(anyio_backend: str) -> None:
    sent = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        for number in (1, 2):
            sent.append(number)
            await send(chunk(b"x%d" % number))
            sent.append(number)

    visit = await LeavingClient(app).get("/", leave=during_send(2))
    assert (visit.chunks, visit.sending, sent) == ([b"x1"], None, [1, 1, 2, 2])


@pytest.mark.parametrize("number", [1, 2, 3])
async def test_at_a_wait(anyio_backend: str, number: int) -> None:
    steps = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(5):
            steps.append(visit.left is not None)
            await anyio.sleep(0)

    async with LeavingClient(app).visit("GET", "/", leave=at_wait(number)) as visit:
        pass
    assert steps == [False] * number + [True] * (5 - number)
    assert "test_at_a_wait.<locals>.app" in str([site.function for site in visit.left_at])


async def test_at_the_wait_for_the_client_itself(anyio_backend: str) -> None:
    """Trio wakes nobody who does not yet wait."""
    visit = await LeavingClient(counting(2)).get("/", leave=at_wait(1))
    assert (visit.chunks, visit.faults) == ([b"x1", b"x2"], [])


def event_of(kind: str) -> Any:
    """An event, and what sets it."""
    if kind == "backend":
        import trio

        event: Any = asyncio.Event() if asyncio._get_running_loop() else trio.Event()
    else:
        event = anyio.Event() if kind == "anyio" else threading.Event()
    return event, event.set


def function_of(kind: str) -> Any:
    called: list[bool] = []
    event, set_it = event_of("anyio")

    async def when_it_is_set() -> None:
        await event.wait()

    class Condition:
        async def __call__(self) -> None:
            await event.wait()

    if kind == "function":
        return (lambda: bool(called)), (lambda: called.append(True))
    return (when_it_is_set if kind == "coroutine function" else Condition()), set_it


@pytest.mark.parametrize("kind", ["backend", "anyio", "thread", "function", "coroutine function", "async object"])
async def test_when_something_happens(anyio_backend: str, kind: str) -> None:
    condition, happens = (event_of if kind in ("backend", "anyio", "thread") else function_of)(kind)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read(receive)
        assert visit.left is None
        happens()
        assert (await receive())["type"] == "http.disconnect"

    with anyio.fail_after(DEADLINE):
        async with LeavingClient(app).visit("GET", "/", leave=when(condition)) as visit:
            pass
    assert visit.left is not None and visit.faults == []


async def test_a_threads_event_that_is_never_set_holds_up_nothing(anyio_backend: str) -> None:
    """No thread waits for it."""
    before = threading.active_count()
    with pytest.raises(NeverCame):
        await LeavingClient(echo).get("/", leave=when(threading.Event()))
    assert threading.active_count() == before


def test_moments_have_names() -> None:
    moments = [before_body(), after_body(3), after_start(), after_chunks(2), after_event("x"), during_send(4)]
    assert [repr(each) for each in moments] == [
        "before_body()",
        "after_body(3)",
        "after_start()",
        "after_chunks(2)",
        "after_event('x')",
        "during_send(4)",
    ]
    assert repr(at_wait(5)) == "at_wait(5)"
    assert repr(when(test_moments_have_names)) == "when(test_moments_have_names)"


# -- a moment that never comes -----------------------------------------------------------------


@pytest.mark.parametrize("moment", [after_chunks(9), when(lambda: False), when(anyio.sleep_forever)])
async def test_a_client_that_never_left(anyio_backend: str, moment: Moment) -> None:
    with pytest.raises(NeverCame) as info:
        await LeavingClient(echo).get("/", leave=moment)
    assert str(info.value) == f"<Visit GET / 200, 1 chunks> was over before {moment!r}"


async def broken(scope: Scope, receive: Receive, send: Send) -> None:
    raise ValueError("broken")


async def test_why_a_client_never_left(anyio_backend: str) -> None:
    with pytest.raises(NeverCame) as info:
        await LeavingClient(broken).get("/", leave=after_start())
    assert "was over before after_start()\nerror: ValueError('broken') reached the server, from\n" in str(info.value)


@pytest.mark.parametrize("moment", [after_chunks(1), when(lambda: False), when(anyio.sleep_forever)])
async def test_waiting_for_what_never_comes(anyio_backend: str, moment: Moment) -> None:
    message = f"<Visit GET / None, 0 chunks> was over before {moment!r}\nerror: ValueError('broken') reached the server"
    async with failing(NeverCame, LeavingClient(broken), match="^" + re.escape(message)) as visit:
        await visit.until(moment)
    assert kinds(visit) == ["error"]


# -- stalling ----------------------------------------------------------------------------------


async def test_a_client_that_stops_reading_and_reads_on(anyio_backend: str) -> None:
    app = counting(4)
    async with LeavingClient(app).visit("GET", "/", stall=after_chunks(2)) as visit:
        await visit.until(Moment("it sends the third", lambda visit: visit.sending == 3))
        assert visit.chunks == [b"x1", b"x2"]
        visit.resume()
        await visit.until(after_chunks(4))
        visit.leave()
    assert (visit.body, visit.faults) == (b"x1x2x3x4", [])


async def test_when_a_stalled_client_reads_on(anyio_backend: str) -> None:
    seen: list[int] = []

    async def sends() -> None:
        while visit.sending is None:
            await anyio.sleep(SHORT)
        seen.append(visit.sending)

    client = LeavingClient(counting(4))
    async with client.visit("GET", "/", stall=after_chunks(1), resume=when(sends), leave=after_chunks(4)) as visit:
        pass
    assert (seen, visit.faults) == ([2], [])


async def test_a_client_that_does_not_read_one_chunk(anyio_backend: str) -> None:
    """The moment to read on may be one of the visit's own; it counts from the stall on."""
    resumed = Moment("it sends", lambda visit: visit.sending == 2)
    client = LeavingClient(counting(3))
    async with client.visit("GET", "/", stall=during_send(2), resume=resumed, leave=after_chunks(3)) as visit:
        pass
    assert (len(visit.chunks), visit.faults) == (3, [])


async def test_stalling_when_something_happens(anyio_backend: str) -> None:
    stalls, reads = anyio.Event(), anyio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        while visit.left is None:
            await send(chunk(b"x"))
            await anyio.sleep(SHORT)

    async with LeavingClient(app).visit("GET", "/", stall=when(stalls), resume=when(reads)) as visit:
        await visit.until(after_chunks(1))
        stalls.set()
        await visit.until(Moment("it sends", lambda visit: visit.sending is not None))
        read = len(visit.chunks)
        reads.set()
        await visit.until(after_chunks(read + 1))
        visit.leave()
    assert visit.faults == []


async def test_reading_on_before_the_stall_is_no_reading_on(anyio_backend: str) -> None:
    reads = anyio.Event()
    reads.set()
    client = LeavingClient(counting(3))
    async with client.visit("GET", "/", stall=after_chunks(2), resume=when(reads), leave=after_chunks(3)) as visit:
        pass
    assert visit.chunks == [b"x1", b"x2", b"x3"]


async def test_a_stalled_client_that_leaves(anyio_backend: str) -> None:
    visit = await LeavingClient(counting(3)).get("/", stall=after_chunks(1), leave=during_send(2))
    assert (visit.chunks, visit.faults) == ([b"x1"], [])


async def test_a_stalled_client_holds_up_an_empty_last_body(anyio_backend: str) -> None:
    """With a full buffer uvicorn waits before whatever it is to write, and Hypercorn after it."""
    async with LeavingClient(sending(chunk(b"x1"), END)).visit("GET", "/", stall=after_chunks(1)) as visit:
        await visit.until(Moment("it sends", lambda visit: visit.sending is not None))
        assert (visit.sending, visit.completed) == (2, False)
        visit.resume()
    assert (visit.chunks, visit.completed, visit.faults) == ([b"x1"], True, [])


async def test_an_empty_last_body_is_no_chunk(anyio_backend: str) -> None:
    with pytest.raises(NeverCame):
        await LeavingClient(sending(chunk(b"x1"), END)).get("/", leave=during_send(2))


@on_asyncio
async def test_during_a_send_that_nobody_watches(anyio_backend: str) -> None:
    """A heartbeat, say: it may be sent by a task that serves all requests."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        work: Any = send(chunk(b"x1"))
        helper: asyncio.Task[None] = asyncio.get_running_loop().create_task(work, context=Context())
        with suppress(OSError):
            await helper

    with anyio.fail_after(DEADLINE):
        visit = await LeavingClient(app, server="asgi").get("/", leave=during_send(1))
    assert (visit.chunks, visit.faults) == ([], [])


async def test_who_gives_up_a_client_that_does_not_read_may_return(anyio_backend: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        with anyio.move_on_after(SHORT):
            await send(chunk(b"x1"))

    visit = await LeavingClient(app).get("/", stall=after_start())
    assert (visit.completed, visit.given_up, visit.faults) == (False, True, [])


@on_asyncio
async def test_who_gives_up_a_client_may_return_before_its_helper_does(anyio_backend: str) -> None:
    """Which is on its way out."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        work: Any = send(chunk(b"x1"))
        loop = asyncio.get_running_loop()
        helper = loop.create_task(work)
        await anyio.sleep(SHORT)

        def end_in(turns: int) -> None:
            if turns:
                loop.call_soon(end_in, turns - 1)
            else:
                helper.cancel()

        end_in(4)

    visit = await LeavingClient(app).get("/", stall=after_start())
    assert (visit.completed, visit.given_up, visit.faults) == (False, True, [])


# -- beside a block ----------------------------------------------------------------------------


async def test_a_request_beside_a_block(anyio_backend: str) -> None:
    async with LeavingClient(counting()).visit("GET", "/") as visit:
        assert (visit.status, visit.over) == (None, False)
        await visit.until(after_chunks(3))
        await visit.until(after_start())  # that has been
        assert (visit.chunks, visit.over, visit.left) == ([b"x1", b"x2", b"x3"], False, None)
        assert "counting.<locals>.app" in visit.where
        visit.leave()
        assert not visit.over
    assert (visit.over, visit.faults) == (True, [])


async def test_waiting_for_something_outside(anyio_backend: str) -> None:
    happened = anyio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await anyio.sleep(SHORT)
        happened.set()
        await read(receive)
        await receive()

    async with LeavingClient(app).visit("GET", "/") as visit:
        await visit.until(when(happened))
        assert happened.is_set()
        visit.leave()
    assert visit.faults == []


async def test_the_application_itself_does_not_wait_for_its_own_moments(anyio_backend: str) -> None:
    """Its wait for the next thing to happen would be the next thing."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        await visit.until(after_chunks(1))

    with anyio.fail_after(DEADLINE):
        async with LeavingClient(app).visit("GET", "/") as visit:
            pass
    assert repr(visit.error).startswith("RuntimeError('until() is for the test")


async def test_a_body_is_cut_where_the_test_waits_for(anyio_backend: str) -> None:
    async with LeavingClient(echo).visit("POST", "/", content=b"onetwo") as visit:
        await visit.until(after_body(3))
    assert json.loads(visit.body)["pieces"] == ["one", "two"]


async def test_a_chunk_is_not_read_while_the_test_waits_for(anyio_backend: str) -> None:
    async with LeavingClient(counting(2)).visit("GET", "/", leave=after_chunks(2)) as visit:
        await visit.until(during_send(2))
        assert (visit.sending, visit.chunks) == (2, [b"x1"])
        visit.resume()
    assert (visit.chunks, visit.faults) == ([b"x1", b"x2"], [])


async def test_who_leaves_after_the_end_has_not_left(anyio_backend: str) -> None:
    async with LeavingClient(echo).visit("GET", "/") as visit:
        await visit.until(Moment("the end", lambda visit: visit.over))
        visit.leave()
    assert (visit.left, visit.lasted, visit.faults) == (None, None, [])


async def test_the_block_may_leave_twice(anyio_backend: str) -> None:
    async with LeavingClient(counting()).visit("GET", "/") as visit:
        visit.leave()
        left = visit.left
        visit.leave()
    assert visit.left == left


async def test_whether_the_body_was_asked_for(anyio_backend: str) -> None:
    """On a server that sends ``100 Continue`` when the application reads."""
    headers = {"Expect": "100-continue"}

    async def refuses(scope: Scope, receive: Receive, send: Send) -> None:
        await send({**START, "status": 413})
        await send(chunk(b"", more=False))

    visit = await LeavingClient(refuses).post("/", content=b"x", headers=headers)
    assert (visit.status, visit.invited, visit.uploaded) == (413, False, 0)
    visit = await LeavingClient(echo).post("/", content=b"x", headers=headers)
    assert (visit.status, visit.invited, visit.uploaded) == (200, True, 1)


# -- the habits of servers ---------------------------------------------------------------------


async def test_the_version_that_a_server_gives(anyio_backend: str) -> None:
    given = {}
    for server in SERVERS:

        async def app(scope: Scope, receive: Receive, send: Send, server: str = server) -> None:
            given[server] = scope["asgi"].get("spec_version")
            await send(START)
            await send(chunk(b"", more=False))

        visit = await LeavingClient(app, server=server).get("/")
        assert visit.faults == []
    assert given == {
        "uvicorn": "2.3",
        "gunicorn": "2.4",
        "hypercorn": "2.1",
        "granian": "2.3",
        "daphne": None,
        "asgi": "2.4",
    }


async def wait_for(receive: Receive, kind: str) -> bool:
    """Whether a message comes at all; it must be of that kind."""
    with anyio.move_on_after(0.05) as limit:
        assert (await receive())["type"] == kind
    return not limit.cancelled_caught


@pytest.mark.parametrize("again", [True, False])
async def test_the_disconnect_may_be_told_once_only(anyio_backend: str, again: bool) -> None:
    told = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        told.extend([await wait_for(receive, "http.disconnect") for _ in range(3)])

    visit = await LeavingClient(app, server=Habits(again=again)).get("/", leave=before_body())
    assert (told, visit.faults) == ([True, again, again], [])


@pytest.mark.parametrize("raises", [True, False])
async def test_a_send_may_raise_once_the_client_has_left(anyio_backend: str, raises: bool) -> None:
    errors = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in (START, chunk(b"x"), chunk(b"", more=False)):
            try:
                await send(message)
            except OSError as exc:
                errors.append(str(exc))

    visit = await LeavingClient(app, server=Habits(raises=raises)).get("/", leave=after_start())
    assert errors == (["the client has left"] * 2 if raises else [])
    assert (visit.status, visit.chunks, visit.was_told()) == (200, [], raises)


async def test_what_a_send_has_raised_may_come_back_to_its_server(anyio_backend: str) -> None:
    """That is how an application ends by ASGI 2.4."""
    visit = await LeavingClient(counting(), server="asgi").get("/", leave=after_chunks(1))
    assert (str(visit.error), visit.faults) == ("the client has left", [])


async def test_another_error_of_the_operating_system_is_one(anyio_backend: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        raise FileNotFoundError("rows.csv")

    visit = await LeavingClient(app, server="asgi").get("/", leave=after_start())
    assert kinds(visit) == ["error"]


TRAILERS = "http.response.trailers"
PATHSEND = "http.response.pathsend"
WITH_TRAILERS = {**START, "trailers": True}


async def test_trailers(anyio_backend: str) -> None:
    """As Hypercorn, gunicorn and uvicorn take them over HTTP/2."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["extensions"] == {TRAILERS: {}}
        await send(WITH_TRAILERS)
        await send(chunk(b"x", more=False))
        completed.append(visit.completed)
        await send({"type": TRAILERS, "headers": [(b"one", b"1")], "more_trailers": True})
        completed.append(visit.completed)
        await send({"type": TRAILERS, "headers": [(b"two", b"2")]})
        completed.append(visit.completed)

    completed: list[bool] = []
    async with LeavingClient(app, server=Habits(extensions=frozenset({TRAILERS}))).visit("GET", "/") as visit:
        pass
    assert (completed, dict(visit.trailers), visit.faults) == ([False, False, True], {"one": "1", "two": "2"}, [])


async def test_trailers_that_never_came(anyio_backend: str) -> None:
    habits = Habits(extensions=frozenset({TRAILERS}))
    visit = await LeavingClient(sending(END, start=WITH_TRAILERS), server=habits).get("/")
    assert [str(fault) for fault in visit.faults] == ["error: the application returned without a complete response"]


async def test_a_file_that_the_server_sends_itself(anyio_backend: str, tmp_path: Path) -> None:
    """Granian does. Starlette lets it where it offers to."""
    (file := tmp_path / "file").write_bytes(b"rows")
    app = FastAPI()

    @app.get("/")
    async def download(request: Request) -> FileResponse:
        offered.append(request.scope.get("extensions"))
        return FileResponse(file)

    offered: list[Any] = []
    for server in ("granian", "uvicorn"):
        visit = await LeavingClient(app, server=server).get("/")
        assert (visit.body, visit.completed, visit.faults) == (b"rows", True, [])
    assert offered == [{PATHSEND: {}}, None]


@pytest.mark.parametrize("after", ["http.disconnect", "waits"])
async def test_after_the_response_the_client_may_be_said_to_have_left(anyio_backend: str, after: Any) -> None:
    told = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read(receive)
        await send(START)
        await send(chunk(b"", more=False))
        told.append(await wait_for(receive, "http.disconnect"))

    visit = await LeavingClient(app, server=Habits(after_completion=after)).get("/")
    assert (told, visit.left, visit.faults) == ([after == "http.disconnect"], None, [])


async def test_a_server_that_cancels(anyio_backend: str) -> None:
    """As gunicorn does: natively, some time after the client has left."""
    cancelled = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            cancelled.append(visit.left is not None)
            raise

    async with LeavingClient(app, server=Habits(cancels_after=0.02)).visit("GET", "/", leave=at_wait(1)) as visit:
        pass
    assert (cancelled, visit.faults) == ([True], [])
    assert type(visit.error).__name__ in ("CancelledError", "Cancelled")
    assert visit.lasted is not None and visit.lasted > 0.02


async def test_a_server_that_cancels_does_so_once(anyio_backend: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.05)

    visit = await LeavingClient(app, server=Habits(cancels_after=0)).get("/", leave=at_wait(1))
    assert visit.faults == []


async def test_a_server_that_starts_with_the_whole_body(anyio_backend: str) -> None:
    started = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        started.append(len(pieces))
        await echo(scope, receive, send)

    pieces: list[bytes] = []

    async def in_time() -> AsyncIterator[bytes]:
        for piece in (b"one", b"two", b"six"):
            await anyio.sleep(SHORT)
            yield piece
            pieces.append(piece)

    visit = await LeavingClient(app, server="daphne").post("/", content=in_time())
    assert (started, json.loads(visit.body)["pieces"], visit.faults) == ([3], ["onetwosix"], [])
    visit = await LeavingClient(app, server="daphne").get("/")
    assert (json.loads(visit.body)["pieces"], visit.invited) == ([""], True)


@pytest.mark.parametrize("moment", [before_body(), after_body(4), when(anyio.lowlevel.checkpoint)])
async def test_such_a_server_does_not_start_for_a_client_that_left_before(anyio_backend: str, moment: Moment) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            await anyio.sleep(SHORT)
            yield b"one"

    visit = await LeavingClient(broken, server="daphne").post("/", content=endless(), leave=moment)
    assert (visit.over, visit.status, visit.invited, visit.waits, visit.faults) == (True, None, False, 0, [])


async def test_such_a_server_delivers_a_body_before_it_tells_that_its_client_has_left(anyio_backend: str) -> None:
    heard = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        heard.append(await read(receive))
        heard.append(await read(receive))

    visit = await LeavingClient(app, server="daphne").post("/", content=b"one", leave=after_body(3))
    assert (heard, visit.faults) == ([([b"one"], "http.request"), ([], "http.disconnect")], [])


@pytest.mark.parametrize("back_pressure", [True, False])
async def test_a_send_may_not_wait_for_a_client_that_does_not_read(anyio_backend: str, back_pressure: bool) -> None:
    async with LeavingClient(counting(3), server=Habits(back_pressure=back_pressure)).visit("GET", "/") as visit:
        visit.stall()
        await visit.until(at_wait(1))
        assert len(visit.chunks) == (0 if back_pressure else 3)
        visit.leave()
    assert visit.faults == []


@pytest.mark.parametrize("yields", [True, False])
async def test_a_send_may_let_the_event_loop_turn(anyio_backend: str, yields: bool) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        await send(chunk(b"", more=False))

    visit = await LeavingClient(app, server=Habits(yields=yields)).get("/")
    assert (visit.waits > 0) is yields


async def test_a_send_lets_the_event_loop_turn_some_day(anyio_backend: str) -> None:
    """Else an application that never waits would go on until the end of time, and the test with it."""

    async def numbers() -> AsyncIterator[bytes]:
        while True:
            yield b"x"

    app = FastAPI()

    @app.get("/")
    async def stream() -> CancellableStreamingResponse:
        return CancellableStreamingResponse(numbers())

    with anyio.fail_after(DEADLINE):
        visit = await LeavingClient(app).get("/", leave=after_chunks(2))
    assert visit.cause == "disconnect"

    async def deaf(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        while True:
            await send(chunk(b"x"))

    with anyio.fail_after(DEADLINE):
        visit = await LeavingClient(deaf).get("/", leave=after_chunks(2))
    assert kinds(visit) == ["went on"]


# -- what came of it ---------------------------------------------------------------------------


async def test_an_application_that_raises(anyio_backend: str) -> None:
    visit = await LeavingClient(broken).get("/")
    assert isinstance(visit.error, ValueError) and visit.over and visit.status is None
    (fault,) = visit.faults
    assert fault.kind == "error"
    lines = fault.text.splitlines()
    assert lines[0] == "ValueError('broken') reached the server, from"
    assert lines[1].endswith("in broken") and "test_leaving_client.py:" in lines[1]
    with pytest.raises(AssertionError) as info:
        visit.assert_clean()
    assert str(info.value).startswith("<Visit GET / None, 0 chunks>:\nerror: ValueError('broken')")


async def test_an_application_that_raises_a_group(anyio_backend: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(broken, scope, receive, send)

    visit = await LeavingClient(app).get("/")
    assert isinstance(visit.error, ExceptionGroup)
    assert kinds(visit) == ["error"]


@pytest.mark.parametrize("messages", [[], [START], [START, chunk(b"x")]])
async def test_an_application_that_returns_without_a_response(anyio_backend: str, messages: list[Any]) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    visit = await LeavingClient(app).get("/")
    assert [str(fault) for fault in visit.faults] == ["error: the application returned without a complete response"]


@pytest.mark.parametrize(
    "messages",
    [
        [chunk(b"x")],
        [START, START],
        [START, END, chunk(b"x")],
        [{"type": "http.response.debug"}],
        [START, {"type": PATHSEND, "path": "x"}],
        [START, chunk(b"x"), {"type": PATHSEND, "path": "x"}],
        [START, chunk(b"x"), {"type": TRAILERS}],
        [WITH_TRAILERS, END, {"type": TRAILERS}],
        [START, chunk(b"x"), {"type": "http.response.push"}],
    ],
)
async def test_an_application_that_sends_out_of_order(anyio_backend: str, messages: list[Any]) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    visit = await LeavingClient(app).get("/")
    assert f"unexpected {messages[-1]['type']!r}" in str(visit.error)
    assert kinds(visit) == ["error"]


@on_asyncio
async def test_an_application_that_the_test_has_cancelled(anyio_backend: str) -> None:
    """It has not returned, and nobody is to say that it did."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        tasks.append(asyncio.current_task())
        await anyio.sleep_forever()

    tasks: list[Any] = []
    async with LeavingClient(app).visit("GET", "/") as visit:
        await visit.until(at_wait(1))
        tasks[0].cancel()
    assert (visit.cancelled, visit.faults) == (True, [])


@on_asyncio
async def test_an_application_that_awaits_what_it_has_cancelled(anyio_backend: str) -> None:
    """To its server that looks like a cancellation which nobody has asked for, and there is no response."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.create_task(anyio.sleep_forever())
        await anyio.sleep(0)
        task.cancel()
        await task

    visit = await LeavingClient(app).get("/")
    assert [str(fault) for fault in visit.faults] == ["error: the application returned without a complete response"]


async def test_how_long_it_went_on(anyio_backend: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read(receive)
        assert (await receive())["type"] == "http.disconnect"
        await anyio.sleep(0.02)

    visit = await LeavingClient(app).get("/", leave=when(anyio.lowlevel.checkpoint))
    assert visit.lasted is not None and visit.lasted >= 0.02


async def test_why_the_library_ended_it(anyio_backend: str) -> None:
    app = FastAPI()
    app.router.route_class = CancellableRoute

    @app.get("/")
    async def work() -> None:
        await anyio.sleep_forever()

    visit = await LeavingClient(app).get("/", leave=at_wait(1))
    assert (visit.cause, visit.error, visit.faults) == ("disconnect", None, [])


async def test_an_application_that_goes_on(anyio_backend: str) -> None:
    """It is cancelled, and that is no error of its own."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await anyio.sleep_forever()

    visit = await LeavingClient(app, patience=Patience(untold=0.01)).get("/", leave=at_wait(1))
    (fault,) = visit.faults
    assert str(fault).startswith("went on: nobody told it that its client had left, at\n")
    assert fault.text.endswith("test_an_application_that_goes_on.<locals>.app")
    assert (visit.over, visit.error) == (True, None)


async def test_an_application_that_goes_on_though_it_knows(anyio_backend: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await anyio.sleep_forever()

    visit = await LeavingClient(app, patience=Patience(cleanup=0.01)).get("/", leave=before_body())
    (fault,) = visit.faults
    assert re.match(r"went on: it knew that its client had left \d+\.\d s ago, at\n", str(fault))


async def test_an_application_that_goes_on_for_a_client_that_stays(anyio_backend: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await anyio.sleep_forever()

    visit = await LeavingClient(app, patience=Patience(whole=0.01)).get("/")
    (fault,) = visit.faults
    assert re.match(r"went on: its client stayed, and it was not over after \d+\.\d s, at\n", str(fault))


async def test_a_slow_machine_is_no_application_that_goes_on(anyio_backend: str) -> None:
    """It gets its turns, however long they take and however short the patience is."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        for _ in range(3):
            await anyio.sleep(SHORT)
            time.sleep(0.02)

    patience = Patience(untold=0.01, cleanup=0.01)
    for moment in (before_body(), at_wait(1)):
        visit = await LeavingClient(app, patience=patience).get("/", leave=moment)
        assert visit.faults == []


async def stubborn(*errors: type[BaseException]) -> None:
    while True:
        with suppress(*errors):
            await anyio.sleep_forever()


async def swallows_cancellations() -> None:
    await stubborn(anyio.get_cancelled_exc_class())


async def swallows_them_in_a_group() -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(swallows_cancellations)
        await swallows_cancellations()


async def swallows_anything() -> None:
    await stubborn(BaseException)


@pytest.mark.parametrize("work", [swallows_cancellations, swallows_them_in_a_group, swallows_anything])
async def test_an_application_that_does_not_end_when_it_is_cancelled(
    anyio_backend: str, work: Callable[[], Awaitable[None]]
) -> None:
    """It is ended by force: no test hangs for it."""
    if work is swallows_anything and anyio_backend == "trio":
        pytest.skip("Trio itself complains of a task that was ended in the middle of a scope")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await work()

    patience = Patience(untold=0.01, cancelled=0.01)
    with anyio.fail_after(DEADLINE):
        visit = await LeavingClient(app, patience=patience).get("/", leave=at_wait(1))
    assert [fault.text.splitlines()[0] for fault in visit.faults] == [
        "nobody told it that its client had left, at",
        "it was cancelled, and not over 0.01 s later",
    ]
    assert (visit.over, visit.error) == (True, None)


async def test_an_application_that_hides_behind_a_shield(anyio_backend: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        with anyio.CancelScope(shield=True):
            await anyio.sleep_forever()

    patience = Patience(untold=0.01, cancelled=0.01)
    with anyio.fail_after(DEADLINE):
        visit = await LeavingClient(app, patience=patience).get("/", leave=at_wait(1))
    assert kinds(visit) == ["went on"] * (1 if anyio_backend == "asyncio" else 2)  # native cancellation knows no shield


# -- a test that fails, or ends early ----------------------------------------------------------


class Failed(Exception):
    """Raised by a test."""


def fails(*arguments: object) -> bool:
    raise Failed


async def fails_later(*arguments: object) -> None:
    await anyio.sleep(SHORT)
    raise Failed


async def cleaning_up(scope: Scope, receive: Receive, send: Send) -> None:
    """Tells the state when it is over."""
    try:
        await read(receive)
        await send(START)
        await send(chunk(b"data: x\n\n"))
        await receive()
    finally:
        scope["state"]["over"] = True


async def test_a_block_that_raises(anyio_backend: str) -> None:
    """Its error is what the test sees, plain; nothing of the request is left."""
    async with LeavingClient(with_state(cleaning_up)) as client:
        async with failing(Failed, client) as visit:
            await visit.until(after_chunks(1))
            fails()
        assert (visit.over, visit.left is not None, visit.faults) == (True, True, [])


async def test_a_block_that_raises_before_the_application_has_begun(anyio_backend: str) -> None:
    async with failing(Failed, LeavingClient(echo)):
        raise Failed


@pytest.mark.parametrize(
    "options",
    [
        {"leave": after_event(fails)},
        {"leave": when(fails)},
        {"leave": when(fails_later)},
        {"stall": after_event(fails)},
        {"stall": after_chunks(1), "resume": when(fails)},
    ],
    ids=named,
)
async def test_a_condition_that_raises(anyio_backend: str, options: dict[str, Any]) -> None:
    """The test hears of it, not the application."""
    async with LeavingClient(with_state(cleaning_up)) as client, failing(Failed, client, **options) as visit:
        pass
    assert (visit.over, visit.error) == (True, None)


@pytest.mark.parametrize("moment", [when(fails), when(fails_later), after_event(fails)], ids=named)
async def test_waiting_for_a_condition_that_raises(anyio_backend: str, moment: Moment) -> None:
    async with LeavingClient(with_state(cleaning_up)) as client:
        async with failing(Failed, client) as visit:
            await visit.until(moment)
        assert visit.over


async def test_waiting_beside_a_condition_that_raises(anyio_backend: str) -> None:
    """The first error is told, not that the visit was over."""
    async with LeavingClient(with_state(cleaning_up)) as client:
        with anyio.fail_after(DEADLINE), pytest.raises(Failed):
            async with client.visit("GET", "/", leave=when(fails_later)) as visit:
                await visit.until(after_chunks(9))


async def test_a_body_that_raises(anyio_backend: str) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"one"
        raise Failed

    with anyio.fail_after(DEADLINE), pytest.raises(Failed):
        await LeavingClient(echo).post("/", content=pieces())


@pytest.mark.parametrize("where", ["block", "end"])
async def test_a_test_that_is_cancelled(anyio_backend: str, where: str) -> None:
    """Nothing hangs, nothing is left."""
    over = []
    visits = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            over.append(True)

    with anyio.move_on_after(0.02) as limit:
        async with LeavingClient(app).visit("GET", "/") as visit:
            visits.append(visit)
            if where == "block":
                await anyio.sleep_forever()
    assert limit.cancelled_caught
    [visit] = visits
    assert (over, visit.over, visit.faults) == ([True], True, [])
    visit = await LeavingClient(echo).get("/")
    assert visit.faults == []


@on_asyncio
async def test_a_test_that_is_cancelled_natively(anyio_backend: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        tasks.append(asyncio.create_task(asyncio.sleep(60)))
        await asyncio.sleep(60)

    tasks: list[asyncio.Task[None]] = []
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(LeavingClient(app).get("/"), 0.02)
    assert [task.cancelled() for task in tasks] == [True]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, pytest.fail.Exception])
def test_an_error_that_is_for_the_test(error: type[BaseException]) -> None:
    """Ctrl-C, ``pytest.fail()`` in an endpoint: no fault of the application's, and not kept from anybody."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise error("away")

    async def grouped(scope: Scope, receive: Receive, send: Send) -> None:
        raise BaseExceptionGroup("", [ValueError(), error("away")])

    async def waits() -> None:
        async with LeavingClient(app).visit("GET", "/") as visit:
            await visit.until(after_chunks(1))

    for backend in ("asyncio", "trio"):
        with pytest.raises(error, match="away"):
            anyio.run(LeavingClient(app).get, "/", backend=backend)
        with pytest.raises(error, match="away"):
            anyio.run(waits, backend=backend)
        with pytest.raises(BaseExceptionGroup) as info:
            anyio.run(LeavingClient(grouped).get, "/", backend=backend)
        assert isinstance(info.value.exceptions[1], error)


# -- several at once ---------------------------------------------------------------------------


async def test_two_visits_at_once(anyio_backend: str) -> None:
    """Each has its own faults only."""

    async def deaf(scope: Scope, receive: Receive, send: Send) -> None:
        await anyio.sleep_forever()

    visits: list[tuple[str, list[str]]] = []

    async def visit(name: str, app: ASGIApp, **options: Any) -> None:
        visit = await LeavingClient(app, patience=Patience(untold=0.02)).get("/", **options)
        visits.append((name, kinds(visit)))

    async with anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(partial(visit, "deaf", deaf, leave=at_wait(1)))
            group.start_soon(partial(visit, "good", counting(1), leave=after_chunks(1)))
            group.start_soon(partial(visit, "broken", broken))
    assert sorted(visits) == [("broken", ["error"])] * 2 + [("deaf", ["went on"])] * 2 + [("good", [])] * 2


# -- a lifespan --------------------------------------------------------------------------------


async def test_a_lifespan_surrounds_the_visits(anyio_backend: str) -> None:
    events = []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
        events.append("startup")
        yield {"shared": events}
        await anyio.sleep(0)
        events.append("shutdown")

    app = FastAPI(lifespan=lifespan)

    @app.get("/")
    async def visit(request: Request) -> None:
        request.state.own = request.state.shared
        request.state.shared.append("visit")

    client = LeavingClient(app)
    for _ in range(2):
        async with client as same:
            assert same is client
            for _ in range(2):
                (await client.get("/")).assert_clean()
    assert events == ["startup", "visit", "visit", "shutdown"] * 2


async def test_without_a_lifespan_there_is_no_state(anyio_backend: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        states.append(scope.get("state"))
        await echo(scope, receive, send)

    states: list[Any] = []
    client = LeavingClient(app)
    await client.get("/")
    async with client:  # an application that knows no lifespan is left alone
        await client.get("/")
    assert states == [None, {}]


def with_lifespan(lifespan: Callable[[Any], Any]) -> LeavingClient:
    return LeavingClient(FastAPI(lifespan=asynccontextmanager(lifespan)))


async def test_a_startup_that_fails(anyio_backend: str) -> None:
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        raise ValueError("broken")
        yield

    with pytest.raises(RuntimeError, match=r"(?s)the application's startup failed:.*ValueError: broken"):
        async with with_lifespan(lifespan):
            raise AssertionError("not reached")


async def test_a_shutdown_that_fails(anyio_backend: str) -> None:
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        raise ValueError("broken")

    with pytest.raises(RuntimeError, match=r"(?s)the application's shutdown failed:.*ValueError: broken"):
        async with with_lifespan(lifespan):
            pass


async def test_a_lifespan_that_fails_in_between(anyio_backend: str) -> None:
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with anyio.create_task_group() as group:
            group.start_soon(fails_later)
            yield

    with pytest.raises(RuntimeError, match=r"(?s)the application's shutdown failed:.*Failed"):
        async with with_lifespan(lifespan):
            await anyio.sleep(0.02)


async def test_a_lifespan_that_ends_without_a_word(anyio_backend: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        raise Failed

    with pytest.raises(RuntimeError, match="the application's lifespan failed") as info:
        async with LeavingClient(app):
            pass
    assert isinstance(info.value.__cause__, Failed)


async def test_a_shutdown_that_hangs(anyio_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await anyio.sleep_forever()

    monkeypatch.setattr("fastapi_cancel.testing.lifespan.SHUTDOWN", 0.02)
    with pytest.raises(RuntimeError, match=r"shutdown was not over after 0\.02 s"):
        async with with_lifespan(lifespan):
            pass


async def test_a_block_within_a_lifespan_that_raises(anyio_backend: str) -> None:
    """Its error is what the test sees, plain, and the application is shut down."""
    events = []

    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        events.append("shutdown")

    with pytest.raises(Failed):
        async with with_lifespan(lifespan):
            raise Failed
    assert events == ["shutdown"]


async def test_a_cancelled_test_shuts_its_application_down(anyio_backend: str) -> None:
    events = []

    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await anyio.sleep(SHORT)
        events.append("shutdown")

    with anyio.move_on_after(0.02):
        async with with_lifespan(lifespan):
            await anyio.sleep_forever()
    assert events == ["shutdown"]
