"""The one reader, and the ASGI 2.4 server that the toolkit is to the application. In process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from functools import partial
from time import sleep
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_cancel import CancelPolicy, ClientGone
from fastapi_cancel._native import NativeLadder
from fastapi_cancel._stepper import Reader
from fastapi_cancel.protect import protect
from fastapi_cancel.testing import LeavingClient, Visit, after_body, at_wait, before_body, when

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "asyncio, in a scope", "trio"])
def anyio_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """asyncio also as it is behind a `BaseHTTPMiddleware`."""
    backend, _, scope = str(request.param).partition(", ")
    if scope:
        monkeypatch.setattr(f"{__name__}.around", anyio.CancelScope)
    return backend


around: Callable[[], AbstractContextManager[Any]] = nullcontext
Work = Callable[[Scope, Receive, Send], Coroutine[Any, Any, None]]
Read = Callable[[Receive], Awaitable[Message]]
Write = Callable[[Send, Message], Awaitable[None]]


def protected(work: Work, read: Read | None = None, write: Write | None = None, **policy: Any) -> ASGIApp:
    """Behind a middleware with a ``receive`` and ``send`` of its own, handed the server's, which has one reader."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        reading = anyio.ResourceGuard("reading from the server")

        async def read_alone() -> Message:
            with reading:
                return await (read(receive) if read else receive())

        with around():
            await protect(work, scope, read_alone, partial(write, send) if write else send, CancelPolicy(**policy))

    return app


@asynccontextmanager
async def asked(app: ASGIApp, *faults: str, server: str = "uvicorn", **request: Any) -> AsyncIterator[Visit]:
    """A visit in which faults of these kinds are found, and no other."""
    async with LeavingClient(app, server=server).visit("POST", "/", **request) as visit:
        yield visit
    assert [fault.kind for fault in visit.faults] == list(faults), visit.faults


async def asking(app: ASGIApp, *faults: str, **request: Any) -> Visit:
    async with asked(app, *faults, **request) as visit:
        pass
    return visit


async def answer(send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


async def turns(count: int = 6) -> None:
    """Let everybody have a turn."""
    for _ in range(count):
        await anyio.lowlevel.checkpoint()


def failing(error: BaseException) -> Read:
    """Raised once the client has left, instead of http.disconnect."""

    async def read(receive: Receive) -> Message:
        if (message := await receive())["type"] == "http.disconnect":
            raise error
        return message

    return read


async def drop(send: Send, message: Message) -> None:
    """For what the client does not understand."""


async def test_the_body_is_not_taken_from_its_reader() -> None:
    """C4: the handler waits first, then reads: nothing is missing."""

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        async for chunk in Request(scope, receive).stream():
            await turns()
            body += chunk
        assert body == b"abc"
        await answer(send)

    assert (await asking(protected(work), content=[b"a", b"b", b"c"])).body == b"ok"


async def test_one_message_is_read_ahead_and_no_more() -> None:
    """C4: back-pressure stays with the server."""

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await turns(20)
        assert visit.uploaded == 1
        assert (await receive())["body"] == b"a"
        await turns(20)
        assert visit.uploaded == 2
        await answer(send)

    async with asked(protected(work), content=[b"a", b"b", b"c"]) as visit:
        pass


async def test_an_empty_piece_does_not_stop_the_watcher() -> None:
    """httpx's `ASGITransport` sends one first."""

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await turns(20)
        visit.leave()
        await anyio.sleep_forever()

    async with asked(protected(work), content=[b"", b"", b""]) as visit:
        pass


async def test_a_scope_without_an_asgi_version_gets_none_left() -> None:
    """Starlette's `TestClient` has none."""

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["asgi"] == {"spec_version": "2.4"}
        await answer(send)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        del scope["asgi"]
        await protected(work)(scope, receive, send)
        assert "asgi" not in scope

    await asking(app)


async def test_nothing_is_read_ahead_of_the_handler_on_expect_continue() -> None:
    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await turns(20)
        assert not visit.invited
        await send({"type": "http.response.start", "status": 413, "headers": []})
        await turns(20)
        assert not visit.invited, "middleware may still hold it"
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await turns(20)
        assert visit.uploaded == 1
        await send({"type": "http.response.body", "body": b""})

    async with asked(protected(work), content=b"a", headers={"expect": "100-Continue"}) as visit:
        pass


async def test_a_response_without_a_beginning_is_the_server_s_to_refuse() -> None:
    class Refused(Exception):
        pass

    async def refuse(message: Message) -> None:
        raise Refused

    async def unread() -> Message:
        raise AssertionError

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.body", "body": b"x"})

    scope: Scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    with pytest.raises(Refused):
        await protected(work)(scope, unread, refuse)


async def test_another_expectation_is_none_of_ours() -> None:
    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await turns(20)
        assert visit.uploaded == 1
        await answer(send)

    async with asked(protected(work), content=b"a", headers={"expect": "a-pony"}) as visit:
        pass


@pytest.mark.parametrize("server", ["hypercorn", "uvicorn"])
async def test_receive_goes_on_answering_that_the_client_has_left(server: str) -> None:
    """C2: also on servers that say it once."""
    seen: list[str] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "http.request"
        with anyio.CancelScope(shield=True):
            seen.extend([(await receive())["type"] for _ in range(3)])

    await asking(protected(work), server=server, leave=at_wait(1))
    assert seen == ["http.disconnect"] * 3


@pytest.mark.parametrize("server", ["asgi", "uvicorn"])
async def test_send_raises_once_the_client_has_left(server: str) -> None:
    """C2, C13: as an `OSError`, and nothing of it reaches the server."""
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await turns()
        visit.leave()
        try:
            while True:
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await turns(1)
        except OSError as exc:
            seen.append(type(exc))
            raise

    async with asked(protected(work, grace=4), server=server) as visit:
        pass
    assert seen == [ClientGone]


async def test_a_server_that_raises_oserror_from_the_last_send_is_silent() -> None:
    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        visit.leave()
        await send({"type": "http.response.body", "body": b"never arrives"})
        raise AssertionError("it was told")

    async with asked(protected(work), server="asgi") as visit:
        pass


async def test_the_application_sees_an_asgi_2_4_server() -> None:
    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["asgi"] == {"version": "3.0", "spec_version": "2.4"}
        await answer(send)

    visit = await asking(protected(work))
    assert visit.scope["asgi"]["spec_version"] == "2.3"
    assert "fastapi_cancel" not in visit.scope


@pytest.mark.parametrize(
    "error", [ConnectionResetError("by peer"), ExceptionGroup("a middleware's", [ConnectionResetError("by peer")])]
)
async def test_oserror_from_receive_means_gone(error: Exception) -> None:
    """C6. Also in a task group of a middleware."""
    seen: list[str] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            seen.append("cleaned")

    await asking(protected(work, failing(error)), leave=at_wait(1))
    assert seen == ["cleaned"]


@pytest.mark.parametrize(
    "error", [ConnectionResetError("by peer"), ExceptionGroup("a middleware's", [ConnectionResetError("by peer")])]
)
async def test_oserror_from_a_read_of_the_application_means_gone(error: Exception) -> None:
    """C4, C6: in the middle of an upload."""
    seen: list[str] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend([(await receive())["type"] for _ in range(2)])

    await asking(protected(work, failing(error)), content=[b"a"], leave=before_body())
    assert seen == ["http.disconnect"] * 2


@pytest.mark.parametrize("error", [RuntimeError("boom"), ExceptionGroup("", [RuntimeError("boom"), OSError()])])
async def test_another_error_from_receive_reaches_whoever_reads(error: Exception) -> None:
    """C6: the watcher keeps it; a handler that never reads is not disturbed."""
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await turns()
        visit.leave()
        await turns()
        try:
            assert (await receive())["type"] == "http.request"
            for _ in range(2):
                with pytest.raises(type(error)):
                    await receive()
            await receive()
        finally:
            seen.append("cleaned")

    async with asked(protected(work, failing(error)), "error") as visit:
        pass
    assert type(visit.error) is type(error)
    assert seen == ["cleaned"]


async def test_an_error_that_the_watcher_meets_as_it_is_stopped_is_dropped() -> None:
    """C13: the work has ended; a middleware's task group raises its 413 and the cancellation together."""

    async def read(receive: Receive) -> Message:
        async def fail() -> None:
            try:
                await anyio.sleep_forever()
            finally:
                raise RuntimeError("too large")

        async with anyio.create_task_group() as group:
            group.start_soon(fail)
            group.start_soon(anyio.sleep_forever)
        raise AssertionError

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await anyio.sleep(0.01)
        await answer(send)

    assert (await asking(protected(work, read))).body == b"ok"


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_an_interrupt_that_the_watcher_meets_is_not_dropped() -> None:
    async def read(receive: Receive) -> Message:
        raise BaseExceptionGroup("", [KeyboardInterrupt(), RuntimeError()])

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await anyio.sleep_forever()

    with pytest.raises(BaseExceptionGroup) as info:
        await asking(protected(work, read))
    assert info.group_contains(KeyboardInterrupt)


async def test_an_error_that_the_reader_meets_itself_is_raised_there() -> None:
    """FastAPI's body limit raises its 413 from `receive`."""
    error = RuntimeError("too large")

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()

    assert (await asking(protected(work, failing(error)), "error", leave=before_body())).error is error


async def test_an_upload_cut_in_the_middle_is_one_interruption() -> None:
    """C7: `ClientDisconnect`, and then no cancellation on top of it."""
    seen: list[str] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async for _ in Request(scope, receive).stream():
                pass
        except ClientDisconnect:
            await anyio.sleep(0.01)
            seen.append("cleaned")
            raise

    visit = await asking(protected(work), content=[b"a", b"b"], leave=after_body(1))
    assert seen == ["cleaned"]
    assert visit.status is None


async def test_two_tasks_of_the_application_may_read() -> None:
    """C1: the server still has one reader."""
    seen: list[Message] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        async def read() -> None:
            while (message := await receive())["type"] == "http.request":
                seen.append(message)
                await turns()

        async with anyio.create_task_group() as group:
            group.start_soon(read)
            group.start_soon(read)
            await turns(20)
            group.cancel_scope.cancel()
        await answer(send)

    visit = await LeavingClient(protected(work)).post("/", content=[b"a", b"b"])  # which may call that stealing
    assert visit.body == b"ok"
    assert sorted(message["body"] for message in seen) == [b"a", b"b"]


async def test_a_second_reader_waits_for_the_first() -> None:
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        async def read() -> None:
            seen.append((await receive())["type"])

        await receive()
        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as group:
                group.start_soon(read)
                group.start_soon(read)
                await turns()
                visit.leave()

    async with asked(protected(work)) as visit:
        pass
    assert seen == ["http.disconnect"] * 2


@pytest.mark.parametrize("body", [[b"a", b"b"], [b"a"]])
@pytest.mark.parametrize("headers", [{}, {"expect": "100-continue"}])
async def test_a_disconnect_after_a_task_of_the_work_has_read_the_body(body: list[bytes], headers: Any) -> None:
    """C1, C3: the work itself sits in one long wait and never asks for the watcher again."""

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        async def read() -> None:
            await anyio.sleep(0.002)
            for _ in body:
                await receive()
                await anyio.sleep(0.002)
            visit.leave()

        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await anyio.sleep_forever()

    async with asked(protected(work), content=body, headers=headers) as visit:
        pass


@pytest.mark.parametrize("policy", [{"grace": 60}, {"causes": ["stop"]}])
async def test_receive_answers_at_once_that_the_client_has_left(policy: dict[str, Any]) -> None:
    """Also within a grace, and if nobody listens to that."""
    seen: list[str] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        with anyio.fail_after(20):
            while (await receive())["type"] != "http.disconnect":
                pass
        seen.append("told")

    await asking(protected(work, **policy), leave=before_body())
    assert seen == ["told"]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_watcher_that_has_its_news_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python 3.12 on it is started eagerly; here by hand, for those before."""
    seen: list[str] = []

    def start_watcher(self: NativeLadder, reader: Reader) -> None:
        with pytest.raises(StopIteration):
            reader.watch_on().send(None)

    monkeypatch.setattr(NativeLadder, "start_watcher", start_watcher)

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        visit.leave()
        seen.append((await receive())["type"])

    async with asked(protected(work)) as visit:
        pass
    assert seen == ["http.disconnect"]


async def test_a_client_that_leaves_is_quiet_though_nobody_listens_to_that() -> None:
    """C13: `send` raises all the same."""

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        visit.leave()
        assert (await receive())["type"] == "http.disconnect"
        await answer(send)

    async with asked(protected(work, causes=["stop"])) as visit:
        pass


async def test_a_stall_after_the_client_has_left_does_not_bring_it_back() -> None:
    seen: list[str] = []
    unblocked = anyio.Event()

    async def write(send: Send, message: Message) -> None:
        if message.get("body") == b"x":
            await unblocked.wait()

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

        async def stuck() -> None:
            await send({"type": "http.response.body", "body": b"x", "more_body": True})

        async with anyio.create_task_group() as group:
            group.start_soon(stuck)
            await anyio.sleep(0.01)
            visit.leave()
            await anyio.sleep(0.1)
            with pytest.raises(ClientGone):
                await send({"type": "http.response.body", "body": b"y", "more_body": True})
            seen.append("refused")
            unblocked.set()

    async with asked(protected(work, write=write, send_timeout=0.05, grace=4)) as visit:
        pass
    assert seen == ["refused"]


async def test_a_last_send_that_was_cut_short_does_not_hide_a_disconnect() -> None:
    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        visit.stall()
        with anyio.move_on_after(0.01):
            await send({"type": "http.response.body", "body": b"x"})
        visit.leave()
        await anyio.sleep_forever()

    async with asked(protected(work)) as visit:
        pass


async def test_a_request_within_the_request_leaves_its_policy_behind() -> None:
    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        await anyio.sleep(0.001)

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await protect(inner, dict(scope), receive, send, CancelPolicy(timeout=0.2))
        await anyio.sleep(0.25)
        await answer(send)

    assert (await asking(protected(work))).body == b"ok"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_an_upload_keeps_no_watcher_for_each_of_its_pieces() -> None:
    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        async for _ in Request(scope, receive).stream():
            await turns(3)
        assert not getattr(scope["fastapi_cancel"].ladder, "_helpers", ())
        await answer(send)

    await asking(protected(work), content=[b"x"] * 200)


async def test_a_peek_takes_nothing_from_the_server() -> None:
    """C2: `is_disconnected` asks under a cancelled scope."""
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        assert await request.body() == b""
        peek = Request(scope, receive)
        peek._stream_consumed = True
        while not await peek.is_disconnected():
            visit.leave()
            await anyio.sleep(0.001)
        seen.append("disconnected")

    async with asked(protected(work, grace=4), server="hypercorn") as visit:
        pass
    assert seen == ["disconnected"]


async def test_a_complete_response_is_not_a_disconnect() -> None:
    """C5: the background task is not cancelled, whatever `receive` says then."""
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send)
        visit.leave()
        await turns(20)
        while (await receive())["type"] != "http.disconnect":
            pass
        await anyio.sleep(0.01)
        seen.append("background")

    async with asked(protected(work)) as visit:
        pass
    assert seen == ["background"]


async def test_trailers_and_pathsend_complete_a_response() -> None:
    seen: list[Any] = []

    async def with_trailers(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [], "trailers": True})
        await send({"type": "http.response.body", "body": b"x"})
        await send({"type": "http.response.trailers", "headers": [], "more_trailers": True})
        await send({"type": "http.response.trailers", "headers": []})
        visit.leave()
        await turns(20)
        seen.append("finished")

    async def with_a_path(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.pathsend", "path": "/etc/hostname"})
        visit.leave()
        await turns(20)
        seen.append("finished")

    for work in (with_trailers, with_a_path):
        async with asked(protected(work, write=drop)) as visit:
            pass
    assert seen == ["finished"] * 2


async def test_a_client_that_leaves_before_the_trailers_has_left() -> None:
    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [], "trailers": True})
        await send({"type": "http.response.body", "body": b"x"})
        visit.leave()
        await anyio.sleep_forever()

    async with asked(protected(work, write=drop)) as visit:
        pass


async def test_a_disconnect_while_the_last_message_goes_out_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """uvicorn answers http.disconnect as soon as the response is complete."""
    monkeypatch.setattr("fastapi_cancel.channel.PARTING", 0.01)

    async def write(send: Send, message: Message) -> None:
        if message["type"] == "http.response.body":
            await turns()
            visit.leave()
            await turns()

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await turns()
        await answer(send)
        await anyio.sleep(0.05)
        raise ClientGone("another client, of the background task")

    async with asked(protected(work, write=write), "error") as visit:
        pass
    assert visit.cause is None


async def test_a_busy_event_loop_does_not_end_the_last_send(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hypercorn on Trio, as a thousand streams end: cut off now, it would never close the connection."""
    monkeypatch.setattr("fastapi_cancel.channel.PARTING", 0.01)
    sent = False

    async def write(send: Send, message: Message) -> None:
        nonlocal sent
        if message["type"] == "http.response.body":
            visit.leave()
            for _ in range(12):
                sleep(0.005)
                await anyio.sleep(0)
            sent = True

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send)

    async with asked(protected(work, write=write)) as visit:
        pass
    assert (visit.cause, sent) == (None, True)


async def test_a_last_send_that_never_returns_ends_with_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hypercorn's, on an HTTP/2 stream that was reset while it had no credit."""
    monkeypatch.setattr("fastapi_cancel.channel.PARTING", 0.05)
    seen: list[Any] = []

    async def write(send: Send, message: Message) -> None:
        if message["type"] == "http.response.body":
            visit.leave()
            await anyio.sleep_forever()

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await answer(send)
        finally:
            seen.append("interrupted")

    async with asked(protected(work, write=write)) as visit:
        pass
    assert seen == ["interrupted"]
    assert visit.cause == "disconnect"


async def test_the_end_of_a_complete_response_is_not_waited_for_without_its_client() -> None:
    """Hypercorn's, on HTTP/2: all that was announced is out, to where nobody fetches it."""
    seen: list[Any] = []

    async def write(send: Send, message: Message) -> None:
        if message["type"] == "http.response.body" and not message["body"]:
            visit.leave()
            await anyio.sleep_forever()

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"3")]})
        await send({"type": "http.response.body", "body": b"all", "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        await turns()
        seen.append("background")

    async with asked(protected(work, write=write)) as visit:
        pass
    assert seen == ["background"]
    assert visit.cause is None


async def test_a_client_that_stops_reading_is_given_up() -> None:
    """C18: cause `stalled`, one timer for many sends."""
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(3):
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            await anyio.sleep(0.02)
        visit.stall()
        try:
            await send({"type": "http.response.body", "body": b"y", "more_body": True})
        finally:
            seen.append("interrupted")

    async with asked(protected(work, send_timeout=0.05)) as visit:
        pass
    assert seen == ["interrupted"]
    assert visit.body == b"xxx"


async def test_a_slow_reader_within_the_limit_is_served() -> None:
    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        async with anyio.create_task_group() as group:
            for _ in range(5):
                visit.stall()
                group.start_soon(read_on_later)
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def read_on_later() -> None:
        await anyio.sleep(0.7)
        visit.resume()

    async with asked(protected(work, send_timeout=3)) as visit:
        pass
    assert visit.body == b"xxxxx"


async def test_an_event_loop_that_stands_still_is_no_client_that_does_not_read() -> None:
    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        visit.stall()
        async with anyio.create_task_group() as group:
            group.start_soon(stand_still)
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def stand_still() -> None:
        await anyio.sleep(0.01)
        sleep(0.2)
        await anyio.sleep(0)
        visit.resume()

    async with asked(protected(work, send_timeout=0.1)) as visit:
        pass
    assert visit.body == b"x"


async def test_a_producer_that_never_waits_gives_way() -> None:
    """C17: the client leaves in a task that gets its turn only by that."""
    started = anyio.Event()
    sent = 0

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal sent
        await send({"type": "http.response.start", "status": 200, "headers": []})
        started.set()
        while True:
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            sent += 1

    await asking(protected(work), leave=when(started))
    assert sent < 200


async def test_whoever_keeps_receive_is_told_that_the_request_is_over() -> None:
    kept: list[Receive] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        kept.append(receive)
        await answer(send)

    await asking(protected(work))
    assert (await kept[0]())["type"] == "http.disconnect"
