"""Work beside the work: a task with a ladder of its own, whose end is waited for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
from starlette.types import Scope

from .ladder import Ladder
from .policy import CAUSES
from .protect import ladder_for


class Beside:
    """Runs ``function`` in a task of its own, from its first step to the end of its cleanup.

    It is interrupted when ``parent``'s work is, and by ``end``.

    :ivar error: what ``function`` raised
    :ivar ladder: its own, once it runs
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

    async def end(self) -> None:
        """Interrupt it, wherever it is, and wait for its cleanup."""
        self._signal()
        with anyio.CancelScope(shield=True):
            await self._ended.wait()

    def _signal(self) -> None:
        self._unwanted = True
        if self.ladder is not None:
            self.ladder.signal(self._parent.cause or "stop")

    async def _run(self) -> None:
        try:
            # Its parent and `end` tell it, whatever the causes of the policy; the time limit is its parent's.
            ladder = ladder_for(self._parent.policy.replace(causes=CAUSES, timeout=None), self._scope)
            await ladder.run(self._work(ladder))
        except Exception as exc:
            self.error = exc
        finally:
            self._ended.set()
            self._done(self)

    async def _work(self, ladder: Ladder) -> None:
        self.ladder = ladder  # not before it runs: on Trio it could not yet do what a signal asks of it
        self._parent.listen(self._signal)
        if not self._unwanted:
            await self._function()
