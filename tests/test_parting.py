"""The second that a client has at the end, on a busy event loop."""

from __future__ import annotations

from time import sleep

import anyio
import pytest

from fastapi_cancel import _parting
from fastapi_cancel._parting import LOOKS, parting

pytestmark = pytest.mark.anyio


async def test_however_many_part_they_need_no_more_turns() -> None:
    """With a turn for each hundred of them, a server would wait for a thousand as many times as long."""
    gave_up = 0

    async def part() -> None:
        nonlocal gave_up
        with parting() as scope:
            await anyio.sleep_forever()
        gave_up += scope.cancelled_caught

    turns = 0
    async with anyio.create_task_group() as group:
        for _ in range(1000):
            group.start_soon(part)
        while gave_up < 1000:
            sleep(0.05)
            await anyio.sleep(0)
            turns += 1
    assert LOOKS <= turns <= 3 * LOOKS
    assert not _parting._open


async def test_each_has_a_second_of_its_own() -> None:
    ended: list[tuple[str, int]] = []

    async def part(name: str) -> None:
        with parting():
            await anyio.sleep_forever()
        ended.append((name, sum(map(len, _parting._open.values()))))

    async with anyio.create_task_group() as group:
        group.start_soon(part, "first")
        await anyio.sleep(0.3)
        group.start_soon(part, "second")
    assert ended == [("first", 1), ("second", 0)]
    assert not _parting._open
