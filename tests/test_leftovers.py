"""The look at code that is not behind a request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import anyio
import pytest

from fastapi_cancel.testing.leftovers import nothing_left

pytestmark = pytest.mark.anyio


async def numbers() -> AsyncIterator[int]:
    for number in range(3):
        await anyio.sleep(0)
        yield number


async def test_a_block_that_leaves_nothing() -> None:
    limiter = anyio.CapacityLimiter(1)
    async with nothing_left(pools=[limiter]) as record:
        async with limiter:
            assert [number async for number in numbers()] == [0, 1, 2]
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep, 0)
    assert record.faults == []


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_task_is_left() -> None:
    with pytest.raises(
        AssertionError, match=r"this block:\ntask left: Event.wait, created at\n.*in test_a_task_is_left"
    ):
        async with nothing_left():
            task = asyncio.create_task(asyncio.Event().wait())
    task.cancel()


async def test_a_generator_is_left_open() -> None:
    with pytest.raises(AssertionError, match=r"generator left open: numbers, first iterated at"):
        async with nothing_left():
            left = numbers()
            await anext(left)
    await left.aclose()  # type: ignore[attr-defined]


async def test_something_is_logged() -> None:
    with pytest.raises(AssertionError, match="logged: app WARNING: low on fuel"):
        async with nothing_left():
            logging.getLogger("app").info("all is well")
            logging.getLogger("app").warning("low on %s", "fuel")


async def test_something_is_not_returned() -> None:
    limiter = anyio.CapacityLimiter(1)
    with pytest.raises(AssertionError, match="not returned: 1 of .*Limiter"):
        async with nothing_left(pools=[limiter]):
            await limiter.acquire_on_behalf_of("nobody")


async def test_a_block_that_raises_is_not_judged() -> None:
    with pytest.raises(ValueError, match="the block's own"):
        async with nothing_left():
            logging.getLogger("app").warning("on the way")
            raise ValueError("the block's own")


async def test_a_pool_that_cannot_be_counted() -> None:
    with pytest.raises(TypeError, match="pools: "):
        async with nothing_left(pools=[object()]):
            raise AssertionError("never begun")
