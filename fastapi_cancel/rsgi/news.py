"""Futures of a server whose outcome is kept, whoever stops waiting for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any


class News:
    """Waited for by any number of ``receive`` calls, each of which may be cancelled.

    Granian's futures are no asyncio ones: they have room for one callback, and one that is cancelled while it
    takes a piece of a body takes that piece with it. So each has our callback, and nobody else awaits it.
    """

    _waiters: set[asyncio.Future[None]] | None = None

    def ask(self, awaitable: Awaitable[Any], answer: Callable[[asyncio.Future[Any]], object]) -> asyncio.Future[Any]:
        """Have ``answer`` called with what becomes of ``awaitable``."""
        future = asyncio.ensure_future(awaitable)
        future.add_done_callback(answer)
        return future

    def tell(self) -> None:
        """There is news."""
        if self._waiters is not None:
            for waiter in self._waiters:
                if not waiter.done():
                    waiter.set_result(None)

    async def wait(self) -> None:
        """Wait for news."""
        waiter = asyncio.get_running_loop().create_future()
        if self._waiters is None:
            self._waiters = set()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)
