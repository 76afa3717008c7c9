"""Closing what produces a body, and running cleanup hooks: always all of them, faults logged."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from types import AsyncGeneratorType
from typing import Any

import anyio
from anyio.to_thread import run_sync
from starlette.concurrency import iterate_in_threadpool

logger = logging.getLogger("fastapi_cancel")
Cleanup = Callable[[], Awaitable[object]]


async def close(iterator: object) -> None:
    """Close an iterator, if it is one that can be closed: a synchronous one in a worker thread.

    There is no cancel scope around an asynchronous one: it may hold one of its own across a ``yield``.
    """
    inner = _wrapped_by_starlette(iterator)
    try:
        if (aclose := getattr(iterator, "aclose", None)) is not None:
            await aclose()
        elif (close_sync := getattr(iterator, "close", None)) is not None:
            with anyio.CancelScope(shield=True):
                await run_sync(close_sync)
    except Exception:
        logger.exception("closing %r failed", iterator)
    if inner is not None:
        await close(inner)


def _wrapped_by_starlette(iterator: object) -> object:
    """The synchronous iterator inside; left alone, it would be closed on the event loop."""
    if not isinstance(iterator, AsyncGeneratorType) or iterator.ag_code is not iterate_in_threadpool.__code__:
        return None
    if (frame := iterator.ag_frame) is None:
        return None
    return frame.f_locals.get("as_iterator", frame.f_locals.get("iterator"))


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


class InThread(AsyncIterator[Any]):
    """A synchronous iterable, pulled and closed in worker threads."""

    def __init__(self, iterable: Any) -> None:
        self._iterator = iter(iterable)

    async def __anext__(self) -> Any:
        item = await run_sync(next, self._iterator, _END)
        if item is _END:
            raise StopAsyncIteration
        return item

    async def aclose(self) -> None:
        await close(self._iterator)


_END = object()
