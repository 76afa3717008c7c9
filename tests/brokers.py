"""Brokers for tests that run in memory, on asyncio and on Trio, and on a real Redis and Valkey."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

import pytest

from fastapi_cancel import Broker, connect

from .redis_server import STORES, servers_of

KINDS = ["memory", "memory on Trio", *STORES]
NewBroker = Callable[..., Broker]

_prefixes = (f"test {number}:" for number in count())


@pytest.fixture(scope="module", params=KINDS, name="kind")
def a_kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture(scope="module", name="store")
def its_store(kind: str) -> Iterator[None]:
    with servers_of(kind):
        yield


@pytest.fixture(name="anyio_backend")
def its_backend(kind: str) -> str:
    return "trio" if kind == "memory on Trio" else "asyncio"


@pytest.fixture(name="new")
def new_brokers(kind: str, request: pytest.FixtureRequest) -> NewBroker:
    """Makes workers' brokers. In memory they are one and the same; in Redis they know of each other, and of no other
    test's."""
    options: dict[str, Any] = {"retain": 100}
    if kind in STORES:
        return partial(connect, request.getfixturevalue("redis_server").url, prefix=next(_prefixes), **options)
    made: list[Broker] = []

    def find(**more: Any) -> Broker:
        if not made:
            made.append(connect(**{**options, **more}))
        return made[0]

    return find
