"""A content that knows what has come without being pulled, and whom to offer it to."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeAlias, TypeVar

MAX_BYTES = 65536
"""A burst is not added to once it is larger."""

Burst: TypeAlias = tuple[bytes, int, str | None]
"""What goes out together: its bytes, how many events they are, the last id among them."""

Offer: TypeAlias = Callable[[Burst], Awaitable[None] | bool]
"""Sends it past the task of a stream, while that waits for its content. True: it has been sent. False: not now, have
the task pull it. Else the rest of the sending, which has to wait: to be awaited in the same task."""

Item = TypeVar("Item", covariant=True)


class Feed(AsyncGenerator[Item, None]):
    """May offer events, instead of yielding them, where it would wait for the next."""

    @abstractmethod
    def follow(self, offer: Offer) -> None:
        """Offer them here; called once, before the first is pulled."""
