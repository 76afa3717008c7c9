"""A stream holds a Redis connection; its client drops; the connection is back in its pool."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import redis

from fastapi_cancel.testing.live import LiveServer
from fastapi_cancel.testing.sockets import RawClient

from .conftest import DEADLINE, fresh
from .redis_server import RedisServer

DROPS = 200


@pytest.fixture(scope="module")
def serving(redis_server: RedisServer) -> Iterator[LiveServer]:
    with LiveServer("tests.sse_app:app", env={"REDIS_URL": redis_server.url}, probe=False) as server:
        yield server


@pytest.fixture
def outside(redis_server: RedisServer, serving: LiveServer) -> Iterator[redis.Redis]:
    """Looks at Redis from outside the application."""
    fresh(serving)
    with redis_server.client() as client:
        client.set("ended", 0)
        yield client


def subscribed(client: RawClient, outside: redis.Redis) -> None:
    client.until(b"first")


def in_the_middle_of_news(client: RawClient, outside: redis.Redis) -> None:
    client.until(b"first")
    for number in range(20):
        outside.publish("news", f"news {number}")
    client.until(b"news 3")


def subscribing(client: RawClient, outside: redis.Redis) -> None:
    client.until(b"\r\n\r\n")


def at_once(client: RawClient, outside: redis.Redis) -> None:
    pass


MOMENTS = [subscribed, in_the_middle_of_news, subscribing, at_once]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("kind", ["sse", "stream", "native"])
def test_a_connection_is_back_in_its_pool_after_each_drop(
    serving: LiveServer, outside: redis.Redis, kind: str, moment: Callable[[RawClient, redis.Redis], None]
) -> None:
    """C7, agno-agi/agno#7318: the last command is through and the connection given back, each time."""
    for when in [subscribed, *[moment] * DROPS, subscribed]:
        client = serving.open(f"/redis/{kind}")
        when(client, outside)
        client.abort()
        serving.wait_for("/stats", running=0)
        serving.wait_for("/plain/redis/pool", in_use=0, available=2)
        wait_until_nobody_listens(outside)
    state = serving.wait_for("/stats", tasks=[])
    assert outside.get("ended") == str(state["started"]).encode()
    assert serving.complaints() == []


def wait_until_nobody_listens(outside: redis.Redis) -> None:
    """Redis itself hears of it when it next looks at its sockets. The two of the pool may stay, for commands."""
    end = time.monotonic() + DEADLINE
    while outside.pubsub_numsub("news") != [(b"news", 0)] or len(of_the_application(outside)) > 2:
        assert time.monotonic() < end, of_the_application(outside)


def of_the_application(outside: redis.Redis) -> list[str]:
    """What each connection that the application still has did last."""
    return [each["cmd"] for each in outside.client_list() if each["name"] == "app"]
