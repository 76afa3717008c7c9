"""Requests that need no ladder, or get theirs in the middle. In process, on asyncio."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from fastapi_cancel import CancelPolicy
from fastapi_cancel.channel import Channel
from fastapi_cancel.exceptions import ClientGone
from fastapi_cancel.ladder import DONE, RUNNING
from fastapi_cancel.protect import KEY, protect

pytestmark = pytest.mark.anyio

START = {"type": "http.response.start", "status": 200, "headers": []}
BODY = {"type": "http.response.body", "body": b"x"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def never_comes() -> Message:
    await asyncio.sleep(3600)
    raise AssertionError


async def discard(message: Message) -> None:
    pass


async def ask(work: Any, policy: CancelPolicy | None = None) -> None:
    scope: Scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    async with asyncio.timeout(20):
        await protect(work, scope, never_comes, discard, policy or CancelPolicy())


async def test_one_that_is_over_soon_needs_none() -> None:
    channels: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        channels.append(scope[KEY])
        await asyncio.sleep(0)
        await asyncio.sleep(0.0001)
        await send(START)
        await send(BODY)
        await asyncio.sleep(0.0001)

    await ask(work)
    assert channels[0].made is None
    assert channels[0].cause is None


async def test_one_with_a_time_limit_has_it_from_the_beginning() -> None:
    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope[KEY].made is not None

    await ask(work, CancelPolicy(timeout=5))


async def test_it_is_made_for_who_asks() -> None:
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.0001)
        scope[KEY].ladder.signal("disconnect")
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.0001)
            seen.append(scope[KEY].cause)

    await ask(work)
    assert seen == ["disconnect"]


@pytest.mark.parametrize("waits", [1, 3])
async def test_it_is_made_in_the_middle_of_a_wait(waits: int) -> None:
    """That very wait is the one that ends."""
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(waits - 1):
            await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(lambda: scope[KEY].ladder.signal("disconnect"))
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.0001)
            seen.extend([scope[KEY].cause, scope[KEY].ladder.waits])

    await ask(work)
    assert seen == ["disconnect", waits + 1]


async def test_what_a_wait_brings_is_not_lost_when_it_is_made_meanwhile() -> None:
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        future = asyncio.get_running_loop().create_future()

        def both() -> None:
            future.set_result("a connection")
            scope[KEY].ladder.signal("disconnect")

        asyncio.get_running_loop().call_soon(both)
        seen.append(await future)
        try:
            await asyncio.sleep(60)
        finally:
            seen.append(scope[KEY].cause)

    await ask(work)
    assert seen == ["a connection", "disconnect"]


@pytest.mark.parametrize("seconds", [0, 60])
async def test_a_native_cancellation_in_the_middle_of_a_wait_passes(seconds: int) -> None:
    """C14: and its cleanup runs."""
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.sleep(seconds)
            seen.append("not cancelled")
        finally:
            await asyncio.sleep(0.0001)
            seen.extend([scope[KEY].cause, scope[KEY].ladder.others_cancel()])

    task = asyncio.create_task(ask(work))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == [None, True]


@pytest.mark.parametrize("cancelled", [True, False])
async def test_a_step_is_not_taken_for_a_wait(cancelled: bool) -> None:
    """An eager task in it has another `current_task`: that alone does not tell that the work runs."""
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_soon(lambda: seen.append(scope[KEY].ladder._waiting_for))
        if cancelled:
            asyncio.get_running_loop().call_soon(task.cancel)
        try:
            await asyncio.sleep(0)
        finally:
            seen.append(scope[KEY].ladder._waiting_for)

    with suppress(asyncio.CancelledError):
        await asyncio.create_task(ask(work))
    assert seen == [None, RUNNING]


async def test_what_was_cancelled_before_does_not_count() -> None:
    """The request is part of a cleanup, say."""
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        asyncio.get_running_loop().call_soon(lambda: scope[KEY].ladder.signal("disconnect"))
        try:
            await asyncio.sleep(60)
        finally:
            seen.extend([scope[KEY].cause, scope[KEY].ladder.others_cancel()])

    async def cancelled() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await ask(work)

    task = asyncio.create_task(cancelled())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == ["disconnect", False]


async def test_what_a_wait_raises_is_the_work_s() -> None:
    seen: list[str] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        future = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(future.set_exception, ZeroDivisionError("caught"))
        try:
            await future
        except ZeroDivisionError as exc:
            seen.append(str(exc))
        await asyncio.sleep(0.0001)
        raise ZeroDivisionError("not caught")

    with pytest.raises(ZeroDivisionError, match="not caught"):
        await ask(work)
    assert seen == ["caught"]


def test_one_that_is_closed_in_the_middle_of_a_wait_is_closed() -> None:
    """There and then: what its cleanup raises is raised here."""

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise ZeroDivisionError

    scope: Scope = {"type": "http", "method": "GET", "path": "/", "headers": []}

    async def begin() -> None:
        asking = protect(work, scope, never_comes, discard, CancelPolicy())
        asking.send(None)
        with pytest.raises(ZeroDivisionError):
            asking.close()

    asyncio.run(begin())


@pytest.mark.parametrize("waits_before", [True, False])
async def test_a_background_task_is_not_watched(waits_before: bool) -> None:
    client = Client()
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        if waits_before:
            await asyncio.sleep(0.0001)
            seen.append(client.readers)
        await send(START)
        await send(BODY)
        await asyncio.sleep(0.0001)
        seen.extend([client.readers, scope[KEY].made])

    await client.ask(work)
    assert seen == ([1] if waits_before else []) + [0, None]


@pytest.mark.parametrize("made", [True, False])
@pytest.mark.parametrize(("turns", "waits", "expected"), [(2, 0, 0), (3, 0, 1), (0, 1, 1), (2, 3, 1)])
async def test_it_asks_to_be_watched_once(
    monkeypatch: pytest.MonkeyPatch, turns: int, waits: int, expected: int, made: bool
) -> None:
    """However often it waits; and not for one turn of the event loop or two."""
    asked: list[Channel] = []
    monkeypatch.setattr(Channel, "watch", lambda channel: not asked.append(channel))  # type: ignore[func-returns-value]

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        assert not made or scope[KEY].ladder
        for _ in range(turns):
            await asyncio.sleep(0)
        for _ in range(waits):
            await asyncio.sleep(0.0001)

    await ask(work)
    assert len(asked) == expected


async def test_it_is_watched_when_a_task_of_its_own_has_asked_for_the_body() -> None:
    """C4: not before, which would have invited it. The work waits for that task, and may not wait anew."""
    client = Client()
    seen: list[int] = []

    async def read(receive: Receive) -> None:
        seen.append(client.readers)
        await receive()
        await asyncio.sleep(0.001)
        seen.append(client.readers)

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.create_task(read(receive))

    await client.ask(work, headers=[(b"expect", b"100-continue")])
    assert seen == [0, 1]


@pytest.mark.parametrize("made", [True, False])
async def test_or_has_sent_the_first_piece(made: bool) -> None:
    client = Client()
    seen: list[int] = []

    async def stream(send: Send) -> None:
        await send(START)
        await asyncio.sleep(0.001)
        seen.append(client.readers)
        await send(BODY | {"more_body": True})
        seen.append(client.readers)

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        assert not made or scope[KEY].ladder
        await asyncio.create_task(stream(send))

    await client.ask(work, headers=[(b"expect", b"100-continue")])
    assert seen == [0, 1]


async def test_one_that_is_made_once_the_response_is_complete_ends_nothing() -> None:
    """C5."""
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        await send(BODY)
        ladder = scope[KEY].ladder
        seen.extend([ladder.state, ladder.signal("disconnect"), ladder.watch])

    await ask(work)
    assert seen == [DONE, False, None]


async def test_no_timer_is_left_of_one_that_was_made_in_the_last_step() -> None:
    ladders: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        ladders.append(scope[KEY].ladder)
        ladders[0].signal("disconnect")

    await ask(work)
    assert ladders[0].state == DONE
    assert all(timer.cancelled() for timer in ladders[0]._timers.values())


async def test_one_that_a_task_makes_that_was_left_behind_does_nothing() -> None:
    """It sends when the work has ended, and hears that the client has left."""
    left_behind: list[asyncio.Task[None]] = []
    channels: list[Any] = []

    async def fail(message: Message) -> None:
        raise OSError

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        async def late() -> None:
            await asyncio.sleep(0.001)
            await send(START)

        channels.append(scope[KEY])
        left_behind.append(asyncio.create_task(late()))

    scope: Scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    await protect(work, scope, never_comes, fail, CancelPolicy())
    with pytest.raises(ClientGone):
        await left_behind[0]
    ladder = channels[0].made
    assert (ladder.state, ladder.cause, dict(ladder._timers), ladder.watch) == (DONE, None, {}, None)


class Client:
    """Its messages, as a server that only waits gives them.

    :param alone: without a middleware between
    """

    def __init__(self, *, alone: bool = True) -> None:
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self._messages.put_nowait({"type": "http.request", "body": b""})
        self._alone = alone

    @property
    def readers(self) -> int:
        return len(self._messages._getters)  # type: ignore[attr-defined]

    def leave(self) -> None:
        self._messages.put_nowait({"type": "http.disconnect"})

    async def through(self) -> Message:
        """As a middleware hands them on: its watcher needs a task."""
        return await self._messages.get()

    async def ask(
        self,
        work: Any,
        send: Send = discard,
        policy: CancelPolicy | None = None,
        headers: Iterable[tuple[bytes, bytes]] = (),
    ) -> None:
        scope: Scope = {"type": "http", "method": "GET", "path": "/", "headers": [*headers]}
        async with asyncio.timeout(20):
            receive = self._messages.get if self._alone else self.through
            await protect(work, scope, receive, send, policy or CancelPolicy())


@pytest.mark.parametrize("alone", [True, False])
async def test_one_that_is_watched_needs_none(alone: bool) -> None:
    client = Client(alone=alone)
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.001)
        seen.append(client.readers)
        await send(START)
        await send(BODY)
        seen.append(scope[KEY].made)

    await client.ask(work)
    await asyncio.sleep(0)
    assert seen == [1, None]
    assert client.readers == 0


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("grace", [0, 0.001])
async def test_it_is_made_by_a_client_that_leaves(alone: bool, grace: float) -> None:
    client = Client(alone=alone)
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        channel = scope[KEY]
        asyncio.get_running_loop().call_later(0.001, client.leave)
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.001)
            seen.append(channel.cause)

    await client.ask(work, policy=CancelPolicy(grace=grace))
    assert seen == ["disconnect"]


async def test_who_watches_goes_on_when_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one reader of `receive` (C1), and it ends with the work."""
    client = Client()
    asked: list[Channel] = []
    watch = Channel.watch

    def noted(channel: Channel) -> bool:
        asked.append(channel)
        return watch(channel)

    monkeypatch.setattr(Channel, "watch", noted)
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.001)
        ladder = scope[KEY].ladder
        await asyncio.sleep(0.001)
        seen.append(client.readers)
        client.leave()
        try:
            await asyncio.sleep(60)
        finally:
            seen.append(ladder.cause)

    await client.ask(work)
    assert seen == [1, "disconnect"]
    assert (client.readers, len(asked)) == (0, 1)


@pytest.mark.parametrize("made_first", [True, False])
async def test_who_watches_is_still_sent_away_while_the_last_message_goes_out(made_first: bool) -> None:
    client = Client()
    seen: list[int] = []

    async def send(message: Message) -> None:
        seen.append(client.readers)

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        if made_first:
            assert scope[KEY].ladder.cause is None
        await asyncio.sleep(0.001)
        assert scope[KEY].ladder.cause is None
        await send(START)
        await send(BODY)

    await client.ask(work, send)
    assert seen == [1, 0]


async def test_it_may_be_made_before_the_client_is_watched() -> None:
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope[KEY].ladder.cause is None
        try:
            await asyncio.sleep(60)
        finally:
            seen.append(scope[KEY].cause)

    async def leaves() -> Message:
        return {"type": "http.disconnect"}

    scope: Scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    async with asyncio.timeout(20):
        await protect(work, scope, leaves, discard, CancelPolicy())
    assert seen == ["disconnect"]


async def test_the_last_send_may_wait_and_the_client_leave() -> None:
    """It was watched, and paused for that message; it is watched again when that waits."""
    client = Client()
    seen: list[Any] = []

    async def send(message: Message) -> None:
        if message is BODY:
            seen.append(client.readers)
            asyncio.get_running_loop().call_later(0.001, client.leave)
            await asyncio.sleep(60)

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.0001)
        seen.append(client.readers)
        await send(START)
        try:
            await send(BODY)
        finally:
            seen.append(scope[KEY].cause)

    await client.ask(work, send)
    assert seen == [1, 0, "disconnect"]


@pytest.mark.parametrize("limit", [None, 60])
@pytest.mark.parametrize("message", [START, BODY])
async def test_a_middleware_that_takes_a_moment_to_hand_something_on_is_not_worth_a_watcher(
    message: Message, limit: float | None
) -> None:
    """The head, or the end: the work is done. With a time limit, there is a ladder."""
    client = Client()
    seen: list[int] = []
    channels: list[Channel] = []

    async def send(handed_on: Message) -> None:
        if handed_on is message:
            await asyncio.sleep(0.0001)
            seen.append(client.readers)
            await asyncio.sleep(0.0001)
            seen.append(client.readers)

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        channels.append(scope[KEY])
        await send(START)
        await send(BODY)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastapi_cancel.channel.HANDING_ON", 60)
        await client.ask(work, send, CancelPolicy(timeout=limit))
    assert (seen, channels[0]._later) == ([0, 0], None)
    assert not [timer for timer in asyncio.get_running_loop()._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]


@pytest.mark.parametrize("limit", [None, 60])
@pytest.mark.parametrize("message", [START, BODY, BODY | {"more_body": True}])
async def test_but_one_that_goes_on_is_given_up(message: Message, limit: float | None) -> None:
    """Hypercorn's last ``send`` may never return. A piece of a stream is no such thing: it is watched at once."""
    client = Client()
    client.leave()
    seen: list[Any] = []

    async def send(handed_on: Message) -> None:
        if handed_on is message:
            await asyncio.sleep(60)

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        if message is not START:
            await send(START)
        try:
            await send(message)
        finally:
            await asyncio.sleep(0.001)
            seen.append(scope[KEY].cause)

    if message.get("more_body"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fastapi_cancel.channel.HANDING_ON", 60)
            await client.ask(work, send, CancelPolicy(timeout=limit))
    else:
        await client.ask(work, send, CancelPolicy(timeout=limit))
    assert seen == ["disconnect"]


async def test_a_wait_between_them_is_watched_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head is out, and the first piece of the body takes its time."""
    monkeypatch.setattr("fastapi_cancel.channel.HANDING_ON", 60)
    client = Client()
    seen: list[int] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        await asyncio.sleep(0.0001)
        seen.append(client.readers)
        await send(BODY)

    await client.ask(work)
    assert seen == [1]


async def test_who_waits_for_the_body_needs_none() -> None:
    """The work hears by its own read of a client that leaves. It is watched from its next wait on."""
    messages: asyncio.Queue[Message] = asyncio.Queue()
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        channel = scope[KEY]
        asyncio.get_running_loop().call_later(0.001, messages.put_nowait, {"type": "http.request", "body": b"x"})
        seen.append((await receive())["body"])
        seen.append(channel.made is not None)
        messages.put_nowait({"type": "http.disconnect"})
        try:
            await asyncio.sleep(60)
        finally:
            seen.append(channel.cause)

    scope: Scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    async with asyncio.timeout(20):
        await protect(work, scope, messages.get, discard, CancelPolicy())
    assert seen == [b"x", False, "disconnect"]


async def test_who_may_not_be_watched_yet_needs_none() -> None:
    """C4: reading would invite the body. It is asked again at each wait."""
    client = Client()
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(2):
            await asyncio.sleep(0.0001)
            seen.append(client.readers)
        await receive()
        await asyncio.sleep(0.0001)
        seen.extend([client.readers, scope[KEY].made])

    await client.ask(work, headers=[(b"expect", b"100-continue")])
    assert seen == [0, 0, 1, None]


async def test_a_handler_that_asks_is_told_at_once() -> None:
    """What there is to hear, and without a wait."""
    client = Client()
    client.leave()
    seen: list[str] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((await receive())["type"])
        seen.append((await receive())["type"])
        seen.append(scope[KEY].cause)

    await client.ask(work)
    assert seen == ["http.request", "http.disconnect", "disconnect"]


async def test_one_that_waits_itself_for_the_client_to_leave_needs_none() -> None:
    client = Client()

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        leaving: asyncio.Task[Message] = asyncio.create_task(receive())  # type: ignore[arg-type]
        await asyncio.sleep(0.0001)
        assert client.readers == 1
        assert scope[KEY].made is None
        client.leave()
        with suppress(asyncio.CancelledError):
            await leaving
        assert scope[KEY].cause == "disconnect"

    await client.ask(work)


@pytest.mark.parametrize("alone", [True, False])
def test_one_that_is_left_behind_by_its_event_loop(alone: bool) -> None:
    """The loop is closed, and then the request is: there is nobody any more to tell its watcher to."""
    seen: list[str] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            seen.append("closed")

    async def begin() -> Any:
        asking = Client(alone=alone).ask(work)
        asking.send(None)
        return asking

    loop = asyncio.new_event_loop()
    asking = loop.run_until_complete(begin())
    for task in asyncio.all_tasks(loop):
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    asking.close()
    assert seen == ["closed"]
    del asking, loop
    gc.collect()  # nor is anything found later that would need the loop


class Resource:
    """Something that a handler holds."""


def failing() -> asyncio.Future[Any]:
    future = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.set_exception, ZeroDivisionError())
    return future


def giving(result: object) -> asyncio.Future[Any]:
    future = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.set_result, result)
    return future


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("caught", [True, False])
@pytest.mark.parametrize("made", [True, False])
@pytest.mark.parametrize("fails", [True, False])
async def test_nothing_is_kept_of_a_request_that_is_over(fails: bool, made: bool, caught: bool) -> None:
    """An error refers to the frames that it went through, and they to the wait."""
    resources: list[weakref.ref[Resource]] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        resource = Resource()
        resources.append(weakref.ref(resource))
        await asyncio.sleep(0.0001)
        assert not made or scope[KEY].ladder
        if fails:
            try:
                await failing()
            except ZeroDivisionError:
                if not caught:
                    raise
            raise ZeroDivisionError

    with suppress(ZeroDivisionError):
        await ask(work)
    await asyncio.sleep(0)
    assert resources[0]() is None


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("alone", [True, False])
async def test_nothing_is_kept_of_one_that_was_watched(alone: bool) -> None:
    """A task that has been cancelled refers to the frames that the cancellation went through."""
    client = Client(alone=alone)
    channels: list[weakref.ref[Channel]] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        channels.append(weakref.ref(scope[KEY]))
        await asyncio.sleep(0.001)
        assert client.readers == 1

    await client.ask(work)
    for _ in range(5):
        await asyncio.sleep(0)
    assert channels[0]() is None


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("made", ["in the step before", "at the wait", "by an error"])
async def test_what_a_wait_has_brought_is_not_kept(made: str) -> None:
    """A stream may go on for hours."""
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        if made == "in the step before":
            assert scope[KEY].ladder
        elif made == "at the wait":
            asyncio.get_running_loop().call_soon(lambda: scope[KEY].ladder)
        else:
            for _ in range(2):
                with suppress(ZeroDivisionError):
                    await failing()
        result: Any = await giving(Resource())
        kept = weakref.ref(result)
        del result
        await asyncio.sleep(0.0001)
        await asyncio.sleep(0.0001)
        seen.append(kept())

    await ask(work)
    assert seen == [None]


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("again", [True, False])
async def test_nor_the_frames_that_an_error_went_through(again: bool) -> None:
    seen: list[Any] = []

    async def inner() -> None:
        resource = Resource()
        seen.append(weakref.ref(resource))
        await failing()

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(2 if again else 1):
            with suppress(ZeroDivisionError):
                await inner()
        await asyncio.sleep(0.0001)
        await asyncio.sleep(0.0001)
        seen[:] = [kept() for kept in seen]

    await ask(work)
    assert set(seen) == {None}
