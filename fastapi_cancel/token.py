"""What a handler sees: whether its request ends early, and why."""

from __future__ import annotations

import threading
from typing import Annotated

import anyio
from fastapi import Depends, Request

from .channel import Channel
from .exceptions import NotCancellable, RequestCancelled
from .ladder import Ladder
from .policy import Cause
from .protect import KEY


class CancelToken:
    """Tells a handler that nobody wants its result. Everything but ``wait`` may be used from any thread.

    Ask for it by type, or by :func:`get_cancel_token`::

        @router.get("/primes")
        def primes(token: Token) -> list[int]:
            found = []
            for number in candidates():
                token.raise_if_set()
                ...
    """

    __slots__ = ("_ladder",)

    def __init__(self, ladder: Ladder | None) -> None:
        self._ladder = ladder

    def is_set(self) -> bool:
        """Whether the request ends early."""
        return self.cause is not None

    @property
    def cause(self) -> Cause | None:
        """Why, once the token is set."""
        return self._ladder.cause if self._ladder is not None else None

    @property
    def reason(self) -> str:
        """What whoever stopped it says about that; empty if nothing."""
        return self._ladder.reason if self._ladder is not None else ""

    def raise_if_set(self) -> None:
        """End the handler here if the token is set; nothing is logged.

        That is its one interruption, also in a worker thread that it waits for: who catches it may await.

        :raises RequestCancelled: it is
        """
        if (cause := self.cause) is not None:
            assert self._ladder is not None
            try:
                self._ladder.settle()
            except RuntimeError:  # in a thread, there is no task to ask about
                self._ladder.settle_from_thread()
            raise RequestCancelled(cause)

    async def wait(self) -> Cause:
        """Wait until the token is set.

        :return: the cause
        """
        if self._ladder is None:
            await anyio.sleep_forever()
        event = anyio.Event()
        tell = event.set
        assert self._ladder is not None
        self._ladder.listen(tell)
        try:
            await event.wait()
        finally:
            self._ladder.forget(tell)
        assert self._ladder.cause is not None
        return self._ladder.cause

    def wait_in_thread(self, timeout: float | None = None) -> Cause | None:
        """Block the calling worker thread until the token is set.

        :param timeout: seconds to wait at the most; ``None``: no limit
        :return: the cause, or ``None`` if the time ran out
        """
        event = threading.Event()
        if self._ladder is None:
            event.wait(timeout)
            return None
        tell = event.set
        self._ladder.listen(tell)
        event.wait(timeout)
        self._ladder.forget(tell)
        return self.cause


async def get_cancel_token(request: Request) -> CancelToken:
    """The token of this request, as a dependency. Never set on an endpoint that opted out.

    :raises NotCancellable: the route is no ``CancellableRoute``
    """
    if KEY not in request.scope:
        raise NotCancellable(
            f"no cancel token for {request.scope['path']}: its router needs route_class=CancellableRoute"
        )
    channel: Channel | None = request.scope[KEY]
    return CancelToken(channel.ladder if channel is not None else None)


Token = Annotated[CancelToken, Depends(get_cancel_token)]
