"""A request that has no ladder yet, on asyncio.

Nearly all requests come to their own end: nobody leaves, and nobody asks for their token. So the ladder is made by
whoever needs it first, on the event loop, and takes the work over where that is:

- *in a step*: ``drive`` finds it at the step's end, and hands the wait on that was to begin;
- *at a wait*: it is told what the work waits for, and may cancel it at once. What comes of the wait goes to the ladder;
- *in the last step, or later*, by a task that the work has left behind: there is nothing to take over.

The client is watched without one. The watcher goes over to the ladder with the rest; the one whose first step has
made it has ended by then, for it has heard of a disconnect or has a piece of the body in its hands.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from itertools import chain
from types import coroutine
from typing import Any, cast

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ._native import NativeLadder, Watcher, start, stop
from .channel import Channel
from .ladder import RUNNING, Ladder, Timer
from .policy import CancelPolicy


class LightChannel(Channel):
    """Makes its ladder when it is asked for it, on the event loop.

    :param host: the task that runs the work, inside no AnyIO cancel scope
    """

    __slots__ = ("_cancelling", "_host", "_over", "_restless", "_waiting_for", "_waits", "_watcher")

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        policy: CancelPolicy,
        response: Response | None,
        host: asyncio.Task[Any],
    ) -> None:
        super().__init__(scope, receive, send, policy, response)
        self._host = host
        self._cancelling = host.cancelling()
        self._waits = 0
        self._waiting_for: Any = RUNNING
        self._restless = True
        self._over = False
        self._watcher: Watcher | None = None

    @property
    def ladder(self) -> Ladder:
        return self.made or self._make_ladder()

    def _make_ladder(self) -> Ladder:
        ladder = NativeLadder(self.policy, self.scope, self._host)
        ladder.take_over(self._cancelling, self._waits, self._waiting_for, self._watcher)
        self._watcher = None
        self.take(ladder)
        if self._over:
            ladder.end()
        elif self.completed:
            ladder.complete()
            ladder.watch = None
        return ladder

    def _watch_soon(self) -> None:
        self._restless = False
        if self.completed:
            return
        if self._reading:  # the application itself, which will hear who leaves
            self._restless = True
            return
        self._restless = not self.watch()

    def _call_later(self, seconds: float, function: Callable[[], object]) -> Timer | None:
        return self._host.get_loop().call_later(seconds, function)

    def _start_watcher(self) -> None:
        if self.made is not None:
            super()._start_watcher()
        else:
            self._watcher = start(self)

    def _pause_watcher(self) -> None:
        if self.made is not None:
            super()._pause_watcher()
        elif self._watcher is self and self._waiting_for is RUNNING:
            self.close_reader()
            self._watcher = None
            self._restless = True

    def _watch_again(self) -> None:
        if self.made is not None or asyncio.current_task() is not self._host:
            super()._watch_again()

    @coroutine
    def drive(self, work: Coroutine[Any, Any, None]) -> Generator[Any, Any, None]:
        """Run the work, as a ladder does: a step at a time, until there is one."""
        steps: Any = work.__await__()
        waiting_for: Any = None
        thrown: BaseException | None = None
        try:
            for waiting_for in steps:
                if self.made is None:
                    self._waiting_for = waiting_for
                    # A bare yield, `sleep(0)`, is over in the next turn: one or two are not worth a watcher.
                    if self._restless and (waiting_for is not None or self._waits > 1):
                        self._watch_soon()  # which may have news at once
                if self.made is not None:
                    self._waiting_for = RUNNING
                    steps = chain(iter((waiting_for,)), steps)  # unlike the tuple, it lets go
                    break
                self._waits += 1
                try:
                    yield waiting_for
                except GeneratorExit:
                    work.close()
                    raise
                except BaseException as exc:
                    thrown = exc
                    break
                finally:
                    self._waiting_for = RUNNING
                if self.made is not None:
                    break
            else:
                return
            rest = cast(Generator[Any, Any, None], self.ladder.drive(work, steps, thrown))
            steps = waiting_for = thrown = None
            yield from rest
        finally:
            steps = waiting_for = thrown = None  # an exception would hold this frame, which holds it
            self._over = True
            if self._watcher is not None:
                stop(self._watcher)
                self._watcher = None
            if self.made is not None:
                self.made.end()
