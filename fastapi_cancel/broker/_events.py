"""A channel as the content of an event stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from typing import Any

from .._feed import Feed, Offer
from .log import Event, Here, Place, Subscription


class ChannelEvents(Feed[Event]):
    """The events of a subscription, which it enters and leaves.

    :param greet: begin with an event that says where the channel is
    """

    def __init__(self, subscription: AbstractAsyncContextManager[Subscription], *, greet: bool) -> None:
        self._offer: Offer | None = None
        self._events = self._generate(subscription, greet)

    async def _generate(
        self, subscription: AbstractAsyncContextManager[Subscription], greet: bool
    ) -> AsyncGenerator[Event, None]:
        async with subscription as events:
            if self._offer is not None:
                events.follow(self._offer)
            if greet and (place := Place.parse(events.position)) is not None:
                yield Here(place)
            while True:
                yield await anext(events)

    def follow(self, offer: Offer) -> None:
        self._offer = offer

    def __anext__(self) -> Any:
        return self._events.__anext__()

    def asend(self, value: None) -> Any:
        return self._events.asend(value)

    def athrow(self, *exc: Any) -> Any:
        return self._events.athrow(*exc)

    def aclose(self) -> Any:
        return self._events.aclose()
