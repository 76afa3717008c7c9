"""`CancellableRoute`, in process: what the real servers cannot show."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from functools import partial
from typing import Any, cast

import anyio
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from fastapi_cancel import CancellableRoute, CancellableStreamingResponse, CancelPolicy, cancel_policy, never_cancel
from fastapi_cancel._endpoints import _OwnTask
from fastapi_cancel.ladder import Ladder
from fastapi_cancel.protect import KEY, channel_of
from fastapi_cancel.testing import Habits, after_chunks, at_wait, during_send, when

from .visits import clean, client, failed

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("surroundings")]


def serve(endpoint: Any, policy: CancelPolicy | None = None, **arguments: Any) -> FastAPI:
    app = FastAPI()
    route_class = CancellableRoute.with_policy(policy) if policy else CancellableRoute
    router = APIRouter(route_class=route_class)
    router.add_api_route("/", endpoint, **arguments)
    app.include_router(router)
    return app


async def test_a_route_keeps_its_endpoint() -> None:
    """C15."""

    async def endpoint() -> None: ...

    router = APIRouter(route_class=CancellableRoute)
    router.add_api_route("/", endpoint)
    (route,) = router.routes
    assert isinstance(route, CancellableRoute)
    assert route.endpoint is endpoint


async def test_a_client_gone_while_nothing_was_sent_is_answered_with_499() -> None:
    """C13: for middleware and access logs; nobody else will see it."""
    statuses: list[int] = []
    app = serve(anyio.sleep_forever)

    async def observing(scope: Any, receive: Any, send: Any) -> None:
        async def observe(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
            await send(message)

        await app(scope, receive, observe)

    await clean(observing, "asgi", leave=at_wait(1))
    assert statuses == [499]


async def test_a_server_that_never_takes_the_499_is_not_waited_for() -> None:
    """C13: Hypercorn, over HTTP/2: the last `send` on a connection that is gone does not return."""
    app = serve(anyio.sleep_forever)

    async def never_returning(scope: Any, receive: Any, send: Any) -> None:
        async def never_return(message: Any) -> None:
            await anyio.sleep_forever()

        await app(scope, receive, never_return)

    await clean(never_returning, leave=at_wait(1))


@pytest.mark.parametrize(("cause", "status"), [("timeout", 504), ("stop", 409), ("shutdown", 503)])
async def test_a_client_that_still_waits_is_answered(cause: Any, status: int) -> None:
    async def endpoint(request: Request) -> None:
        channel = channel_of(request.scope)
        assert channel is not None
        channel.ladder.signal(cause)
        await anyio.sleep_forever()

    app = serve(endpoint)

    @app.exception_handler(HTTPException)
    async def handle(request: Request, exc: HTTPException) -> Response:
        return Response(f"my {exc.status_code}", exc.status_code)

    visit = await clean(app)
    assert (visit.status, visit.body) == (status, f"my {status}".encode())


async def test_a_real_error_of_the_cleanup_reaches_the_server() -> None:
    async def endpoint() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise ValueError("the cleanup failed")

    visit = await client(serve(endpoint)).get("/", leave=at_wait(1))
    assert repr(visit.error) == "ValueError('the cleanup failed')"


async def test_an_exception_handler_for_the_disconnect_does_not_make_it_loud() -> None:
    """Starlette raises "Caught handled exception, but response already started." from it."""

    async def content() -> AsyncIterator[str]:
        yield "first"
        await anyio.sleep(0.01)
        yield "second"

    async def endpoint() -> Response:
        return StreamingResponse(content())

    app = serve(endpoint, CancelPolicy(grace=4))

    @app.exception_handler(Exception)
    @app.exception_handler(OSError)
    async def handle(request: Request, exc: Exception) -> Response:
        raise AssertionError("not for this")

    app.add_exception_handler(ClientDisconnect, handle)
    assert (await clean(app, leave=after_chunks(1))).body == b"first"


async def test_a_group_of_disconnects_is_silent() -> None:
    """C2: `send` raises in a task of the response's own, too."""

    class InTasks(Response):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})

            async def stream() -> None:
                while True:
                    await anyio.sleep(0.001)
                    await send({"type": "http.response.body", "body": b"x", "more_body": True})

            async with anyio.create_task_group() as group:
                group.start_soon(stream)
                group.start_soon(stream)

    async def endpoint() -> Response:
        return InTasks()

    await clean(serve(endpoint, CancelPolicy(grace=4)), leave=after_chunks(4))


# -- background tasks ----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [CancelPolicy(), CancelPolicy(background=False)])
async def test_background_tasks_after_a_disconnect(policy: CancelPolicy) -> None:
    """C12: a rule, not an accident."""
    seen: list[Any] = []

    async def background() -> None:
        await anyio.sleep(0.01)
        seen.append("background")

    async def content() -> AsyncIterator[str]:
        yield "first"
        await anyio.sleep_forever()

    async def endpoint(tasks: BackgroundTasks) -> Response:
        tasks.add_task(background)
        return StreamingResponse(content())

    await clean(serve(endpoint, policy), leave=after_chunks(1))
    assert seen == (["background"] if policy.background else [])


# -- endpoints that yield ------------------------------------------------------------------------


class Streams:
    """An endpoint object whose `__call__` yields."""

    closed = 0

    async def __call__(self) -> AsyncIterator[str]:
        try:
            yield "first"
            await anyio.sleep_forever()
        finally:
            self.closed += 1


@pytest.mark.parametrize("wrap", [lambda streams: streams, partial, lambda streams: streams.__call__])
@pytest.mark.parametrize("arguments", [{}, {"response_class": EventSourceResponse}])
async def test_any_callable_that_yields(wrap: Any, arguments: dict[str, Any]) -> None:
    streams = Streams()
    await clean(serve(wrap(streams), name="streams", **arguments), leave=after_chunks(1))
    assert streams.closed == 1


@pytest.mark.parametrize("arguments", [{}, {"response_class": EventSourceResponse}])
async def test_a_generator_is_closed_before_its_dependencies(arguments: dict[str, Any]) -> None:
    seen: list[Any] = []

    async def open_session() -> AsyncIterator[str]:
        try:
            yield "session"
        finally:
            seen.append("session closed")

    async def endpoint(session: str = Depends(open_session)) -> AsyncIterator[str]:
        try:
            yield "first"
            await anyio.sleep_forever()
        finally:
            seen.append("generator closed")

    await clean(serve(endpoint, **arguments), leave=after_chunks(1))
    assert seen == ["generator closed", "session closed"]


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)  # Trio lets no nursery span a `yield`
async def test_an_sse_generator_that_waits_at_its_yield_is_closed_in_its_own_task() -> None:
    """C11, C21: a task group across the `yield` proves it. The consumer is stuck in `send`."""
    full, seen = anyio.Event(), list[Any]()

    async def endpoint() -> AsyncIterator[str]:
        async with anyio.create_task_group():
            try:
                for number in range(10):
                    if number == 4:
                        full.set()
                    yield str(number)
            finally:
                seen.append("closed")

    to = client(serve(endpoint, response_class=EventSourceResponse))
    visit = await to.get("/", stall=after_chunks(2), leave=when(full))
    visit.assert_clean()
    assert (len(visit.chunks), seen) == (2, ["closed"])


@pytest.mark.parametrize("arguments", [{}, {"response_class": EventSourceResponse}])
async def test_a_generator_that_finishes(arguments: dict[str, Any]) -> None:
    async def endpoint() -> AsyncIterator[int]:
        for number in range(100):
            yield number

    body = (await clean(serve(endpoint, **arguments))).body
    assert body.count(b"\n") == (200 if arguments else 100)
    assert b"99" in body


async def test_an_error_of_an_sse_generator_reaches_the_server() -> None:
    async def endpoint() -> AsyncIterator[int]:
        yield 1
        raise KeyError("the generator's")

    assert 'KeyError("the generator\'s")' in (await failed(serve(endpoint, response_class=EventSourceResponse)))[0]


async def test_an_sse_generator_whose_items_cannot_be_serialised_is_closed() -> None:
    """Nobody left and nobody signalled: the pulling task failed."""
    seen: list[Any] = []

    async def endpoint() -> AsyncIterator[Any]:
        try:
            yield 1
            yield sys
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.001)
                seen.append("closed")

    visit = await client(serve(endpoint, response_class=EventSourceResponse)).get("/")
    assert visit.error is not None
    assert seen == ["closed"]


async def test_an_sse_endpoint_that_opted_out_is_fastapis_own() -> None:
    @never_cancel
    async def endpoint() -> AsyncIterator[int]:
        yield 1

    assert (await clean(serve(endpoint, response_class=EventSourceResponse))).body == b"data: 1\n\n"


async def test_the_grace_of_an_sse_generator() -> None:
    started, seen = anyio.Event(), list[Any]()

    @cancel_policy(grace=4)
    async def endpoint() -> AsyncIterator[int]:
        yield 1
        started.set()
        await anyio.sleep(0.02)
        seen.append("finished its step")
        yield 2

    await clean(serve(endpoint, response_class=EventSourceResponse), leave=when(started))
    assert seen == ["finished its step"]


async def test_a_synchronous_generator_endpoint() -> None:
    seen: list[Any] = []

    def endpoint() -> Iterator[int]:
        try:
            yield 1
        finally:
            seen.append("closed")

    assert (await clean(serve(endpoint))).body == b"1\n"
    assert seen == ["closed"]


# -- nesting -------------------------------------------------------------------------------------


async def test_two_cancellable_things_on_one_request_share_a_watcher() -> None:
    """C1: the guard fails on a second reader; the policy of the response holds."""
    guard, seen = anyio.ResourceGuard("reading from"), list[Any]()

    async def content() -> AsyncIterator[str]:
        try:
            yield "first"
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.01)
                seen.append(channels[0].ladder.policy.cleanup_timeout)

    async def hook() -> None:
        await anyio.sleep(0.001)
        seen.append("cleaned")

    channels: list[Any] = []

    async def endpoint(request: Request) -> Response:
        channels.append(channel_of(request.scope))
        seen.append(channels[0].ladder.policy.cleanup_timeout)
        return CancellableStreamingResponse(content(), policy=CancelPolicy(cleanup_timeout=7), cleanup=hook)

    app = serve(endpoint)

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        async def read() -> Any:
            with guard:
                return await receive()

        await app(scope, read, send)

    await clean(guarded, "hypercorn", leave=after_chunks(1))
    assert seen == [30.0, 7, "cleaned"]


async def test_a_response_that_is_never_called_cleans_up() -> None:
    """C11: a dependency fails between the handler and the response."""
    seen: list[Any] = []

    async def failing() -> AsyncIterator[None]:
        yield
        raise KeyError("on the way out")

    async def hook() -> None:
        seen.append("cleaned")

    async def content() -> AsyncIterator[str]:
        yield "never"

    async def endpoint() -> Response:
        return CancellableStreamingResponse(content(), cleanup=hook)

    app = serve(endpoint, dependencies=[Depends(failing, scope="function")])
    assert await failed(app) == ("KeyError('on the way out')", [])
    assert seen == ["cleaned"]


async def test_the_limit_of_a_response_replaces_that_of_its_route() -> None:
    async def content() -> AsyncIterator[str]:
        yield "first"
        await anyio.sleep(0.4)
        yield "second"

    async def endpoint() -> Response:
        return CancellableStreamingResponse(content(), policy=CancelPolicy())

    assert (await clean(serve(endpoint, CancelPolicy(timeout=0.2)))).body == b"firstsecond"


# -- what a review found -------------------------------------------------------------------------


@pytest.mark.parametrize("cause", ["disconnect", "stalled", "stop"])
async def test_an_sse_producer_that_is_faster_than_its_client_ends_silently(cause: str) -> None:
    """C13: FastAPI closes its stream under its own writing task."""
    seen: list[Any] = []

    async def endpoint() -> AsyncIterator[int]:
        try:
            for number in range(100_000):
                yield number
        finally:
            seen.append("closed")

    app = serve(
        endpoint, CancelPolicy(send_timeout=0.05 if cause == "stalled" else None), response_class=EventSourceResponse
    )
    async with client(app).visit("GET", "/", stall=after_chunks(20)) as visit:
        await visit.until(during_send(21))
        await anyio.wait_all_tasks_blocked()
        if cause == "disconnect":
            visit.leave()
        elif cause == "stop":
            visit.scope[KEY].ladder.signal("stop")
    assert (visit.cause, visit.error, seen) == (cause, None, ["closed"])


@pytest.mark.parametrize("policy", [CancelPolicy(), CancelPolicy(grace=0.02), CancelPolicy(causes=["disconnect"])])
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_an_sse_generator_is_interrupted_once_when_its_consumer_fails(policy: CancelPolicy) -> None:
    """C7, C11: it waits at its `yield`, or in between; nobody left, nobody signalled."""
    seen = []

    async def endpoint() -> AsyncIterator[Any]:
        try:
            yield 1
            yield sys
            yield 3
            await anyio.sleep_forever()
        except BaseException as exc:
            seen.append(type(exc).__name__)
            raise
        finally:
            for _ in range(5):
                await anyio.sleep(0.01)
            seen.append("closed")

    await failed(serve(endpoint, policy, response_class=EventSourceResponse))
    assert seen in (["GeneratorExit", "closed"], ["CancelledError", "closed"])


async def test_an_error_in_the_cleanup_of_an_sse_generator_is_logged() -> None:
    """C13: nobody pulls any more who could raise it."""

    async def endpoint() -> AsyncIterator[int]:
        try:
            yield 1
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.01)
            raise ValueError("in the generator's cleanup")

    to = client(serve(endpoint, response_class=EventSourceResponse))
    (fault,) = (await to.get("/", leave=after_chunks(1))).faults
    assert "in the generator's cleanup" in fault.text


async def test_a_background_task_of_a_request_within_the_request_runs_once() -> None:
    """C12."""
    sent, seen = list[Any](), list[Any]()
    app = FastAPI()
    app.router.route_class = CancellableRoute

    async def background() -> None:
        seen.append("background")

    @app.get("/inner")
    async def inner(tasks: BackgroundTasks) -> str:
        tasks.add_task(background)
        return "inner"

    @app.get("/")
    async def outer(request: Request) -> None:
        async def send(message: Any) -> None:
            sent.append(message.get("body"))

        await app({**request.scope, "path": "/inner", "raw_path": b"/inner"}, request.receive, send)
        await anyio.sleep_forever()

    await clean(app, leave=when(lambda: sent))
    assert (sent, seen) == ([None, b'"inner"'], ["background"])


async def test_the_answer_to_a_timeout_does_not_wait_for_background_tasks() -> None:
    seen: list[Any] = []

    async def background() -> None:
        seen.append(visit.status)

    class Slow(Response):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await anyio.sleep_forever()

    async def endpoint(tasks: BackgroundTasks) -> Response:
        tasks.add_task(background)
        return Slow()

    async with client(serve(endpoint, CancelPolicy(timeout=0.02))).visit("GET", "/") as visit:
        pass
    assert (visit.status, visit.faults, seen) == (504, [], [504])


async def test_a_response_of_an_endpoint_that_opted_out_is_not_cancelled() -> None:
    seen: list[Any] = []

    async def content() -> AsyncIterator[str]:
        yield "first"
        await anyio.sleep(0.02)
        seen.append("went on")

    async def hook() -> None:
        seen.append("cleaned")

    @never_cancel
    async def endpoint() -> Response:
        return CancellableStreamingResponse(content(), cleanup=hook)

    # Starlette itself would stop for an older server.
    await clean(serve(endpoint), Habits(spec_version="2.4"), leave=after_chunks(1))
    assert seen == ["went on", "cleaned"]


class NeverStarts:
    """A ladder whose helpers are cancelled before their first step."""

    def spawn(self, function: object) -> None: ...


async def test_a_generator_whose_task_never_began_is_closed() -> None:
    """Trio: somebody else's cancellation came first. Waiting for the task would be for ever."""

    async def numbers() -> AsyncGenerator[int]:
        yield 1

    generator = numbers()
    own = _OwnTask(generator, {}, cast("Ladder", NeverStarts()))
    with anyio.fail_after(5):
        await own.end()
    assert cast("Any", generator).ag_frame is None
