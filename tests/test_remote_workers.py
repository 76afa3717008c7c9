"""Two uvicorn workers with one Redis: stops, and deaths by ``kill -9``."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from signal import SIGKILL

import pytest

from fastapi_cancel.testing import LiveServer, RawClient

from .conftest import DEADLINE
from .redis_server import RedisServer
from .remote_app import LEASE

RUNS = 1000
AT_ONCE = 20


@pytest.fixture
def workers(redis_server: RedisServer) -> Iterator[list[LiveServer]]:
    with redis_server.client() as client:
        client.flushall()
    with ExitStack() as stack:
        env = {"REDIS_URL": redis_server.url}
        servers = [LiveServer("tests.remote_app:app", env=env, probe=False) for _ in range(2)]
        yield [stack.enter_context(server) for server in servers]


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_thousand_runs_are_stopped_from_another_worker(workers: list[LiveServer]) -> None:
    """At random moments, that before the start included: none survives; of the next generation, none is hit."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    local = threading.local()

    def one(number: int) -> None:
        luck = random.Random(seed + number)
        here, there = luck.sample(workers, 2)
        if not hasattr(local, "stop"):
            local.stop = {id(server): stack.enter_context(server.connect()) for server in workers}
        stop: RawClient = local.stop[id(there)]
        key = f"{number % AT_ONCE}"  # shared by a generation

        def stop_it() -> None:
            time.sleep(luck.choice([0, 0, luck.random() * 0.005, luck.random() * 0.02]))
            stop.request(f"/stop/{key}?run={number}")
            assert stop.response()[0] == 200

        with here.connect() as client:
            if luck.random() < 0.3:  # before the start
                stop_it()
                client.request(f"/jobs/{key}/{number}", headers=f"X-Run: {number}\r\n")
            else:
                client.request(f"/jobs/{key}/{number}", headers=f"X-Run: {number}\r\n")
                stop_it()
            assert client.response() == (409, b'{"detail":"enough"}')

    with ExitStack() as stack:
        stay = [stack.enter_context(workers[number % 2].open(f"/jobs/{number}/stays")) for number in range(AT_ONCE)]
        until(lambda: all(worker.json("/stats")["begun"] == ["stays"] for worker in workers))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(one, range(RUNS)))
        assert [worker.json("/stats")["begun"] for worker in workers] == [["stays"], ["stays"]]
        for number, client in enumerate(stay):
            assert workers[number % 2].json(f"/stop/{number}")["reached"] == 1
            assert client.response()[0] == 409
    assert [worker.complaints() for worker in workers] == [[], []]


def test_kill_9_of_the_producing_worker(workers: list[LiveServer]) -> None:
    """Its readers elsewhere are told within twice the lease; a new start works."""
    here, there = workers
    with here.open("/streams/a") as first:
        first.until(b"data: 5\r\n")
        with there.open("/streams/a") as reader:
            reader.until(b"data: 5\r\n")
            here.send_signal(SIGKILL)
            killed = time.monotonic()
            reader.until(b'event: ended\r\ndata: {"reason":"died"}\r\n')
            assert time.monotonic() - killed < 2 * LEASE + DEADLINE / 4  # the bound, and a slow machine
    with there.open("/streams/a") as anew:
        assert anew.until(b"data: 3\r\n")


def test_kill_9_of_the_worker_of_a_reader(workers: list[LiveServer]) -> None:
    """Its lease runs out, then nobody reads: the work ends."""
    here, there = workers
    with here.open("/streams/a") as first:
        first.until(b"data: 5\r\n")
        with there.open("/streams/a") as reader:
            reader.until(b"data: 5\r\n")
            first.abort()
            time.sleep(2 * 0.5)
            assert here.json("/ended") == []  # somebody reads
            there.send_signal(SIGKILL)
            until(lambda: here.json("/ended") == ["a"])
