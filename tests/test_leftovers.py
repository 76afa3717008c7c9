"""The look at code that is not behind a request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable

import anyio
import pytest

from fastapi_cancel.testing.leftovers import nothing_left

pytestmark = pytest.mark.anyio


async def judge(block: Callable[[], Awaitable[object]]) -> None:
    async with nothing_left():
        await block()


async def numbers() -> AsyncGenerator[int, None]:
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
    tasks = []
    with pytest.raises(
        AssertionError, match=r"this block:\ntask left: Event.wait, created at\n(.*\n)*.*in test_a_task_is_left"
    ):
        async with nothing_left():
            tasks.append(asyncio.create_task(asyncio.Event().wait()))
    tasks[0].cancel()


async def test_a_generator_is_left_open() -> None:
    left = numbers()
    with pytest.raises(AssertionError, match=r"generator left open: numbers, first iterated at"):
        await judge(left.__anext__)
    await left.aclose()


async def test_something_is_logged() -> None:
    async def warn() -> None:
        logging.getLogger("app").info("all is well")
        logging.getLogger("app").warning("low on %s", "fuel")

    with pytest.raises(AssertionError, match="logged: app WARNING: low on fuel"):
        await judge(warn)


async def test_something_is_not_returned() -> None:
    limiter = anyio.CapacityLimiter(1)
    with pytest.raises(AssertionError, match=r"not returned: 1 of .*Limiter"):
        async with nothing_left(pools=[limiter]):
            await limiter.acquire_on_behalf_of("nobody")


async def test_a_block_that_raises_is_not_judged() -> None:
    async def fail() -> None:
        logging.getLogger("app").warning("on the way")
        raise ValueError("the block's own")

    with pytest.raises(ValueError, match="the block's own"):
        await judge(fail)


async def test_a_pool_that_cannot_be_counted() -> None:
    with pytest.raises(TypeError, match="pools: "):
        async with nothing_left(pools=[object()]):
            raise AssertionError("never begun")
