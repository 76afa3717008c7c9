"""The responses on their own, in process: what they refuse, where they stop, that they clean up."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.to_thread import run_sync
from fastapi import FastAPI, WebSocket
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from fastapi_cancel import CancellableFileResponse, CancellableRoute, CancellableStreamingResponse, CancelPolicy
from fastapi_cancel._closing import InThread, close, in_threads
from fastapi_cancel.protect import KEY, protect
from fastapi_cancel.testing import Habits, Moment, after_body, after_chunks, at_wait, before_body, during_send

from .visits import clean, client, failed

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("surroundings")]
NO_TEXT = repr(AttributeError("'int' object has no attribute 'encode'"))


async def numbers(count: int = 3) -> AsyncIterator[str]:
    for number in range(count):
        yield str(number)


class Notes(list[str]):
    """What happened, in its order."""

    def hook(self, text: str, error: BaseException | None = None) -> Callable[[], Any]:
        async def note() -> None:
            await anyio.sleep(0.001)
            self.append(text)
            if error is not None:
                raise error

        return note


# -- what they are, and what they refuse ---------------------------------------------------------


def test_they_are_starlettes() -> None:
    """C16."""
    assert issubclass(CancellableStreamingResponse, StreamingResponse)
    assert issubclass(CancellableFileResponse, FileResponse)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"content": 5}, TypeError, "content must be a sync or async iterable"),
        ({"content": b"bytes"}, TypeError, "content must be a sync or async iterable"),
        ({"content": numbers}, TypeError, "content must be an iterable: call numbers, do not pass it"),
        ({"send_timeout": 0}, ValueError, "send_timeout must be"),
        ({"policy": 5}, TypeError, "policy must be a CancelPolicy"),
        ({"cleanup": [print]}, TypeError, "cleanup must be async callables"),
        ({"cleanup": [5]}, TypeError, "cleanup must be async callables"),
        ({"cleanup": 5}, TypeError, "cleanup must be async callables"),
    ],
)
async def test_a_wrong_argument_is_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CancellableStreamingResponse(**{"content": numbers(), **arguments})


@pytest.mark.parametrize(
    "content",
    [lambda: numbers(), lambda: ["0", b"1", memoryview(b"2")], lambda: iter("012"), lambda: (str(n) for n in range(3))],
)
async def test_any_content_that_starlette_takes(content: Callable[[], Any]) -> None:
    visit = await clean(CancellableStreamingResponse(content(), 201, {"x-a": "b"}, "text/plain"))
    assert (visit.status, visit.body) == (201, b"012")
    assert (visit.headers["x-a"], visit.headers["content-type"]) == ("b", "text/plain; charset=utf-8")


async def test_as_a_websocket_denial() -> None:
    """As in Starlette: there is no channel of ours on a WebSocket."""
    app = FastAPI()
    notes = Notes()

    @app.websocket("/")
    async def endpoint(websocket: WebSocket) -> None:
        response = CancellableStreamingResponse(numbers(), 403, cleanup=notes.hook("cleaned"))
        await websocket.send_denial_response(response)

    with TestClient(app) as client:
        with pytest.raises(Exception) as info:  # noqa: PT011
            with client.websocket_connect("/"):
                pass
    assert getattr(info.value, "status_code", None) == 403
    assert notes == ["cleaned"]


# -- where they stop -----------------------------------------------------------------------------


async def test_nothing_is_pulled_or_sent_after_the_signal() -> None:
    """C16: within its grace the generator may finish its step; what that yields is not sent."""
    notes = Notes()

    async def content() -> AsyncIterator[str]:
        try:
            yield "first"
            while visit.scope[KEY].ladder.cause is None:
                await anyio.sleep(0.001)
            yield "second"
            notes.append("pulled again")
        finally:
            await anyio.sleep(0.001)
            notes.append("closed")

    response = CancellableStreamingResponse(content(), policy=CancelPolicy(grace=30))
    async with client(response).visit("GET", "/", leave=after_chunks(1)) as visit:
        pass
    visit.assert_clean()
    assert visit.body == b"first"
    assert notes == ["closed"]


async def test_nothing_is_sent_after_the_signal_to_a_client_that_is_still_there() -> None:
    """C16: a time limit, and a generator that uses its grace."""
    late, notes = anyio.Event(), Notes()

    async def content() -> AsyncIterator[str]:
        try:
            yield "first"
            await late.wait()
            yield "second"
            notes.append("pulled again")
        finally:
            notes.append("closed")

    response = CancellableStreamingResponse(content(), policy=CancelPolicy(grace=4))
    async with client(response).visit("GET", "/") as visit:
        await visit.until(after_chunks(1))
        visit.scope[KEY].ladder.signal("timeout")
        late.set()
    assert (visit.body, visit.completed, visit.error) == (b"first", False, None)
    assert notes == ["closed"]


async def test_nothing_is_pulled_after_a_signal_that_came_during_send() -> None:
    """C16: before each chunk is pulled, too."""
    notes = Notes()

    async def content() -> AsyncIterator[str]:
        yield "first"
        notes.append("pulled again")

    response = CancellableStreamingResponse(content(), policy=CancelPolicy(grace=4))
    async with client(response).visit("GET", "/", stall=before_body()) as visit:
        await visit.until(during_send(1))
        visit.scope[KEY].ladder.signal("timeout")
        visit.resume()
    assert visit.body == b"first"
    assert notes == []


@pytest.mark.parametrize("leave", [before_body(), after_body(1)], ids=repr)
async def test_a_body_that_never_started_is_cleaned_up_after(leave: Moment) -> None:
    """C11: the client is gone when the response begins."""
    notes = Notes()

    async def content() -> AsyncIterator[str]:
        notes.append("pulled")
        yield ""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def respond(scope: Scope, receive: Receive, send: Send) -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            await CancellableStreamingResponse(content(), cleanup=notes.hook("cleaned"))(scope, receive, send)

        await protect(respond, scope, receive, send, CancelPolicy(grace=1))

    await clean(app, content=[b"a", b"b"], leave=leave)
    assert notes == ["cleaned"]


# -- cleanup hooks -------------------------------------------------------------------------------


async def test_hooks_run_once_after_a_finish_before_the_background_task() -> None:
    notes = Notes()
    response = CancellableStreamingResponse(
        numbers(), background=BackgroundTask(notes.hook("background")), cleanup=[notes.hook("1"), notes.hook("2")]
    )
    response.add_cleanup(partial(notes.hook("3")))
    visit = await clean(response)
    await response.aclose()
    assert visit.body == b"012"
    assert notes == ["3", "2", "1", "background"]


async def test_hooks_and_background_run_after_a_disconnect() -> None:
    """C11, C12."""
    notes = Notes()

    async def content() -> AsyncIterator[str]:
        await anyio.sleep_forever()
        yield ""

    response = CancellableStreamingResponse(
        content(), background=BackgroundTask(notes.hook("background")), cleanup=notes.hook("cleaned")
    )
    await clean(response, leave=at_wait(1))
    assert notes == ["cleaned", "background"]


async def test_a_policy_drops_the_background_task() -> None:
    notes = Notes()

    async def content() -> AsyncIterator[str]:
        await anyio.sleep_forever()
        yield ""

    response = CancellableStreamingResponse(
        content(), background=BackgroundTask(notes.hook("background")), policy=CancelPolicy(background=False)
    )
    await clean(response, leave=at_wait(1))
    assert notes == []


async def test_a_hook_that_fails_stops_no_other_and_hides_no_error() -> None:
    notes = Notes()

    async def content() -> AsyncIterator[str]:
        yield "0"
        raise KeyError("the original")

    response = CancellableStreamingResponse(
        content(), cleanup=[notes.hook("1"), notes.hook("2", ValueError("the hook's")), notes.hook("3")]
    )
    error, (line,) = await failed(response)
    assert error == "KeyError('the original')"
    assert notes == ["3", "2", "1"]
    assert re.match("fastapi_cancel ERROR: cleanup .* of CancellableStreamingResponse failed", line)


async def test_a_hook_that_hangs_is_cut_and_stops_no_other() -> None:
    notes = Notes()
    response = CancellableStreamingResponse(
        numbers(), cleanup=[notes.hook("1"), anyio.sleep_forever], policy=CancelPolicy(cleanup_timeout=0.02)
    )
    visit = await client(response).get("/")
    assert notes == ["1"]
    (fault,) = visit.faults
    assert "not finished after 0.02 s" in fault.text


async def test_a_client_that_leaves_during_the_hooks_stops_none() -> None:
    """The response has failed; its hooks are not cancelled on top of it."""
    notes = Notes()

    async def content() -> AsyncIterator[str]:
        yield "0"
        raise KeyError

    async def hook() -> None:
        await anyio.sleep(0.02)
        notes.append("slow")

    response = CancellableStreamingResponse(content(), cleanup=[notes.hook("last"), hook])
    assert await failed(response, leave=at_wait(1)) == ("KeyError()", [])
    assert notes == ["slow", "last"]


@pytest.mark.parametrize("means", ["shield", "hook", "grace"])
async def test_a_client_that_leaves_while_a_generator_at_its_end_cleans_up(means: str) -> None:
    """C11: a `finally` that was entered in the normal way is code like any other. These keep the cleanup whole."""
    notes = Notes()

    async def content() -> AsyncIterator[str]:
        try:
            yield "last"
        finally:
            visit.leave()
            with anyio.CancelScope(shield=means == "shield"):
                for _ in range(20):  # turns, not seconds: in these the client is noticed, however busy the machine
                    await anyio.sleep(0)
            notes.append("closed")

    hooks = [notes.hook("closed")] if means == "hook" else []
    policy = CancelPolicy(grace=5 if means == "grace" else 0)
    response = CancellableStreamingResponse(content(), policy=policy, cleanup=hooks)
    async with client(response).visit("GET", "/") as visit:
        pass
    visit.assert_clean()
    assert (visit.cause, notes) == ("disconnect", ["closed"])


@pytest.mark.parametrize("kind", [CancellableStreamingResponse, StreamingResponse])
async def test_a_client_that_leaves_with_all_the_bytes_that_were_announced(kind: type[StreamingResponse]) -> None:
    """C5: the response is complete, whatever its generator still does."""
    notes = Notes()

    async def content() -> AsyncIterator[bytes]:
        try:
            yield b"1234"
            yield b"5678"
        finally:
            visit.leave()
            await anyio.sleep(0.01)
            notes.append("closed")

    response = kind(content(), headers={"Content-Length": "8"})
    async with client(partial(protect, response, policy=CancelPolicy())).visit("GET", "/") as visit:
        pass
    visit.assert_clean()
    assert (visit.cause, visit.body, notes) == (None, b"12345678", ["closed"])


async def test_a_server_whose_last_send_never_returns_when_all_is_out() -> None:
    async def content() -> AsyncIterator[bytes]:
        yield b"1234"
        visit.leave()
        await anyio.sleep(0.01)

    response = CancellableStreamingResponse(content(), headers={"Content-Length": "4"})

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def stuck(message: Message) -> None:
            if not message.get("more_body", True):
                await anyio.sleep_forever()
            await send(message)

        await response(scope, receive, stuck)

    async with client(app).visit("GET", "/") as visit:
        pass
    visit.assert_clean()


@pytest.mark.parametrize("length", ["9", "-8", "x"])
async def test_a_client_that_leaves_before_all_the_bytes_that_were_announced(length: str) -> None:
    async def content() -> AsyncIterator[bytes]:
        yield b"12345678"
        await anyio.sleep_forever()

    response = CancellableStreamingResponse(content(), headers={"Content-Length": length})
    visit = await clean(response, leave=after_chunks(1))
    assert visit.cause == "disconnect"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_native_cancellation_cuts_one_hook_short_and_not_the_rest() -> None:
    notes = Notes()
    response = CancellableStreamingResponse(numbers(), cleanup=[notes.hook("last"), anyio.sleep_forever])
    visit = await client(response, server=Habits(cancels_after=0)).get("/", leave=at_wait(1))
    visit.assert_clean()
    assert isinstance(visit.error, asyncio.CancelledError)
    assert notes == ["last"]


# -- closing -------------------------------------------------------------------------------------


async def test_a_generator_is_closed_in_its_own_task() -> None:
    """C11: a task group that spans the `yield` can only be left by the task that entered it."""
    notes = Notes()

    async def content() -> AsyncIterator[str]:
        async with anyio.create_task_group():
            try:
                yield "first"
                yield "second"
                await anyio.sleep_forever()
            finally:
                notes.append("closed")

    await clean(CancellableStreamingResponse(content()), leave=after_chunks(2))
    assert notes == ["closed"]


async def test_a_wrapped_body_is_closed_through_and_through() -> None:
    notes = Notes()

    async def content() -> AsyncIterator[Any]:
        try:
            yield "0"
            yield 1
        finally:
            notes.append("content")

    async def wrap(inner: Any) -> AsyncIterator[Any]:
        try:
            async for chunk in inner:
                yield chunk
        finally:
            notes.append("wrapper")

    response = CancellableStreamingResponse(content())
    response.body_iterator = wrap(response.body_iterator)
    assert await failed(response) == (NO_TEXT, [])
    assert notes == ["wrapper", "content"]


async def test_a_generator_that_fails_to_close_is_logged() -> None:
    notes = Notes()

    async def content() -> AsyncIterator[Any]:
        try:
            yield 1
        finally:
            raise ValueError("in the generator's cleanup")

    response = CancellableStreamingResponse(content(), cleanup=notes.hook("cleaned"))
    error, (line,) = await failed(response)
    assert error == NO_TEXT
    assert "in the generator's cleanup" in line
    assert notes == ["cleaned"]


async def test_a_synchronous_generator_is_closed_in_a_thread() -> None:
    """C9: also the one inside Starlette's wrapper, unless somebody has begun to pull that."""
    notes = Notes()

    def content() -> Iterator[str]:
        try:
            yield "0"
            yield "1"
        finally:
            notes.append(str(threading.current_thread() is threading.main_thread()))

    response = StreamingResponse(content())
    in_threads(response)
    assert await anext(aiter(response.body_iterator)) == "0"
    await close(response.body_iterator)
    assert notes == ["False"]

    unstarted = StreamingResponse(content())
    in_threads(unstarted)
    await close(unstarted.body_iterator)
    await close(unstarted.body_iterator)
    assert notes == ["False"]

    begun = StreamingResponse(iter(["0"]))
    body = begun.body_iterator
    for expected in (["0"], []):
        async for chunk in body:
            assert [chunk] == expected
            break
        in_threads(begun)
        assert begun.body_iterator is body
    await close(body)


async def test_a_generator_is_not_closed_under_the_thread_that_runs_it() -> None:
    """The server's own cancellation does not wait for the thread; the closing does."""
    running, go_on, notes = threading.Event(), threading.Event(), Notes()

    def content() -> Iterator[str]:
        try:
            running.set()
            go_on.wait(5)
            yield "0"
        finally:
            notes.append("closed")

    body = InThread(content())
    async with anyio.create_task_group() as group:
        threading.Thread(target=body._next).start()
        await run_sync(running.wait)
        group.start_soon(close, body)
        await anyio.sleep(0.01)
        assert notes == []
        go_on.set()
    assert notes == ["closed"]


async def test_what_is_no_generator_is_left_to_its_owner(caplog: pytest.LogCaptureFixture) -> None:
    class Shared(Iterator[str]):
        closed = False

        def __next__(self) -> str:
            raise StopIteration

        def close(self) -> None:
            self.closed = True

    shared = Shared()
    await clean(CancellableStreamingResponse(shared))
    await close(shared)
    assert not shared.closed

    def failing() -> Iterator[str]:
        try:
            yield ""
        finally:
            raise ValueError("in the generator's cleanup")

    generator = failing()
    next(generator)
    await close(generator)
    assert "in the generator's cleanup" in caplog.text


# -- files ---------------------------------------------------------------------------------------


async def test_a_file_and_its_cleanup(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("content")
    notes = Notes()
    response = CancellableFileResponse(
        path, filename="x.txt", cleanup=[notes.hook("cleaned")], background=BackgroundTask(notes.hook("background"))
    )
    assert (await clean(response)).body == b"content"
    assert notes == ["cleaned", "background"]


async def test_one_response_may_serve_several_requests_at_once(tmp_path: Path) -> None:
    """As Starlette's may; each of them has its background task."""
    path = tmp_path / "file.txt"
    path.write_text("content")
    notes = Notes()
    response = CancellableFileResponse(path, background=BackgroundTask(notes.hook("background")))
    to = client(response)
    async with to.visit("GET", "/") as one, to.visit("GET", "/") as two, to.visit("GET", "/") as three:
        pass
    assert one.body == two.body == three.body == b"content"
    assert notes == ["background"] * 3


async def test_a_file_refuses_a_wrong_argument() -> None:
    with pytest.raises(ValueError, match="send_timeout"):
        CancellableFileResponse("x", send_timeout=-1)


# -- on routes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("route_class", [None, CancellableRoute])
async def test_on_any_route_of_any_app(route_class: type[CancellableRoute] | None) -> None:
    async def endpoint(request: Request) -> Response:
        return CancellableStreamingResponse(numbers(), send_timeout=5)

    async def fastapi_endpoint() -> Response:
        return CancellableStreamingResponse(numbers(), send_timeout=5)

    if route_class is None:
        app: Any = Starlette(routes=[Route("/", endpoint)])
    else:
        app = FastAPI()
        app.router.route_class = route_class
        app.add_api_route("/", fastapi_endpoint)
    assert (await clean(app)).body == b"012"
