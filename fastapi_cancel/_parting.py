"""Time for what a client is still sent at the end, though it may not read it: a second.

But what is slow may be the event loop, in which a thousand streams end at once. To cut a last ``send`` short for that
is to take the end from a client that reads; and Hypercorn, cut off while it closes a connection, would never do so. So
the second is counted in looks, with a turn of the event loop between them at least: more turns than a ``send`` takes
that waits for nobody. All who part look at the same clock: however many they are, it needs no more turns for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

import anyio

from ._heart import TICK, Heart, current_heart

PARTING = 1.0  # seconds
LOOKS = round(PARTING / TICK) + 1  # the first of them comes early


class _Partings(dict[anyio.CancelScope, int]):
    """Those of one event loop, the first one first, and the look at which each is over."""

    def __init__(self, heart: Heart) -> None:
        self._looks = 0
        self._pulse = heart.add(self._look, monotonic())

    def begin(self, scope: anyio.CancelScope) -> None:
        self[scope] = self._looks + LOOKS

    def stop(self) -> None:
        self._pulse.stop()

    def _look(self, now: float) -> float:
        self._looks += 1
        for scope, last in self.items():
            if last > self._looks:
                break
            scope.cancel()
        return now + TICK / 10  # the next tick, also if this one came late


_open: dict[Heart, _Partings] = {}


@contextmanager
def parting() -> Iterator[anyio.CancelScope]:
    """Let what is inside have that time, shielded from any other cancellation."""
    heart = current_heart()
    if (partings := _open.get(heart)) is None:
        partings = _open[heart] = _Partings(heart)
    with anyio.CancelScope(shield=True) as scope:
        partings.begin(scope)
        try:
            yield scope
        finally:
            del partings[scope]
            if not partings:
                partings.stop()
                del _open[heart]
