"""Pushing: what comes is sent to the streams that wait for it, past their tasks.

Theory of operation
===================

To wake the task of a stream only to have it send and wait again is most of what a delivery costs. So one task, a
*worker*, sends to all that wait, one after the other: a round. It may: a stream that waits lets others send (see
:mod:`fastapi_cancel._event_stream`).

A ``send`` runs from its first step to its last in one task, as the time limits and cancel scopes that middleware may
have around it need it. If one has to wait, the worker stays with it, ends with it, and two others share the rest of
the round.

Whatever cannot be pushed is left to the task of the stream, which is woken: what is not in memory, a failure, a
subscriber that is too slow, a stream that is being sent to already or is about to end. So a push is never more than
a short cut, and an event that comes during a round is seen by the next.

Nothing else may stop a worker. If something does (whoever cancels all tasks of an event loop), all are woken.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Hashable, Iterator
from contextvars import Context
from typing import Protocol

AT_ONCE = 100  # pushes in one turn of the event loop
WORKERS = 2  # in the place of one that stays with a send: a hundred sends that wait do not take a hundred turns


class Waiting(Hashable, Protocol):
    """Somebody who waits to be pushed to, or woken."""

    def push(self) -> Awaitable[None] | None:
        """Send what there is. What is returned is the rest of that, to be awaited in the same task."""
        ...


class Pusher:
    """Pushes to all who wait here. On asyncio only."""

    def __init__(self) -> None:
        self._waits: dict[Waiting, asyncio.Future[None]] = {}
        self._workers: set[object] = set()  # the tasks of a round
        self._news = False
        self._loop: asyncio.AbstractEventLoop

    async def wait(self, one: Waiting) -> None:
        """Wait to be woken."""
        self._forget_a_closed_loop()
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
        self._forget_a_closed_loop()
        self._news = bool(self._waits)
        if self._news and not self._workers:
            self._begin()

    def _forget_a_closed_loop(self) -> None:
        if (self._waits or self._workers) and self._loop.is_closed():
            self._waits.clear()
            self._workers.clear()

    def _begin(self) -> None:
        self._news = False
        self._start(iter(list(self._waits)))

    def _start(self, ones: Iterator[Waiting]) -> None:
        nobodys = Context()  # a push may wait for long: it is not to keep the request that has published
        # Not by the loop, whose tasks may be eager ones: nothing is to be sent within `push`.
        worker = asyncio.Task(self._work(ones), loop=self._loop, context=nobodys)
        self._workers.add(worker)
        worker.add_done_callback(self._ended, context=nobodys)

    async def _work(self, ones: Iterator[Waiting]) -> None:
        """Push to those whom no other worker of the round has pushed to."""
        for count, one in enumerate(ones, 1):
            if one in self._waits and (sending := one.push()) is not None:
                for _ in range(WORKERS):
                    self._start(ones)
                self._workers.discard(asyncio.current_task())
                await sending
                return
            if count % AT_ONCE == 0:
                await asyncio.sleep(0)
        self._workers.discard(asyncio.current_task())
        if self._news and not self._workers:
            self._begin()

    def _ended(self, worker: asyncio.Task[None]) -> None:
        if worker in self._workers:  # before its time: somebody has cancelled it
            self._workers.discard(worker)
            for one in list(self._waits):
                self.wake(one)
