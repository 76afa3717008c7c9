"""A watcher without a task. In process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from types import FunctionType
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from fastapi_cancel import CancelPolicy, Cause, _stepper, channel
from fastapi_cancel._stepper import only_waits
from fastapi_cancel.protect import KEY, protect

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("either_way")]

LEFT = {"type": "http.disconnect"}
START = {"type": "http.response.start", "status": 200, "headers": []}
END = {"type": "http.response.body"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def discard(message: Message) -> None:
    pass


async def serve(work: Any, receive: Receive, send: Send = discard) -> None:
    scope: Scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    await protect(work, scope, receive, send, CancelPolicy())


def tasks() -> int:
    return len(asyncio.all_tasks())


async def through(queue: asyncio.Queue[Message]) -> Message:
    """As a middleware hands it on: within the task that calls it, as far as it knows."""
    async with asyncio.timeout(5):
        return await queue.get()


@pytest.mark.parametrize("plain", [True, False])
async def test_a_receive_that_only_waits_is_watched_without_a_task(plain: bool) -> None:
    messages: asyncio.Queue[Message] = asyncio.Queue()
    seen: list[Any] = []
    before = tasks()

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            waiting = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_later(0.01, lambda: seen.append(tasks() - before))
            asyncio.get_running_loop().call_later(0.02, messages.put_nowait, LEFT)
            await waiting
        finally:
            await asyncio.sleep(0.01)
            seen.append(scope[KEY].ladder.cause)

    await serve(work, messages.get if plain else lambda: through(messages))
    assert seen == [0 if plain else 1, "disconnect"]


async def test_the_client_has_left_before_the_first_wait() -> None:
    """It is heard in the middle of the work's own step, which cannot take a cancellation then."""
    messages: asyncio.Queue[Message] = asyncio.Queue()
    messages.put_nowait({"type": "http.request", "body": b""})
    messages.put_nowait(LEFT)
    seen: list[str] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await asyncio.sleep(0)
            seen.append("cleaned")

    await serve(work, messages.get)
    assert seen == ["cleaned"]


def readers(messages: asyncio.Queue[Message]) -> int:
    return len(messages._getters)  # type: ignore[attr-defined]


async def test_nothing_is_left_of_it_when_the_work_has_ended() -> None:
    messages: asyncio.Queue[Message] = asyncio.Queue()
    seen: list[int] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.001)
        seen.append(readers(messages))

    await serve(work, messages.get)
    seen.append(readers(messages))
    seen.append(len(asyncio.get_running_loop()._ready))  # type: ignore[attr-defined]
    assert seen == [1, 0, 0]


async def test_nobody_reads_while_the_last_message_goes_out_or_after_it() -> None:
    """uvicorn wakes whoever does, to say that the response is complete."""
    messages: asyncio.Queue[Message] = asyncio.Queue()
    seen: list[int] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.001)
        for message in (START, END):
            await send(message)
        await asyncio.sleep(0.001)  # a background task's
        seen.append(readers(messages))

    async def send(message: Message) -> None:
        seen.append(readers(messages))

    await serve(work, messages.get, send)
    assert seen == [1, 0, 0]


@pytest.mark.parametrize("watched", [True, False])
async def test_what_has_a_content_length_may_still_send_when_that_is_out(watched: bool) -> None:
    """On Hypercorn's HTTP/2 a `send` to a client that has left meanwhile might never return."""
    messages: asyncio.Queue[Message] = asyncio.Queue()
    seen: list[int] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        if watched:
            await asyncio.sleep(0.001)
        await send({**START, "headers": [(b"content-length", b"3")]})
        await send({**END, "body": b"all", "more_body": True})
        asyncio.get_running_loop().call_soon(messages.put_nowait, LEFT)
        await asyncio.sleep(0.001)
        await send(END)

    async def send(message: Message) -> None:
        seen.append(len(message.get("body", b"")))

    await serve(work, messages.get, send)
    assert seen == [0, 3]


@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("plain", [True, False])
async def test_the_server_stops_while_the_end_of_a_complete_response_goes_out(plain: bool, leaves: bool) -> None:
    """C14: its cancellation goes through, and the cleanup awaits, also if the client leaves in the same turn."""
    messages: asyncio.Queue[Message] = asyncio.Queue()
    seen: list[str] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.001)
        await send({**START, "headers": [(b"content-length", b"3")]})
        await send({**END, "body": b"all", "more_body": True})
        try:
            await send(END)
        finally:
            await asyncio.sleep(0.001)
            seen.append("cleaned")

    def stop() -> None:
        if leaves:
            messages.put_nowait(LEFT)
        host.cancel()

    async def send(message: Message) -> None:
        if message == END:
            asyncio.get_running_loop().call_later(0.01, stop)
            await asyncio.get_running_loop().create_future()

    host = asyncio.create_task(serve(work, messages.get if plain else lambda: through(messages), send))
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(asyncio.shield(host), 5)
    assert host.cancelled()
    assert seen == ["cleaned"]


@pytest.mark.parametrize("by", ["the work", "a task of its own"])
async def test_a_client_that_leaves_while_the_last_message_goes_out(monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    """Hypercorn's `send` never returns then, on HTTP/2."""
    monkeypatch.setattr(channel, "PARTING", 0.01)
    messages: asyncio.Queue[Message] = asyncio.Queue()
    cause: list[Cause | None] = []

    async def answer(send: Send) -> None:
        for message in (START, END):
            await send(message)

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.001)
        try:
            await (answer(send) if by == "the work" else asyncio.create_task(answer(send)))
        finally:
            cause.append(scope[KEY].ladder.cause)

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            asyncio.get_running_loop().call_later(0.01, messages.put_nowait, LEFT)
            await asyncio.get_running_loop().create_future()

    await asyncio.wait_for(serve(work, messages.get, send), 5)
    assert cause == ["disconnect"]


async def test_a_message_that_comes_as_the_work_ends_stays_with_the_server() -> None:
    messages: asyncio.Queue[Message] = asyncio.Queue()
    kept: list[Receive] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        kept.append(receive)
        await asyncio.sleep(0.001)
        messages.put_nowait(LEFT)  # wakes the watcher, in the next turn

    await serve(work, messages.get)
    for _ in range(3):
        await asyncio.sleep(0)
    assert messages.get_nowait() == LEFT
    assert await kept[0]() == LEFT  # and nothing else has gone wrong


async def test_pieces_of_a_body_are_read_ahead_one_at_a_time() -> None:
    messages: asyncio.Queue[Message] = asyncio.Queue()
    for number in range(3):
        messages.put_nowait({"type": "http.request", "body": b"%d" % number, "more_body": number < 2})
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(3):
            await asyncio.sleep(0.001)
            left = messages.qsize()
            seen.append(((await receive())["body"], left))

    await serve(work, messages.get)
    assert seen == [(b"0", 2), (b"1", 1), (b"2", 0)]


@pytest.mark.parametrize("plain", [True, False])
async def test_an_empty_piece_does_not_stop_it(plain: bool) -> None:
    """The work waits for good: it would not ask for another watcher."""
    messages: asyncio.Queue[Message] = asyncio.Queue()
    seen: list[Cause | None] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(0.001, messages.put_nowait, {"type": "http.request", "body": b"", "more_body": True})
        loop.call_later(0.002, messages.put_nowait, LEFT)
        try:
            await asyncio.sleep(10)
        finally:
            await asyncio.sleep(0.001)
            seen.append(scope[KEY].cause)

    await serve(work, messages.get if plain else lambda: through(messages))
    assert seen == ["disconnect"]


async def test_whoever_waits_for_the_watcher_is_told_by_the_end_of_the_work() -> None:
    messages: asyncio.Queue[Message] = asyncio.Queue()
    messages.put_nowait({"type": "http.request", "body": b""})
    readers: list[asyncio.Task[Message]] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        readers.append(asyncio.create_task(receive()))  # type: ignore[arg-type]
        await asyncio.sleep(0.001)

    await serve(work, messages.get)
    assert await asyncio.wait_for(readers[0], 5) == LEFT


async def test_a_wait_that_the_server_cancels_ends_the_watching_quietly() -> None:
    messages: asyncio.Queue[Message] = asyncio.Queue()
    cause: list[Cause | None] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.001)
        messages._getters[0].cancel()  # type: ignore[attr-defined]
        await asyncio.sleep(0.001)
        cause.append(scope[KEY].ladder.cause)

    logged: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context))
    await serve(work, messages.get)
    assert (cause, logged) == ([None], [])


class Failing:
    """A server whose `receive` only waits, and fails after the body."""

    def __init__(self, error: Exception, at_once: bool) -> None:
        self._error = error
        self._at_once = at_once
        self._body: list[Message] = [{"type": "http.request", "body": b""}]

    @_stepper.plain
    async def receive(self) -> Message:
        if self._body:
            return self._body.pop()
        if not self._at_once:
            failed = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_later(0.001, failed.set_exception, self._error)
            await failed
        raise self._error


@pytest.mark.parametrize("at_once", [True, False])
async def test_an_error_of_the_system_says_that_the_client_is_gone(at_once: bool) -> None:
    """C6."""
    seen: list[Cause | None] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.001)
            seen.append(scope[KEY].cause)

    await serve(work, Failing(ConnectionResetError(), at_once).receive)
    assert seen == ["disconnect"]


@pytest.mark.parametrize("at_once", [True, False])
async def test_any_other_error_is_for_whoever_reads(at_once: bool) -> None:
    """C6. And whoever waits for the watcher's news is told."""
    seen: list[str] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.0001)
        assert (await receive())["type"] == "http.request"
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                await receive()
        seen.append("told")

    await serve(work, Failing(ZeroDivisionError(), at_once).receive)
    assert seen == ["told"]


class Shut(asyncio.Queue[Message]):
    """A queue of Python 3.13 after its ``shutdown``."""

    def __init__(self) -> None:
        super().__init__()
        self._is_shutdown = True

    def get_nowait(self) -> Message:
        raise ZeroDivisionError


async def test_a_queue_that_is_shut_down_says_so_to_whoever_reads() -> None:
    queue = Shut()
    seen: list[str] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.001)
        seen.append(f"{len(queue._getters)} wait")  # type: ignore[attr-defined]
        try:
            await receive()
        except ZeroDivisionError:
            seen.append("told")

    async with asyncio.timeout(2):
        await serve(work, queue.get)
    assert seen == ["0 wait", "told"]


async def test_a_reader_that_is_closed_when_it_was_woken_wakes_the_next() -> None:
    """As `get` does: the message is still there, and the queue has woken one for it."""
    queue: asyncio.Queue[Message] = asyncio.Queue()
    other: list[asyncio.Task[Message]] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.001)
        other.append(asyncio.create_task(queue.get()))
        await asyncio.sleep(0.001)
        queue.put_nowait(LEFT)

    await serve(work, queue.get)
    async with asyncio.timeout(2):
        assert await other[0] == LEFT


async def test_but_not_for_a_message_that_somebody_has_taken() -> None:
    queue: asyncio.Queue[Message] = asyncio.Queue()
    other: list[asyncio.Task[Message]] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.001)
        other.append(asyncio.create_task(queue.get()))
        await asyncio.sleep(0.001)
        queue.put_nowait(LEFT)
        assert queue.get_nowait() == LEFT

    await serve(work, queue.get)
    await asyncio.sleep(0)
    assert len(queue._getters) == 1  # type: ignore[attr-defined]
    other[0].cancel()


async def test_a_reader_whose_message_somebody_has_taken_waits_on() -> None:
    queue: asyncio.Queue[Message] = asyncio.Queue()
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.001)
        queue.put_nowait({"type": "http.request", "body": b""})
        queue.get_nowait()
        await asyncio.sleep(0.001)
        queue.put_nowait(LEFT)
        try:
            await asyncio.sleep(60)
        finally:
            seen.append(scope[KEY].cause)

    async with asyncio.timeout(2):
        await serve(work, queue.get)
    assert seen == ["disconnect"]


async def test_a_queue_of_another_kind_is_read_as_any_receive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later Python's, whose waiters are not where they were."""
    monkeypatch.setattr(_stepper, "_has_getters", False)
    monkeypatch.setattr(_stepper.Reader, "step_queue", None)
    queue: asyncio.Queue[Message] = asyncio.Queue()
    seen: list[Any] = []
    before = tasks()

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        asyncio.get_running_loop().call_later(0.005, lambda: seen.append(tasks() - before))
        asyncio.get_running_loop().call_later(0.01, queue.put_nowait, LEFT)
        try:
            await asyncio.sleep(60)
        finally:
            seen.append(scope[KEY].cause)

    await serve(work, queue.get)
    assert seen == [0, "disconnect"]


class Wakened:
    """A server whose `receive` only waits; a message that comes to a reader who is closed in that very turn is lost."""

    def __init__(self) -> None:
        self.futures: list[asyncio.Future[Message]] = []

    @_stepper.plain
    async def receive(self) -> Message:
        self.futures.append(asyncio.get_running_loop().create_future())
        return await self.futures[-1]


async def test_one_that_begins_anew_in_the_turn_that_woke_the_last_waits_for_its_own() -> None:
    """It was paused for the last message, which has failed: the wake-up of what was read before still comes."""
    server = Wakened()
    seen: list[Any] = []

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            raise ZeroDivisionError

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.0001)
        await send(START)
        server.futures[-1].set_result({"type": "http.request", "body": b""})
        with suppress(ZeroDivisionError):
            await send(END)
        await asyncio.sleep(0.001)
        seen.extend([len(server.futures), len(server.futures[-1]._callbacks)])

    await serve(work, server.receive, send)
    assert seen == [2, 1]


async def test_a_wait_of_the_server_s_that_is_cancelled_ends_the_reader_alone() -> None:
    """Nobody has cancelled the work. It is asked again when the work asks."""
    server = Wakened()
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.0001)
        server.futures[-1].cancel()
        await asyncio.sleep(0.001)
        seen.extend([len(server.futures), scope[KEY].cause])
        asyncio.get_running_loop().call_soon(lambda: server.futures[-1].set_result(LEFT))
        seen.append((await receive())["type"])

    async with asyncio.timeout(2):
        await serve(work, server.receive)
    assert seen == [1, None, "http.disconnect"]


def of_uvicorn(function: Callable[..., Any]) -> Receive:
    """A `receive` of a server that may be uvicorn's, as far as its name goes."""
    named = FunctionType(function.__code__, function.__globals__ | {"__name__": "uvicorn.protocols.http.h11_impl"})
    assert named.__module__ == "uvicorn.protocols.http.h11_impl"
    cycle = type("Cycle", (), {"receive": named})()
    return cycle.receive  # type: ignore[no-any-return]


async def test_a_uvicorn_that_does_what_we_have_not_read_gets_a_task() -> None:
    async def as_read(self: Any) -> Any:
        if not self.disconnected:
            self.flow.resume_reading()
            await self.message_event.wait()

    async def otherwise(self: Any) -> Any:
        async with asyncio.timeout(5):
            await self.message_event.wait()

    assert only_waits(of_uvicorn(as_read))
    assert not only_waits(of_uvicorn(otherwise))


async def test_what_is_wrapped_gets_a_task() -> None:
    class Tracer:
        """As wrapt makes them: it has whatever attributes the function has."""

        def __init__(self, function: Receive) -> None:
            self.function = function

        def __getattr__(self, name: str) -> Any:
            return getattr(self.function, name)

        async def __call__(self) -> Message:
            async with asyncio.timeout(5):
                return await self.function()

    messages: asyncio.Queue[Message] = asyncio.Queue()
    assert only_waits(messages.get)
    assert not only_waits(Tracer(messages.get))
    assert not only_waits(lambda: through(messages))
