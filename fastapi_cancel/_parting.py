"""Time for what a client is still sent at the end, though it may not read it: a second.

But what is slow may be the event loop, in which a thousand streams end at once. To cut a last ``send`` short for that
is to take the end from a client that reads; and Hypercorn, cut off while it closes a connection, would never do so. So
the second is counted in looks, with a turn of the event loop between them at least: more turns than a ``send`` takes
that waits for nobody.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

import anyio

from ._heart import TICK, current_heart

PARTING = 1.0  # seconds
LOOKS = round(PARTING / TICK)


@contextmanager
def parting() -> Iterator[anyio.CancelScope]:
    """Let what is inside have that time, shielded from any other cancellation."""
    left = LOOKS

    def look(now: float) -> float:
        nonlocal left
        left -= 1
        if left <= 0:
            scope.cancel()
        return now + TICK / 2  # which is the next tick

    with anyio.CancelScope(shield=True) as scope:
        pulse = current_heart().add(look, monotonic())
        try:
            yield scope
        finally:
            pulse.stop()
