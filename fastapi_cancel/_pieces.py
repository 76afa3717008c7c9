"""A body that goes out piece by piece: when its producer must let the event loop turn, and which piece is the last.

A producer that never waits would starve the event loop where ``send`` does not wait either (Hypercorn), and
write on to a connection that is lost, which asyncio logs from the fifth write on.
"""

from __future__ import annotations

from collections.abc import Iterable
from time import monotonic

# Without a wait in between, there are at the most:
MAX_SECONDS = 0.05
MAX_WRITES = 3


class Pieces:
    """The pieces of one body.

    :param headers: of the response
    """

    __slots__ = ("_left", "_since", "_waits", "_writes")

    def __init__(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self._left = _content_length(headers)
        self._waits = -1
        self._since = 0.0
        self._writes = 0

    def too_fast(self, waits: int) -> bool:
        """Whether the event loop must turn before the next piece.

        :param waits: how often the work has waited until now
        """
        if waits != self._waits:
            self._waits = waits
            self._since = monotonic()
            self._writes = 1
        elif self._writes < MAX_WRITES and monotonic() - self._since < MAX_SECONDS:
            self._writes += 1
        else:
            return True
        return False

    def is_last(self, piece: bytes) -> bool:
        """Whether all that was announced is out with this one, whatever the producer still does."""
        if self._left is None:
            return False
        self._left -= len(piece)
        return self._left <= 0


def _content_length(headers: Iterable[tuple[bytes, bytes]]) -> int | None:
    for name, value in headers:
        if name.lower() == b"content-length" and value.isdigit():
            return int(value)
    return None
