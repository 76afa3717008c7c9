"""Endpoints that yield: FastAPI's SSE, JSON Lines and raw streaming, with generators that get closed.

FastAPI iterates what such an endpoint returns and leaves closing it to the garbage collector. The endpoint
is therefore wrapped: what it opens closes with the request, before its dependencies do.

For JSON Lines and raw streaming the request's own task pulls the generator, and the ladder does the rest.
For SSE, FastAPI pulls it in a task group of its own, which it cancels level-wise: a cleanup would end at its
first ``await``, and a generator that waits at its ``yield`` would be closed by another task. Such a generator
gets a task and a ladder of its own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from contextvars import ContextVar
from typing import Any

import anyio
from starlette.types import Scope

from ._beside import Beside
from ._closing import Closing, close, logger
from .ladder import Ladder

current: ContextVar[tuple[Scope, Ladder]] = ContextVar("fastapi_cancel_request")
"""The request whose handler runs, for the endpoint's wrapper to find."""


def closing(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    """``endpoint``, or a wrapper of it if it yields."""
    function = endpoint
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    if not inspect.isroutine(function):
        function = getattr(function, "__call__", function)  # noqa: B004
    is_async = inspect.isasyncgenfunction(function)
    if not is_async and not inspect.isgeneratorfunction(function):
        return endpoint

    @functools.wraps(endpoint)
    def opening(*args: Any, **kwargs: Any) -> Any:
        generator = endpoint(*args, **kwargs)
        request = current.get(None)
        if request is None:
            return generator
        scope, ladder = request
        body = _Body(generator, scope, ladder) if is_async else generator
        stack: AsyncExitStack = scope["fastapi_inner_astack"]
        stack.push_async_callback(close, body)
        return body

    # FastAPI looks through these for the parameters, for the name, and for whether it yields.
    opening.__signature__ = inspect.signature(endpoint)  # type: ignore[attr-defined]
    opening.__name__ = getattr(endpoint, "__name__", type(endpoint).__name__)
    opening.__wrapped__ = function
    return opening


class _Body(Closing):
    """An asynchronous generator, pulled by the task of the request or in one of its own."""

    def __init__(self, generator: AsyncGenerator[Any, None], scope: Scope, parent: Ladder) -> None:
        self._generator = generator
        self._scope = scope
        self._parent = parent
        self._own_task: _OwnTask | None = None

    async def __anext__(self) -> Any:
        if self._own_task is None:
            if self._parent.in_host():
                return await self._generator.__anext__()
            self._own_task = _OwnTask(self._generator, self._scope, self._parent)
        return await self._own_task.pull()

    async def aclose(self) -> None:
        if self._own_task is not None:
            await self._own_task.end()
        else:
            await self._generator.aclose()


class _OwnTask:
    """Runs a generator from its first step to its last, and its closing, under a ladder of its own."""

    def __init__(self, generator: AsyncGenerator[Any, None], scope: Scope, parent: Ladder) -> None:
        self._generator = generator
        self._told = False
        self._items, self._pulled = anyio.create_memory_object_stream[Any]()
        self._beside = Beside(self._produce, scope, parent, done=lambda _: self._items.close())

    async def pull(self) -> Any:
        try:
            return await self._pulled.receive()
        except anyio.EndOfStream:
            if self._beside.error is not None:
                self._told = True
                raise self._beside.error from None
            raise StopAsyncIteration from None

    async def end(self) -> None:
        """Have the generator closed, wherever it is, and wait for that."""
        self._pulled.close()
        await self._beside.end()
        if self._beside.ladder is None:
            self._items.close()
            await close(self._generator)
        if self._beside.error is not None and not self._told:
            logger.error("%r failed", self._generator, exc_info=self._beside.error)
        self._beside.error = None

    async def _produce(self) -> None:
        try:
            async for item in self._generator:
                await self._items.send(item)
        except anyio.BrokenResourceError:  # nobody pulls any more: that is its interruption
            assert self._beside.ladder is not None
            self._beside.ladder.settle()
        finally:
            await close(self._generator)
