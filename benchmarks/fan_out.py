"""One publisher, two thousand clients of one worker, Redis between them."""

from __future__ import annotations

import asyncio
import os
import selectors
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from typing import Any

import redis
import redis.asyncio
from fastapi import FastAPI, Response
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_cancel import LastEventID, SSEResponse, connect
from fastapi_cancel.events import encode
from tests.redis_server import RedisServer

from .feeds import DATA, EVENT, ID
from .harness import Section, at_least, interleave, ratio, shown, typical
from .server import CORES, SERVER, Server, many_sockets

CLIENTS = 2_000
EVENTS = 20
CHANNEL = "news"
NO_PING = 10_000  # seconds: heartbeats are another section
AT_ONCE = 500  # clients that come together

OURS = "`broker.events()`"
PEER = "a pub/sub connection a client, sse-starlette"
SAME_RESPONSE = "a pub/sub connection a client, SSEResponse"
FLOOR = "nothing but the server's `send`, in one loop over all clients"
PACES = [("published without waiting", True, 5.0), ("one at a time", False, None)]
WHO = [OURS, PEER, SAME_RESPONSE, FLOOR]
PAIRS = [(OURS, PEER), (OURS, SAME_RESPONSE), (FLOOR, PEER)]


def run(quick: bool) -> Section:
    clients = CLIENTS // 10 if quick else CLIENTS
    section = Section(
        f"Fan-out to {clients:,} event streams through Redis, {SERVER}",
        f"Deliveries per CPU-second of the worker, {EVENTS} events, as a multiple of what the same worker does with "
        "one redis-py pub/sub connection a client. All send the same fields. Published without waiting, the worker is "
        "behind, and what is ready for a client can go out together; one at a time, nothing can: there the last row is "
        "the most that any library can reach on this server.",
    )
    many_sockets()
    with ExitStack() as stack:
        store = stack.enter_context(RedisServer("--maxclients 20000"))
        os.environ["BENCH_REDIS"] = store.url
        outside = stack.enter_context(store.client())
        crowds: dict[str, tuple[Server, Crowd]] = {}
        for who in WHO:
            server = stack.enter_context(Server(who, factory="benchmarks.fan_out:served"))
            crowds[who] = server, stack.enter_context(Crowd(server, clients))
        wait_for_subscribers(outside, 2 * clients + 2)
        os.sched_setaffinity(0, CORES[-1:])
        try:
            for what, together, budget in PACES:
                measure = partial(cpu_a_delivery, outside, store.url, EVENTS if together else 1)
                variants: dict[str, Callable[[], float]] = {who: partial(measure, *crowds[who]) for who in WHO}
                costs = interleave(variants, rounds=2 if quick else 5)
                for one, other in PAIRS:
                    value, name = ratio(costs[other], costs[one]), f"{one}, against {other}"
                    goal = budget if (one, other) == (OURS, PEER) else None
                    section.rows.append(shown(what, name, value) if goal is None else at_least(what, name, value, goal))
                each = ", ".join(f"{who} {1 / typical(mine):,.0f}" for who, mine in costs.items())
                section.notes.append(f"{what}: {each} per CPU-second on this machine.")
        finally:
            os.sched_setaffinity(0, CORES)
        names = [each["name"] for each in outside.client_list()]
        counted = ", ".join(f"{who} {names.count(str(number)):,}" for number, who in enumerate(WHO))
        section.notes.append(f"connections to Redis: {counted}.")
    return section


class Crowd:
    """Clients that count what they receive."""

    def __init__(self, server: Server, count: int) -> None:
        self.size = count
        self._selector = selectors.DefaultSelector()
        for begin in range(0, count, AT_ONCE):
            some = range(begin, min(begin + AT_ONCE, count))
            for connection in [socket.create_connection(("127.0.0.1", server.port), 20) for _ in some]:
                connection.sendall(b"GET /news HTTP/1.1\r\nHost: x\r\n\r\n")
                assert connection.recv(65536).startswith(b"HTTP/1.1 200")
                connection.setblocking(False)
                self._selector.register(connection, selectors.EVENT_READ)

    def receive(self, events: int) -> None:
        """So many events each."""
        missing = events * self.size
        end = time.monotonic() + 60
        while missing:
            assert time.monotonic() < end, f"{missing} have not received it"
            for key, _ in self._selector.select(1):
                assert isinstance(key.fileobj, socket.socket)
                missing -= key.fileobj.recv(65536).count(b"data: ")

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *exc: object) -> None:
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()


def wait_for_subscribers(outside: redis.Redis, count: int) -> None:
    end = time.monotonic() + 60
    topics = [PEER, SAME_RESPONSE, FLOOR, f"fastapi_cancel:channel:{CHANNEL}"]
    while sum(number for _, number in outside.pubsub_numsub(*topics)) < count:
        assert time.monotonic() < end
        time.sleep(0.01)


def cpu_a_delivery(outside: redis.Redis, url: str, together: int, server: Server, crowd: Crowd) -> float:
    """CPU seconds of the worker. The others hear of nothing meanwhile: each way has its channel."""
    before = server.cpu()
    if server.variant == OURS:
        asyncio.run(_publish(url, together, crowd))
    else:
        for _ in range(EVENTS // together):
            for _ in range(together):
                outside.publish(server.variant, DATA)
            crowd.receive(together)
    return (server.cpu() - before) / (EVENTS * crowd.size)


async def _publish(url: str, together: int, crowd: Crowd) -> None:
    async with connect(url) as broker:
        for _ in range(EVENTS // together):
            for _ in range(together):
                await broker.publish(CHANNEL, {"data": DATA, "event": EVENT})
            crowd.receive(together)


# -- the worker ------------------------------------------------------------------------------


async def listen(client: redis.asyncio.Redis, channel: str) -> AsyncIterator[Any]:
    """As the documentation of redis-py has it."""
    async with client.pubsub() as pubsub:
        await pubsub.subscribe(channel)
        async for message in pubsub.listen():
            if message["type"] == "message":
                yield ServerSentEvent(message["data"].decode(), event=EVENT, id=ID)


def build(who: str, url: str) -> FastAPI:
    url = f"{url}?client_name={WHO.index(who)}"
    broker = connect(url)
    client = redis.asyncio.Redis.from_url(url, max_connections=CLIENTS)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with broker:
            yield

    app = FastAPI(lifespan=lifespan if who == OURS else None)

    @app.get("/news")
    async def news(last: LastEventID) -> Response:
        if who == OURS:
            return SSEResponse(broker.events(CHANNEL, after=last), ping=NO_PING)
        return (EventSourceResponse if who == PEER else SSEResponse)(listen(client, who), ping=NO_PING)

    return app


class Bare:
    """An application that has no work of its own with an event: all its clients are the same, and never leave."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.sends: list[Send] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            self.telling = asyncio.create_task(self.tell())
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        self.sends.append(send)
        await send({"type": "http.response.body", "body": b": here\r\n\r\n", "more_body": True})
        await asyncio.Event().wait()

    async def tell(self) -> None:
        async with redis.asyncio.Redis.from_url(self.url) as client, client.pubsub() as pubsub:
            await pubsub.subscribe(FLOOR)
            async for message in pubsub.listen():
                if message["type"] == "message":
                    body, _ = encode(ServerSentEvent(message["data"].decode(), event=EVENT, id=ID))
                    for send in self.sends:
                        await send({"type": "http.response.body", "body": body, "more_body": True})


def served() -> ASGIApp:
    """For ``uvicorn --factory``."""
    who, url = os.environ["BENCH_VARIANT"], os.environ["BENCH_REDIS"]
    return Bare(f"{url}?client_name={WHO.index(FLOOR)}") if who == FLOOR else build(who, url)
