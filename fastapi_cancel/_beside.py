"""Work beside the work: a task with a ladder of its own, whose end is waited for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
from starlette.types import Scope

from .ladder import Ladder
from .policy import CAUSES, CancelPolicy
from .protect import ladder_for


class Beside:
    """Runs ``function`` in a task of its own, from its first step to the end of its cleanup.

    It is interrupted when ``parent``'s work is, and by ``end``.

    :ivar error: what ``function`` raised
    :ivar ladder: its own, once it has begun. A task that is cancelled before has no end to wait for
    """

    error: Exception | None = None
    ladder: Ladder | None = None
    _unwanted = False

    def __init__(
        self, function: Callable[[], Awaitable[object]], scope: Scope, parent: Ladder, done: Callable[[Beside], object]
    ) -> None:
        self._function = function
        self._scope = scope
        self._parent = parent
        self._done = done
        self._ended = anyio.Event()
        parent.spawn(self._run)

    async def end(self, *, at_once: bool = False) -> None:
        """Interrupt it, wherever it is, and wait for its cleanup.

        :param at_once: without the grace of the policy
        """
        self._unwanted = True
        if self.ladder is None:
            return
        self.ladder.signal(self._parent.cause or "stop", at_once=at_once)
        with anyio.CancelScope(shield=True):
            await self._ended.wait()

    def _signal(self) -> None:
        """The parent's work is to end: with the grace that it has now."""
        assert self.ladder is not None
        self.ladder.adopt(self._policy())
        self.ladder.signal(self._parent.cause or "stop")

    def _policy(self) -> CancelPolicy:
        # Its parent and `end` tell it, whatever the causes of the policy; the time limit is its parent's.
        return self._parent.policy.replace(causes=CAUSES, timeout=None)

    async def _run(self) -> None:
        try:
            if not self._unwanted:
                ladder = ladder_for(self._policy(), self._scope)
                await ladder.run(self._work(ladder))
        except Exception as exc:
            self.error = exc
        finally:
            self._ended.set()
            self._done(self)

    async def _work(self, ladder: Ladder) -> None:
        self.ladder = ladder  # not before it runs: on Trio it could not yet do what a signal asks of it
        self._parent.listen(self._signal)
        await self._function()
