"""Watchers that start a little later. In process, on asyncio."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import pytest
from fastapi import Depends, FastAPI
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from fastapi_cancel import CancellableRoute, CancelPolicy, _later, cancel_policy
from fastapi_cancel.channel import Channel
from fastapi_cancel.protect import KEY, protect

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("either_way")]

BODY = {"type": "http.request", "body": b""}
LEFT = {"type": "http.disconnect"}
START = {"type": "http.response.start", "status": 200, "headers": []}
PIECE = {"type": "http.response.body", "body": b"piece", "more_body": True}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every request were one of a route whose requests are over soon."""
    monkeypatch.setattr(_later, "SAMPLE", 0)


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no wait were ever long enough to be watched."""
    monkeypatch.setattr(_later, "LATER", 3600)


@pytest.fixture(autouse=True)
def nobody_waits() -> Iterator[None]:
    yield
    _later._rounds.clear()  # of event loops that are over, as far as their tests did not wait for the last round


async def discard(message: Message) -> None:
    pass


class Client:
    """Its messages, as a server that only waits gives them.

    :ivar readers: how many wait for the next one
    """

    def __init__(self, *messages: Message) -> None:
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        for message in messages:
            self._messages.put_nowait(message)
        self.receive = self._messages.get

    @property
    def readers(self) -> int:
        return len(self._messages._getters)  # type: ignore[attr-defined]

    def leave(self) -> None:
        self._messages.put_nowait(LEFT)

    async def ask(
        self, work: Any, send: Send = discard, receive: Receive | None = None, pace: _later.Pace | None = None
    ) -> None:
        scope: Scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
        async with asyncio.timeout(20):  # for a watcher that does not come
            await protect(work, scope, receive or self.receive, send, CancelPolicy(), pace=pace)


async def until_watched(client: Client) -> None:
    async with asyncio.timeout(20):
        while not client.readers:
            await asyncio.sleep(0.001)


async def short(scope: Scope, receive: Receive, send: Send) -> None:
    """A work that waits for a moment."""
    await asyncio.sleep(0.0001)


async def some_turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.mark.usefixtures("never")
async def test_a_short_wait_is_not_watched() -> None:
    client = Client(BODY)
    seen: list[int] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.001)
        await some_turns()
        seen.append(client.readers)

    await client.ask(work)
    assert seen == [0]


async def test_a_longer_one_is() -> None:
    """C3: a client that leaves then is noticed as soon as the server says so, in the middle of the same wait."""
    client = Client(BODY)
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await asyncio.sleep(0.001)
            seen.append(scope[KEY].ladder.cause)

    task = asyncio.create_task(client.ask(work))
    await until_watched(client)
    client.leave()
    await task
    assert seen == ["disconnect"]


@pytest.mark.parametrize("wait", [0.0001, 60])
async def test_who_left_in_the_meantime_is_noticed_then(wait: float) -> None:
    """Also by a work that never waits for long."""
    client = Client(BODY, LEFT)
    seen: list[Any] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            while True:
                await asyncio.sleep(wait)
        finally:
            await asyncio.sleep(0.001)
            seen.append(scope[KEY].ladder.cause)

    await client.ask(work)
    assert seen == ["disconnect"]


@pytest.mark.usefixtures("never")
async def test_a_handler_that_asks_is_told_at_once() -> None:
    client = Client(BODY, LEFT)
    seen: list[bool] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.001)
        request = Request(scope, receive)
        await request.body()
        seen.append(await request.is_disconnected())

    await client.ask(work)
    assert seen == [True]


@pytest.mark.usefixtures("never")
async def test_a_stream_that_has_begun_is_watched_from_its_next_wait_on() -> None:
    client = Client(BODY)
    seen: list[int] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.001)
        await send(START)
        await asyncio.sleep(0.001)
        seen.append(client.readers)
        await send(PIECE)
        await asyncio.sleep(0.001)
        seen.append(client.readers)
        await send(PIECE)
        await asyncio.sleep(0.001)
        seen.append(client.readers)

    await client.ask(work)
    assert seen == [0, 1, 1]


@pytest.mark.usefixtures("never")
async def test_a_stream_that_a_task_of_the_work_s_begins_is_watched_at_once() -> None:
    """The work waits for that task, and may not wait anew. To read before would have invited the body."""
    client = Client()
    seen: list[int] = []

    async def stream(send: Send) -> None:
        await send(START)
        await asyncio.sleep(0.001)
        seen.append(client.readers)
        await send(PIECE)
        seen.append(client.readers)

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        scope["headers"].append((b"expect", b"100-continue"))
        await asyncio.create_task(stream(send))

    await client.ask(work)
    assert seen == [0, 1]


async def test_who_may_not_read_yet_tries_again_at_each_wait() -> None:
    """The work reads the body itself when its watcher is due."""
    client = Client()
    seen: list[int] = []

    async def come() -> None:
        while not _later._rounds:
            await asyncio.sleep(0.001)
        while _later._rounds:
            await asyncio.sleep(0.001)
        client._messages.put_nowait(BODY)

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        coming = asyncio.create_task(come())
        await asyncio.sleep(0.0001)
        await receive()
        await coming
        await asyncio.sleep(0.001)
        seen.append(client.readers)

    await client.ask(work)
    assert seen == [1]


async def test_it_starts_in_the_context_of_its_request() -> None:
    """Not in that of the one for whom the timer was started."""
    name: ContextVar[str] = ContextVar("name")
    seen: list[str] = []
    watched = asyncio.Event()

    async def one(mine: str) -> None:
        name.set(mine)
        client = Client(BODY)

        async def receive() -> Message:
            seen.append(name.get())
            if len(seen) == 4:
                watched.set()
            return await client.receive()

        async def work(scope: Scope, receive: Receive, send: Send) -> None:
            await watched.wait()

        await client.ask(work, receive=receive)

    await asyncio.gather(one("a"), one("b"))
    assert sorted(seen) == ["a", "a", "b", "b"]


async def test_one_that_does_not_start_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Channel.watch
    called: list[Channel] = []
    watched = asyncio.Event()

    def fail_once(self: Channel) -> bool:
        called.append(self)
        if len(called) == 1:
            raise ZeroDivisionError
        watched.set()
        return watch(self)

    monkeypatch.setattr(Channel, "watch", fail_once)
    logged: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context))

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await watched.wait()

    await asyncio.gather(Client(BODY).ask(work), Client(BODY).ask(work))
    assert len(set(called)) == 2
    assert [(context["message"], type(context["exception"])) for context in logged] == [
        ("GET /: not watched", ZeroDivisionError)
    ]


async def test_nothing_is_kept_of_a_request_that_is_over() -> None:
    client = Client(BODY)
    ladders: list[weakref.ref[Any]] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        ladders.append(weakref.ref(scope[KEY].ladder))
        await asyncio.sleep(0)
        await asyncio.get_running_loop().run_in_executor(None, lambda: None)

    gc.disable()
    try:
        await client.ask(work)
        assert ladders[0]() is None
    finally:
        gc.enable()


async def test_who_is_watched_already_is_not_kept_by_who_was_not_yet() -> None:
    """They waited in the same room."""
    client, other = Client(BODY), Client(BODY)
    ladders: list[weakref.ref[Any]] = []
    kept: list[Any] = []

    async def short(scope: Scope, receive: Receive, send: Send) -> None:
        kept.append(scope[KEY].ladder)
        await asyncio.sleep(0.0001)

    async def long(scope: Scope, receive: Receive, send: Send) -> None:
        ladders.append(weakref.ref(scope[KEY].ladder))
        await until_watched(other)

    gc.disable()
    try:
        await asyncio.gather(client.ask(short), other.ask(long))
        await some_turns()
        assert ladders[0]() is None
    finally:
        gc.enable()


async def test_the_timer_keeps_no_request_s_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under load it is set again and again, each time in the context in which it has just run."""
    name: ContextVar[str] = ContextVar("name")
    seen: list[str | None] = []
    go = _later._Rounds._go

    def seen_in(self: _later._Rounds) -> None:
        seen.append(name.get(None))
        go(self)

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        name.set("a request's")
        await asyncio.sleep(0.001)

    monkeypatch.setattr(_later._Rounds, "_go", seen_in)
    client = Client(BODY)
    while len(seen) < 5:
        await client.ask(work)
    assert set(seen) == {None}


async def test_no_timer_is_left_when_nobody_waits() -> None:
    client = Client(BODY)
    await client.ask(short)
    assert len(_later._rounds) == 1
    while _later._rounds:
        await asyncio.sleep(0.001)

    async def long(scope: Scope, receive: Receive, send: Send) -> None:
        await until_watched(client)
        while _later._rounds:  # one that is watched needs no more rounds
            await asyncio.sleep(0.001)

    await client.ask(long)


async def test_nobody_waits_to_be_watched_when_the_response_is_complete() -> None:
    client = Client(BODY)

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        await send({"type": "http.response.body"})
        await asyncio.sleep(0.0001)  # a background task's
        assert not _later._rounds

    await client.ask(work)


def test_an_event_loop_that_stopped_meanwhile_is_forgotten() -> None:
    """It may go on, and make its last round then."""
    seen: list[Any] = []

    async def long(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            seen.append(scope[KEY].ladder.cause)

    def in_another_loop() -> None:
        asyncio.run(Client(BODY).ask(short))

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda _, context: seen.append(context))
    try:
        task = loop.create_task(Client(BODY, LEFT).ask(long))
        loop.run_until_complete(asyncio.sleep(0))
        assert list(_later._rounds) == [loop]
        in_another_loop()
        assert loop not in _later._rounds
        loop.run_until_complete(task)
        loop.run_until_complete(asyncio.sleep(0.01))
        assert seen == ["disconnect"]
    finally:
        loop.close()


@pytest.mark.usefixtures("never")
async def test_one_that_runs_in_another_thread_is_not() -> None:
    client = Client(BODY)

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await some_turns()
        assert list(_later._rounds) == [asyncio.get_running_loop()]
        await asyncio.to_thread(lambda: asyncio.run(Client(BODY).ask(short)))
        assert asyncio.get_running_loop() in _later._rounds

    await client.ask(work)


# -- a route's pace --------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is soon known how long the requests of a route tend to wait."""
    monkeypatch.setattr(_later, "SAMPLE", 3)
    monkeypatch.setattr(_later, "SLOW", 2)


async def quick_one(pace: _later.Pace, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many watch it in its first wait."""
    monkeypatch.setattr(_later, "LATER", 3600)
    client = Client(BODY)
    readers: list[int] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.0001)
        readers.append(client.readers)

    await client.ask(work, pace=pace)
    _later._rounds.clear()
    return readers[0]


async def slow_one(pace: _later.Pace, monkeypatch: pytest.MonkeyPatch) -> int:
    """It waits until it is watched. How many do so in its first wait."""
    monkeypatch.setattr(_later, "LATER", 0.0001)
    client = Client(BODY)
    readers: list[int] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        asyncio.get_running_loop().call_soon(lambda: readers.append(client.readers))
        await until_watched(client)

    await client.ask(work, pace=pace)
    while _later._rounds:
        await asyncio.sleep(0.001)
    return readers[0]


@pytest.mark.usefixtures("few")
async def test_requests_are_watched_from_their_first_wait_on_until_one_was_quick(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """C3. Only the fourth was looked at."""
    pace = _later.Pace()
    assert [await quick_one(pace, monkeypatch) for _ in range(8)] == [1, 1, 1, 0, 0, 0, 0, 0]


@pytest.mark.usefixtures("few")
async def test_slow_ones_stay_watched_from_their_first_wait_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for every fourth, which is looked at."""
    pace = _later.Pace()
    assert [await slow_one(pace, monkeypatch) for _ in range(12)] == 3 * [1, 1, 1, 0]


@pytest.mark.usefixtures("few")
async def test_after_a_quick_one_it_takes_some_slow_ones_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = _later.Pace()
    pace.was_quick()
    assert await slow_one(pace, monkeypatch) == 0
    assert await quick_one(pace, monkeypatch) == 0
    assert [await slow_one(pace, monkeypatch) for _ in range(6)] == [0, 0, 1, 1, 1, 0]


async def test_two_threads_that_both_take_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own event loop, and none a lock. The next one is looked at."""
    pace = _later.Pace()
    pace.at_once = -1
    assert await quick_one(pace, monkeypatch) == 0


@pytest.mark.usefixtures("few")
async def test_each_route_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not its requests have a ladder from the beginning."""
    monkeypatch.setattr(_later, "LATER", 3600)
    app = FastAPI()
    app.router.route_class = CancellableRoute
    client = Client()
    seen: list[tuple[str, int]] = []

    async def asks_for_its_ladder(request: Request) -> None:
        assert request.scope[KEY].ladder.cause is None

    async def wait(name: str) -> None:
        await asyncio.sleep(0.0001)
        seen.append((name, client.readers))

    @cancel_policy(timeout=60)
    async def wait_for_a_while(name: str) -> None:
        await wait(name)

    app.get("/{name}")(wait)
    app.get("/told/{name}", dependencies=[Depends(asks_for_its_ladder)])(wait)
    app.get("/limited/{name}")(wait_for_a_while)
    for path in ["/a", "/limited/b", "/told/c"] * 5:
        client = Client(BODY)
        scope: Scope = {"type": "http", "method": "GET", "path": path, "headers": [], "query_string": b""}
        await app(scope, client.receive, discard)
    _later._rounds.clear()
    for name in "abc":
        assert [readers for who, readers in seen if who == name] == [1, 1, 1, 0, 0]
