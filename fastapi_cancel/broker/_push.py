"""Pushing: what comes is sent to the streams that wait for it, past their tasks.

Theory of operation
===================

To wake the task of a stream only to have it send and wait again is most of what a delivery costs. So one task,
the *pusher*, sends to all that wait, one after the other. It may: a stream that waits lets others send (see
:mod:`fastapi_cancel._event_stream`).

A ``send`` runs from its first step to its last in one task, as the time limits and cancel scopes that middleware may
have around it need it. If one has to wait, the pusher stays with it, ends with it, and another one goes on.

Whatever cannot be pushed is left to the task of the stream, which is woken: what is not in memory, a failure, a
subscriber that is too slow, a stream that is being sent to already or is about to end. So a push is never more than
a short cut, and an event that comes during a round is seen by the next.

Nothing else may stop the pusher. If something does (whoever cancels all tasks of an event loop), all are woken.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Hashable, Iterator
from contextvars import Context
from typing import Protocol

AT_ONCE = 100  # pushes in one turn of the event loop


class Waiting(Hashable, Protocol):
    """Somebody who waits to be pushed to, or woken."""

    def push(self) -> Awaitable[None] | None:
        """Send what there is. What is returned is the rest of that, to be awaited in the same task."""
        ...


class Pusher:
    """Pushes to all who wait here. On asyncio only."""

    def __init__(self) -> None:
        self._waits: dict[Waiting, asyncio.Future[None]] = {}
        self._loop: asyncio.AbstractEventLoop
        self._news = False
        self._at_work: asyncio.Task[None] | None = None

    async def wait(self, one: Waiting) -> None:
        """Wait to be woken."""
        self._loop = asyncio.get_running_loop()
        wait = self._waits[one] = self._loop.create_future()
        try:
            await wait
        finally:
            self._waits.pop(one, None)

    def wake(self, one: Waiting) -> None:
        """Have ``one``, which waits, see for itself."""
        wait = self._waits.pop(one)
        if not wait.done():
            wait.set_result(None)

    def push(self) -> None:
        """There is news for all who wait."""
        self._news = bool(self._waits)
        if self._news and self._at_work is None:
            self._go_on(iter(()))

    def _go_on(self, rest: Iterator[Waiting]) -> None:
        nobodys = Context()  # a push may wait for long: it is not to keep the request that has published
        # Not by the loop, whose tasks may be eager ones: nothing is to be sent within `push`.
        self._at_work = asyncio.Task(self._work(rest), loop=self._loop, context=nobodys)
        self._at_work.add_done_callback(self._ended, context=nobodys)

    async def _work(self, rest: Iterator[Waiting]) -> None:
        sending = await self._round(rest)
        while sending is None and self._news:
            self._news = False
            sending = await self._round(rest := iter(list(self._waits)))
        if sending is None:
            self._at_work = None
        else:
            self._go_on(rest)
            await sending

    async def _round(self, ones: Iterator[Waiting]) -> Awaitable[None] | None:
        """Push to each; or until a send has to wait: that is returned."""
        for count, one in enumerate(ones, 1):
            if one in self._waits and (sending := one.push()) is not None:
                return sending
            if count % AT_ONCE == 0:
                await asyncio.sleep(0)
        return None

    def _ended(self, task: asyncio.Task[None]) -> None:
        if self._at_work is task:  # somebody has cancelled it
            self._at_work = None
            for one in list(self._waits):
                self.wake(one)
