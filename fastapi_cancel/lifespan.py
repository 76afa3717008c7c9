"""One lifespan that opens and closes everything, when the last cleanup is through.

gunicorn and Granian do not wait, on SIGTERM, for work whose client has gone already: the one cancels it, the other
abandons it. But every server waits for the lifespan, so that is where we wait.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

import anyio

from .ladder import ending

LOOK = 0.01  # seconds between two looks at what is still ending


def lifespan(
    *parts: AbstractAsyncContextManager[Any], around: Callable[[Any], AbstractAsyncContextManager[Any]] | None = None
) -> Callable[[Any], AbstractAsyncContextManager[Any]]:
    """A lifespan that opens ``parts`` in their order, and closes them in the opposite one. ::

        app = FastAPI(lifespan=lifespan(broker, streams, around=my_lifespan))

    On shutdown it first waits for the requests that are ending, their cleanups and background tasks included; each
    has the time that its policy gives it. Also without any parts. Daphne knows no lifespan.

    :param parts: brokers, resumable streams, and whatever else is opened by ``async with``
    :param around: your own lifespan; it runs while the parts are open
    :raises TypeError: an argument is of the wrong type; the message names it
    """
    for part in parts:
        if not isinstance(part, AbstractAsyncContextManager):
            raise TypeError(f"parts must be opened by async with, unlike {part!r}")
    if around is not None and not callable(around):
        raise TypeError(f"around must be a lifespan, a function of the application, not {around!r}")

    @asynccontextmanager
    async def opened(app: Any) -> AsyncIterator[Any]:
        async with AsyncExitStack() as stack:
            for part in parts:
                await stack.enter_async_context(part)
            yield await stack.enter_async_context(around(app)) if around is not None else None
            while threading.get_ident() in ending.values():
                await anyio.sleep(LOOK)

    return opened
