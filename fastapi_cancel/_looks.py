"""Seconds that an event loop which stands still does not use up.

When it turns again, a time limit that has passed may come before the news that was waited for. So the time is counted
in looks, of which a standstill takes one, however long it is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio

LOOKS = 20


async def within(seconds: float, wait: Callable[[], Awaitable[object]]) -> bool:
    """Whether ``wait`` returns in so many seconds. It is called for each look, and cancelled at its end."""
    for _ in range(LOOKS):
        with anyio.move_on_after(seconds / LOOKS):
            await wait()
            return True
    return False
