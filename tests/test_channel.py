"""The one reader, and the ASGI 2.4 server that the toolkit is to the application. In process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from fastapi_cancel import CancelPolicy, ClientGone
from fastapi_cancel._native import NativeLadder
from fastapi_cancel.protect import protect

from .asgi import Connection, run_until_left

pytestmark = pytest.mark.anyio
Work = Callable[[Scope, Receive, Send], Awaitable[None]]


def protected(work: Any, **policy: Any) -> Work:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await protect(work, scope, receive, send, CancelPolicy(**policy))

    return app


async def answer(send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


async def turns(count: int = 6) -> None:
    """Let everybody have a turn."""
    for _ in range(count):
        await anyio.lowlevel.checkpoint()


async def test_the_body_is_not_taken_from_its_reader() -> None:
    """C4: the handler waits first, then reads: nothing is missing."""
    connection = Connection(body=[b"a", b"b", b"c"])

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        async for chunk in Request(scope, receive).stream():
            await turns()
            body += chunk
        assert body == b"abc"
        await answer(send)

    await connection.run(protected(work))
    assert connection.body == b"ok"


async def test_one_message_is_read_ahead_and_no_more() -> None:
    """C4: back-pressure stays with the server."""
    connection = Connection(body=[b"a", b"b", b"c"])

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await turns(20)
        assert connection.reads == 1
        assert (await receive())["body"] == b"a"
        await turns(20)
        assert connection.reads == 2
        await answer(send)

    await connection.run(protected(work))


async def test_an_empty_piece_does_not_stop_the_watcher() -> None:
    """httpx's `ASGITransport` sends one first."""
    connection, started = Connection(body=[b"", b"", b""]), anyio.Event()

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        started.set()
        await anyio.sleep_forever()

    await run_until_left(connection, protected(work), started)


async def test_a_scope_without_an_asgi_version_gets_none_left() -> None:
    """Starlette's `TestClient` has none."""
    connection = Connection()
    del connection.scope["asgi"]

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["asgi"] == {"spec_version": "2.4"}
        await answer(send)

    await connection.run(protected(work))
    assert "asgi" not in connection.scope


async def test_nothing_is_read_ahead_of_the_handler_on_expect_continue() -> None:
    connection = Connection(body=[b"a"], headers=[(b"host", b"x"), (b"expect", b"100-Continue")])

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await turns(20)
        assert connection.reads == 0
        await send({"type": "http.response.start", "status": 413, "headers": []})
        await turns(20)
        assert connection.reads == 0, "middleware may still hold it"
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await turns(20)
        assert connection.reads == 1
        await send({"type": "http.response.body", "body": b""})

    await connection.run(protected(work))


async def test_another_expectation_is_none_of_ours() -> None:
    connection = Connection(body=[b"a"], headers=[(b"expect", b"a-pony")])

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await turns(20)
        assert connection.reads == 1
        await answer(send)

    await connection.run(protected(work))


@pytest.mark.parametrize("once", [False, True])
async def test_receive_goes_on_answering_that_the_client_has_left(once: bool) -> None:
    """C2: also on servers that say it once."""
    connection = Connection(once=once)
    started, seen = anyio.Event(), list[Any]()

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "http.request"
        with anyio.CancelScope(shield=True):
            started.set()
            seen.extend([(await receive())["type"] for _ in range(3)])

    await run_until_left(connection, protected(work), started)
    assert seen == ["http.disconnect"] * 3


@pytest.mark.parametrize("raises", [False, True])
async def test_send_raises_once_the_client_has_left(raises: bool) -> None:
    """C2, C13: as an `OSError`, and nothing of it reaches the server."""
    connection = Connection(raises=raises)
    started, seen = anyio.Event(), list[Any]()

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        started.set()
        await connection.left.wait()
        try:
            while True:
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await turns(1)
        except OSError as exc:
            seen.append(type(exc))
            raise

    await run_until_left(connection, protected(work, grace=4), started)
    assert seen == [ClientGone]


async def test_a_server_that_raises_oserror_from_the_last_send_is_silent() -> None:
    connection = Connection(raises=True)

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        connection.leave()
        await send({"type": "http.response.body", "body": b"never arrives"})
        raise AssertionError("it was told")

    await connection.run(protected(work))


async def test_the_application_sees_an_asgi_2_4_server() -> None:
    connection = Connection()

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["asgi"] == {"version": "3.0", "spec_version": "2.4"}
        await answer(send)

    await connection.run(protected(work))
    assert connection.scope["asgi"]["spec_version"] == "2.3"
    assert "fastapi_cancel" not in connection.scope


async def test_oserror_from_receive_means_gone() -> None:
    """C6."""
    connection = Connection(error=ConnectionResetError("by peer"))
    started, seen = anyio.Event(), list[Any]()

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            seen.append("cleaned")

    await run_until_left(connection, protected(work), started)
    assert seen == ["cleaned"]


async def test_oserror_in_a_task_group_of_the_middleware_means_gone() -> None:
    connection = Connection(error=ExceptionGroup("", [ConnectionResetError("by peer")]))
    started = anyio.Event()

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        started.set()
        await anyio.sleep_forever()

    await run_until_left(connection, protected(work), started)


@pytest.mark.parametrize("error", [RuntimeError("boom"), ExceptionGroup("", [RuntimeError("boom"), OSError()])])
async def test_another_error_from_receive_reaches_whoever_reads(error: Exception) -> None:
    """C6: the watcher keeps it; a handler that never reads is not disturbed."""
    connection = Connection(error=error)
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await turns()
        connection.leave()
        await turns()
        try:
            assert (await receive())["type"] == "http.request"
            for _ in range(2):
                with pytest.raises(type(error)):
                    await receive()
            await receive()
        finally:
            seen.append("cleaned")

    with pytest.raises(type(error)):
        await connection.run(protected(work))
    assert seen == ["cleaned"]


async def test_an_error_that_the_watcher_meets_as_it_is_stopped_is_dropped() -> None:
    """C13: the work has ended; a middleware's task group raises its 413 and the cancellation together."""

    class Both(Connection):
        async def receive(self) -> Message:
            async def fail() -> None:
                try:
                    await anyio.sleep_forever()
                finally:
                    raise RuntimeError("too large")

            async with anyio.create_task_group() as group:
                group.start_soon(fail)
                group.start_soon(anyio.sleep_forever)
            raise AssertionError

    connection = Both()

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await anyio.sleep(0.01)
        await answer(send)

    await connection.run(protected(work))
    assert connection.body == b"ok"


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_an_interrupt_that_the_watcher_meets_is_not_dropped() -> None:
    class Interrupted(Connection):
        async def receive(self) -> Message:
            raise BaseExceptionGroup("", [KeyboardInterrupt(), RuntimeError()])

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await anyio.sleep_forever()

    with pytest.raises(BaseExceptionGroup) as info:
        await Interrupted().run(protected(work))
    assert info.group_contains(KeyboardInterrupt)


async def test_an_error_that_the_reader_meets_itself_is_raised_there() -> None:
    """FastAPI's body limit raises its 413 from `receive`."""
    connection = Connection(body=[], error=RuntimeError("too large"))
    connection.left.set()

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()

    with pytest.raises(RuntimeError, match="too large"):
        await connection.run(protected(work))


async def test_an_upload_cut_in_the_middle_is_one_interruption() -> None:
    """C7: `ClientDisconnect`, and then no cancellation on top of it."""
    connection = Connection(body=[b"a", b"b"])
    connection.pieces = [b"a", b"b"]
    started, seen = anyio.Event(), list[Any]()

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async for _ in Request(scope, receive).stream():
                connection.pieces.clear()
                started.set()
        except ClientDisconnect:
            await anyio.sleep(0.01)
            seen.append("cleaned")
            raise

    await run_until_left(connection, protected(work), started)
    assert seen == ["cleaned"]
    assert connection.sent == []


async def test_two_tasks_of_the_application_may_read() -> None:
    """C1: the server still has one reader."""
    connection = Connection(body=[b"a", b"b"])
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

    await connection.run(protected(work))
    assert sorted(message["body"] for message in seen) == [b"a", b"b"]


async def test_a_second_reader_waits_for_the_first() -> None:
    connection = Connection(body=[])
    connection.pieces = []
    started = anyio.Event()
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        async def read() -> None:
            seen.append((await receive())["type"])

        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as group:
                group.start_soon(read)
                group.start_soon(read)
                await turns()
                started.set()

    await run_until_left(connection, protected(work), started)
    assert seen == ["http.disconnect"] * 2


@pytest.mark.parametrize("body", [[b"a", b"b"], [b"a"]])
@pytest.mark.parametrize("headers", [[], [(b"expect", b"100-continue")]])
async def test_a_disconnect_after_a_task_of_the_work_has_read_the_body(body: list[bytes], headers: Any) -> None:
    """C1, C3: the work itself sits in one long wait and never asks for the watcher again."""
    connection, started = Connection(body=list(body), headers=headers), anyio.Event()

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        async def read() -> None:
            await anyio.sleep(0.002)
            for _ in body:
                await receive()
                await anyio.sleep(0.002)
            started.set()

        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await anyio.sleep_forever()

    await run_until_left(connection, protected(work), started)


async def test_receive_answers_at_once_that_the_client_has_left() -> None:
    """Also within a grace, and if nobody listens to that."""
    for policy in (CancelPolicy(grace=4), CancelPolicy(causes=["stop"])):
        connection = Connection()
        connection.leave()
        seen: list[str] = []

        async def work(scope: Scope, receive: Receive, send: Send, connection: Any = connection) -> None:
            with anyio.fail_after(2):
                while (await receive())["type"] != "http.disconnect":
                    pass
            seen.append("told")  # noqa: B023

        async def app(scope: Scope, receive: Receive, send: Send, policy: CancelPolicy = policy) -> None:
            await protect(work, scope, receive, send, policy)

        connection.pieces = []
        await connection.run(app)
        assert seen == ["told"]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_watcher_that_has_its_news_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python 3.12 on it is started eagerly; here by hand, for those before."""
    connection = Connection(body=[])
    connection.pieces = [b""]
    seen = []

    def spawn(self: NativeLadder, function: Callable[[], Any]) -> None:
        with pytest.raises(StopIteration):
            function().send(None)

    monkeypatch.setattr(NativeLadder, "spawn", spawn)

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        connection.left = AlreadySet()
        seen.append((await receive())["type"])

    await connection.run(protected(work))
    assert seen == ["http.disconnect"]


class AlreadySet:
    """An event that is set, and whose `wait` does not even give way."""

    def is_set(self) -> bool:
        return True

    async def wait(self) -> None: ...


async def test_a_client_that_leaves_is_quiet_though_nobody_listens_to_that() -> None:
    """C13: `send` raises all the same."""
    connection = Connection()

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        connection.leave()
        assert (await receive())["type"] == "http.disconnect"
        await answer(send)

    await connection.run(protected(work, causes=["stop"]))


async def test_a_stall_after_the_client_has_left_does_not_bring_it_back() -> None:
    connection = Connection()
    seen = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        connection.unblocked = anyio.Event()

        async def stuck() -> None:
            await send({"type": "http.response.body", "body": b"x", "more_body": True})

        async with anyio.create_task_group() as group:
            group.start_soon(stuck)
            await anyio.sleep(0.01)
            connection.left.set()
            await anyio.sleep(0.1)
            with pytest.raises(ClientGone):
                await send({"type": "http.response.body", "body": b"y", "more_body": True})
            seen.append("refused")
            connection.unblocked.set()

    await connection.run(protected(work, send_timeout=0.05, grace=4))
    assert seen == ["refused"]


async def test_a_last_send_that_was_cut_short_does_not_hide_a_disconnect() -> None:
    connection, started = Connection(), anyio.Event()

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        connection.unblocked = anyio.Event()
        with anyio.move_on_after(0.01):
            await send({"type": "http.response.body", "body": b"x"})
        started.set()
        await anyio.sleep_forever()

    await run_until_left(connection, protected(work), started)


async def test_a_request_within_the_request_leaves_its_policy_behind() -> None:
    connection = Connection()

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        await anyio.sleep(0.001)

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await protect(inner, dict(scope), receive, send, CancelPolicy(timeout=0.03))
        await anyio.sleep(0.06)
        await answer(send)

    await connection.run(protected(work))
    assert connection.body == b"ok"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_an_upload_keeps_no_watcher_for_each_of_its_pieces() -> None:
    connection = Connection(body=[b"x"] * 200)

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        async for _ in Request(scope, receive).stream():
            await turns(3)
        assert len(getattr(scope["fastapi_cancel"].ladder, "_helpers", ())) < 4
        await answer(send)

    await connection.run(protected(work))


async def test_a_peek_takes_nothing_from_the_server() -> None:
    """C2: `is_disconnected` asks under a cancelled scope."""
    connection = Connection(once=True)
    started = anyio.Event()
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        assert await request.body() == b""
        peek = Request(scope, receive)
        peek._stream_consumed = True
        while not await peek.is_disconnected():
            started.set()
            await anyio.sleep(0.001)
        seen.append("disconnected")

    await run_until_left(connection, protected(work, grace=4), started)
    assert seen == ["disconnected"]


async def test_a_complete_response_is_not_a_disconnect() -> None:
    """C5: the background task is not cancelled, whatever `receive` says then."""
    connection = Connection()
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send)
        connection.leave()
        await turns(20)
        while (await receive())["type"] != "http.disconnect":
            pass
        await anyio.sleep(0.01)
        seen.append("background")

    await connection.run(protected(work))
    assert seen == ["background"]


async def test_trailers_and_pathsend_complete_a_response() -> None:
    seen: list[Any] = []

    async def with_trailers(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [], "trailers": True})
        await send({"type": "http.response.body", "body": b"x"})
        await send({"type": "http.response.trailers", "headers": [], "more_trailers": True})
        await send({"type": "http.response.trailers", "headers": []})
        connection.leave()
        await turns(20)
        seen.append("finished")

    async def with_a_path(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.pathsend", "path": "/etc/hostname"})
        connection.leave()
        await turns(20)
        seen.append("finished")

    for work in (with_trailers, with_a_path):
        connection = Connection()
        await connection.run(protected(work))
    assert seen == ["finished"] * 2


async def test_a_client_that_leaves_before_the_trailers_has_left() -> None:
    connection = Connection()
    started = anyio.Event()

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [], "trailers": True})
        await send({"type": "http.response.body", "body": b"x"})
        started.set()
        await anyio.sleep_forever()

    await run_until_left(connection, protected(work), started)


async def test_a_disconnect_while_the_last_message_goes_out_is_the_end() -> None:
    """uvicorn answers http.disconnect as soon as the response is complete."""
    connection = Connection()
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await turns()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        connection.unblocked = anyio.Event()

        async def leave() -> None:
            await turns()
            connection.left.set()
            await turns()
            connection.unblocked.set()

        async with anyio.create_task_group() as group:
            group.start_soon(leave)
            await send({"type": "http.response.body", "body": b"x"})
        seen.append("background")

    await connection.run(protected(work))
    assert seen == ["background"]


async def test_a_client_that_stops_reading_is_given_up() -> None:
    """C18: cause `stalled`, one timer for many sends."""
    connection = Connection()
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(3):
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            await anyio.sleep(0.02)
        connection.unblocked = anyio.Event()
        try:
            await send({"type": "http.response.body", "body": b"y", "more_body": True})
        finally:
            seen.append("interrupted")

    with anyio.fail_after(5):
        await connection.run(protected(work, send_timeout=0.05))
    assert seen == ["interrupted"]
    assert connection.body == b"xxx"


async def test_a_slow_reader_within_the_limit_is_served() -> None:
    connection = Connection()

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        async with anyio.create_task_group() as group:
            for _ in range(5):
                connection.unblocked = anyio.Event()
                group.start_soon(unblock_later)
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def unblock_later() -> None:
        await anyio.sleep(0.3)
        connection.unblocked.set()

    await connection.run(protected(work, send_timeout=1))
    assert connection.body == b"xxxxx"


async def test_a_producer_that_never_waits_gives_way() -> None:
    """C17: the client leaves in a task that gets its turn only by that."""
    connection = Connection()
    started = anyio.Event()
    sent = 0

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal sent
        await send({"type": "http.response.start", "status": 200, "headers": []})
        started.set()
        while True:
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            sent += 1

    await run_until_left(connection, protected(work), started)
    assert sent < 200


async def test_whoever_keeps_receive_is_told_that_the_request_is_over() -> None:
    connection = Connection()
    kept: list[Receive] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        kept.append(receive)
        await answer(send)

    await connection.run(protected(work))
    assert (await kept[0]())["type"] == "http.disconnect"
