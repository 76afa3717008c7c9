"""Two workers, five hundred clients each, who leave all the time and come back to the other worker: nothing is lost."""

from __future__ import annotations

import asyncio
import random
import re
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import anyio
import pytest
import redis

from fastapi_cancel.broker import connect
from fastapi_cancel.testing.live import LiveServer

from .crowd import many_files
from .redis_server import RedisServer

CLIENTS = 1000
EVENTS = 200
PACE = 0.02  # seconds between two events
CONNECTIONS = 4
STAY = 60  # events that a client stays for, at the most
AT_ONCE = 0.1  # how many leave before the answer has come
TOGETHER = 200  # clients that come for the first time together: a server's backlog is finite

EVENT = re.compile(rb"id: (\d+-\d+)\r\n(event: gap\r\n)?(?:data: ([^\r]*)\r\n)?\r\n")


class Visit(asyncio.Protocol):
    """One connection of a client, which reads ``stay`` events and leaves with a RST."""

    def __init__(self, client: Client, stay: int) -> None:
        self._client = client
        self._stay = stay
        self._rest = b""
        self.over = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        sock: socket.socket = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        last = f"Last-Event-ID: {self._client.last}\r\n" if self._client.last else ""
        transport.write(f"GET /news HTTP/1.1\r\nHost: x\r\n{last}\r\n".encode())
        if self._stay == 0:
            asyncio.get_running_loop().call_later(random.random() / 50, transport.abort)

    def data_received(self, data: bytes) -> None:
        self._rest += data
        for found in EVENT.finditer(self._rest):
            self._client.hear(found[1].decode(), found[2], found[3])
            self._stay -= 1
            if self._stay == 0 or self._client.is_through:
                self._transport.abort()
                return
        self._rest = self._rest[self._rest.rfind(b"\r\n\r\n") :]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.over.done():
            self.over.set_result(None)


class Client:
    """Notes all it hears, whichever worker says it."""

    def __init__(self) -> None:
        self.last = ""
        self.heard: list[int] = []
        self.gaps: list[bytes] = []
        self.visits = 0

    @property
    def is_through(self) -> bool:
        return bool(self.heard) and self.heard[-1] == EVENTS - 1

    def hear(self, id: str, gap: bytes | None, data: bytes | None) -> None:
        self.last = id
        if gap:
            self.gaps.append(data or b"")
        elif data is not None:
            self.heard.append(int(data))

    async def visit(self, port: int, stay: int) -> None:
        self.visits += 1
        visit = Visit(self, stay)
        address = f"127.0.0.{random.randint(1, 8)}", 0  # one address has only so many ports
        await asyncio.get_running_loop().create_connection(lambda: visit, "127.0.0.1", port, local_addr=address)
        await visit.over

    async def follow(self, ports: Sequence[int]) -> None:
        """Until the last event, on each worker in turn."""
        while not self.is_through:
            stay = 0 if random.random() < AT_ONCE else random.randint(1, STAY)
            await self.visit(ports[self.visits % len(ports)], stay)


@pytest.fixture
def workers(redis_server: RedisServer) -> Iterator[list[LiveServer]]:
    with many_files(2 * CLIENTS), ExitStack() as stack:
        urls = [f"{redis_server.url}?client_name=worker{number}&connections={CONNECTIONS}" for number in range(2)]
        servers = [
            LiveServer("tests.fan_out_app:app", options=["--backlog", "2048"], env={"BROKER_URL": url}, probe=False)
            for url in urls
        ]
        yield [stack.enter_context(server) for server in servers]


def connections(outside: redis.Redis) -> list[int]:
    names = [each["name"] for each in outside.client_list()]
    return [names.count(f"worker{number}") for number in range(2)]


def test_nothing_is_lost_and_nothing_comes_twice(workers: list[LiveServer], redis_server: RedisServer) -> None:
    ports = [server.port for server in workers]
    clients = [Client() for _ in range(CLIENTS)]
    most = [0, 0]

    async def main(outside: redis.Redis) -> None:
        async with connect(redis_server.url) as broker:
            for begin in range(0, CLIENTS, TOGETHER):
                some = enumerate(clients[begin : begin + TOGETHER])
                await asyncio.gather(*[client.visit(ports[number % 2], 1) for number, client in some])
            assert all(client.last for client in clients)
            async with asyncio.TaskGroup() as group:
                for number, client in enumerate(clients):
                    client.visits = number  # half of them on each worker, at any time
                    group.create_task(client.follow(ports))
                for number in range(EVENTS):
                    await broker.publish("news", number)
                    await asyncio.sleep(PACE)
                    most[:] = map(max, most, connections(outside))

    with redis_server.client() as outside:
        with anyio.from_thread.start_blocking_portal() as portal:
            portal.call(main, outside)
        for client in clients:
            assert client.gaps == []
            assert client.heard == list(range(EVENTS))
        assert sum(client.visits for client in clients) > 3 * CLIENTS
        assert all(1 < each <= CONNECTIONS + 1 for each in most), most
        for server in workers:
            server.wait_for("/counts", open=0)
            assert server.json("/counts")["cleaned"] > CLIENTS
            assert server.complaints() == []
        assert outside.pubsub_numsub("fastapi_cancel:channel:news") == [(b"fastapi_cancel:channel:news", 0)]
        assert all(each <= CONNECTIONS + 1 for each in connections(outside))
