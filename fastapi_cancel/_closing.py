"""Closing what produces a body, and running cleanup hooks: always all of them, faults logged."""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterable
from types import AsyncGeneratorType
from typing import Any

import anyio
from anyio.abc import AsyncResource
from anyio.to_thread import run_sync
from starlette.concurrency import iterate_in_threadpool
from starlette.responses import StreamingResponse

logger = logging.getLogger("fastapi_cancel")
Cleanup = Callable[[], Awaitable[object]]


class Closing(AsyncIterator[Any]):
    """An asynchronous iterator that is to be closed, though it is no generator."""

    async def aclose(self) -> None: ...


async def close(iterator: object) -> None:
    """Close a generator, a synchronous one in a worker thread, or a stream of AnyIO's. Others are their owner's.

    There is no cancel scope around an asynchronous one: it may hold one of its own across a ``yield``.
    """
    try:
        if isinstance(iterator, (AsyncGenerator, AsyncResource, Closing)):
            await iterator.aclose()
        elif isinstance(iterator, Generator):
            with anyio.CancelScope(shield=True):
                await run_sync(iterator.close)
    except Exception:
        logger.exception("closing %r failed", iterator)


def in_threads(response: StreamingResponse) -> None:
    """Replace Starlette's wrapper of a synchronous iterator, which closes it on the event loop."""
    body = response.body_iterator
    if isinstance(body, AsyncGeneratorType) and body.ag_code is iterate_in_threadpool.__code__ and body.ag_frame:
        names = body.ag_frame.f_locals
        if "as_iterator" not in names:  # it has not begun
            response.body_iterator = InThread(names["iterator"])


async def run_cleanups(cleanups: list[Cleanup], seconds: float, owner: str) -> None:
    """Run and remove all of ``cleanups``, the latest first, each for so many seconds at the most.

    Shielded: an interruption waits until all have run. A native cancellation cuts one short, not the rest.
    """
    interruption: BaseException | None = None
    while cleanups:
        function = cleanups.pop()
        with anyio.move_on_after(seconds, shield=True) as scope:
            try:
                await function()
            except Exception:
                logger.exception("cleanup %r of %s failed", function, owner)
            except BaseException as exc:
                if scope.cancel_called:
                    raise
                interruption = exc
        if scope.cancelled_caught:
            logger.warning("cleanup %r of %s not finished after %g s, forced it", function, owner, seconds)
    if interruption is not None:
        raise interruption


class InThread(Closing):
    """A synchronous iterable, pulled and closed in worker threads, one at a time.

    The lock is for the server's own cancellation: it does not wait for the thread, the closing must.
    """

    def __init__(self, iterable: Iterable[Any]) -> None:
        self._iterator = iter(iterable)
        self._lock = threading.Lock()

    async def __anext__(self) -> Any:
        item = await run_sync(self._next)
        if item is _END:
            raise StopAsyncIteration
        return item

    async def aclose(self) -> None:
        if isinstance(self._iterator, Generator):
            with anyio.CancelScope(shield=True):
                await run_sync(self._close, self._iterator)

    def _next(self) -> Any:
        with self._lock:
            return next(self._iterator, _END)

    def _close(self, generator: Generator[Any, Any, Any]) -> None:
        with self._lock:
            generator.close()


_END = object()
