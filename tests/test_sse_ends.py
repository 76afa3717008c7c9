"""How an event stream ends: what a server's cancellation meets, who is told, what is left. In process."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncGenerator, Callable
from contextlib import nullcontext
from typing import Any

import anyio
import pytest
from starlette.types import Message

from fastapi_cancel import CancelPolicy, SSEResponse, drain

from .asgi import Connection
from .test_sse import Feed, Notes

pytestmark = pytest.mark.anyio
Events = AsyncGenerator[Any]


class Wire(Connection):
    """A connection on which one can wait for what is sent."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.moved = anyio.Event()

    async def send(self, message: Message) -> None:
        await super().send(message)
        self.moved.set()

    async def until(self, *texts: bytes) -> None:
        with anyio.fail_after(5):
            while not all(text in self.body for text in texts):
                self.moved = anyio.Event()
                await self.moved.wait()

    @property
    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.sent[1:]]

    @property
    def ended(self) -> bool:
        return bool(self.sent) and self.sent[-1].get("more_body") is False


async def drained(response: SSEResponse, text: bytes = b"data: 1", meanwhile: Callable[[], object] = int) -> Wire:
    """What is sent in all if the server is told to stop after ``text``."""
    wire = Wire()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(wire.run, response)
            await wire.until(text)
            assert drain() == 1
            meanwhile()
    assert drain() == 0
    return wire


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("around", [nullcontext, anyio.CancelScope])
@pytest.mark.parametrize("first", ["cancellation", "error"])
async def test_the_servers_cancellation_goes_before_an_error_of_the_sender(
    first: str, around: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    """C14: in whatever order they come, in one turn of the event loop. The error is logged."""
    feed = Feed("1")

    async def sender() -> None:
        await feed.waiting.wait()
        if first == "cancellation":
            running.cancel()
        else:
            asyncio.get_running_loop().call_soon(running.cancel)
        raise ZeroDivisionError

    async def run() -> None:
        with around():
            await Wire().run(SSEResponse(feed.events(), data_sender_callable=sender))

    running = asyncio.create_task(run())
    with pytest.raises(asyncio.CancelledError):
        await running
    assert feed.closed.is_set()
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_servers_cancellation_goes_before_an_error_of_the_content_after_a_cause() -> None:
    """C14: while what the content yielded before its error goes out, the stream is stopped and the server cancels."""
    wire = Wire()

    async def content() -> Events:
        yield "1"
        yield "2"
        wire.unblocked = anyio.Event()
        raise ZeroDivisionError

    response = SSEResponse(content())
    running = asyncio.create_task(wire.run(response))
    await asyncio.sleep(0.01)
    assert response._ladder is not None
    response._ladder.signal("stop", at_once=True)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


@pytest.mark.parametrize("policy", [CancelPolicy(grace=60), CancelPolicy(causes={"timeout"})])
async def test_the_close_handler_is_for_every_client_that_leaves(policy: CancelPolicy) -> None:
    """In the grace of a shutdown, and also if the stream goes on to its end for nobody."""
    notes = Notes()
    feed = Feed("1")
    response = SSEResponse(feed.events(), client_close_handler_callable=notes.client_close, policy=policy)
    wire = Wire()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(wire.run, response)
            await wire.until(b"data: 1")
            assert drain() == 1
            wire.leave()
            while response._ladder is None or not response._ladder.left:
                await anyio.sleep(0.001)
            feed.put(StopAsyncIteration)
    assert notes == [{"type": "http.disconnect"}]
    await response.aclose()
    assert len(notes) == 1


async def test_the_close_handler_is_not_for_a_client_that_stays() -> None:
    notes = Notes()
    await drained(SSEResponse(Feed("1").events(), client_close_handler_callable=notes.client_close))
    assert notes == []


async def test_events_that_are_ready_may_go_out_one_by_one() -> None:
    """Each is sent before the generator goes on, after a wait as well as in a burst."""
    wire = Wire()
    sent: list[bytes] = []

    async def content() -> Events:
        for number in range(6):
            if number == 3:
                await anyio.sleep(0.001)
            yield number
            sent.append(wire.bodies[-1])

    await wire.run(SSEResponse(content(), batch=False))
    assert sent == [b"data: %d\r\n\r\n" % number for number in range(6)]
    assert wire.body == b"".join(sent)


@pytest.mark.parametrize("sender", [False, True])
@pytest.mark.parametrize("end", ["finish", "leave", "drain", "leave_before_start"])
async def test_an_event_stream_leaves_no_reference_cycle(end: str, sender: bool) -> None:
    """It is freed at its end, not when the garbage collector comes."""
    wire = Wire(raises=end == "leave_before_start")
    finish = anyio.Event()
    ends = {"finish": finish.set, "leave": wire.leave, "drain": drain}
    freed = anyio.Event()

    async def content() -> Events:
        yield "1"
        await finish.wait()

    async def run() -> None:
        response = SSEResponse(content(), heartbeat=0.01, data_sender_callable=anyio.sleep_forever if sender else None)
        weakref.finalize(response, freed.set)
        await wire.run(response)

    gc.collect()
    gc.disable()
    try:
        with anyio.fail_after(5):
            async with anyio.create_task_group() as group:
                if end == "leave_before_start":
                    wire.leave()
                group.start_soon(run)
                if end in ends:
                    await wire.until(b"data: 1", b": ping")
                    ends[end]()
        assert freed.is_set()
    finally:
        gc.enable()


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_a_heartbeat_that_begins_when_all_is_over(caplog: pytest.LogCaptureFixture) -> None:
    """Made while the client leaves, to be sent two turns later: the cleanup is running by then."""

    def beat() -> str:
        assert response._ladder is not None
        response._ladder.signal("disconnect")
        return "beat"

    async def cleanup() -> None:
        await anyio.sleep(0.01)

    wire = Wire()
    response = SSEResponse(Feed("1").events(), heartbeat=0.01, ping_message_factory=beat, cleanup=cleanup)
    with anyio.fail_after(5):
        await wire.run(response)
    assert wire.body == b"data: 1\r\n\r\n"
    assert caplog.records == []
