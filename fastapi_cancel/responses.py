"""Responses that stop when the client does and clean up, on any route of any Starlette app."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Mapping
from contextlib import nullcontext
from copy import copy
from functools import partial
from typing import Any, ParamSpec

from starlette._utils import is_async_callable
from starlette.background import BackgroundTask
from starlette.responses import AsyncContentStream, ContentStream, FileResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ._closing import Cleanup, InThread, close, run_cleanups
from .exceptions import RequestCancelled
from .ladder import Ladder
from .policy import CancelPolicy, check_seconds
from .protect import KEY, channel_of, protect
from .shutdown import draining, is_event_stream

P = ParamSpec("P")


class Cancellable(Response):
    """What the cancellable responses have in common; to be mixed into one of Starlette's.

    :param policy: how the response ends early; on a ``CancellableRoute``: instead of the route's
    :param send_timeout: seconds that one ``send`` may wait for a client that does not read; ends it as ``stalled``
    :param cleanup: async callables without arguments, see :meth:`add_cleanup`
    """

    def _configure(
        self, policy: CancelPolicy | None, send_timeout: float | None, cleanup: Cleanup | Iterable[Cleanup]
    ) -> None:
        if policy is not None and not isinstance(policy, CancelPolicy):
            raise TypeError(f"policy must be a CancelPolicy, not {policy!r}")
        check_seconds("send_timeout", send_timeout, none=True)
        self._policy = policy
        self._send_timeout = send_timeout
        self._cleanups: list[Cleanup] = []
        self._ladder: Ladder | None = None
        for function in cleanup if isinstance(cleanup, Iterable) else [cleanup]:
            self.add_cleanup(function)

    def add_cleanup(self, function: Callable[P, Awaitable[object]], *args: P.args, **kwargs: P.kwargs) -> None:
        """Have ``await function(*args, **kwargs)`` run once when the response ends, however it does.

        Finished, failed, disconnected, cancelled by the server, never started (on a
        ``CancellableRoute`` even if never called): the latest one added runs first. One that raises is
        logged and stops neither the others nor the original error.

        :raises TypeError: ``function`` is not an async callable
        """
        if not is_async_callable(function):
            raise TypeError(f"cleanup must be async callables, not {function!r}")
        self._cleanups.append(partial(function, *args, **kwargs))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        around = channel_of(scope)
        if scope["type"] == "http" and (around is not None or KEY not in scope):
            policy = self._policy_over(around.ladder.policy if around is not None else CancelPolicy())
            await protect(self._respond, scope, receive, send, policy, self)
        else:  # the endpoint opted out; or a WebSocket is denied, whose channel is not ours
            await self._respond(scope, receive, send)

    def _policy_over(self, default: CancelPolicy) -> CancelPolicy:
        policy = self._policy or default
        return policy if self._send_timeout is None else policy.replace(send_timeout=self._send_timeout)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A copy: a response to a file may serve several requests at once. Without the background task,
        # which Starlette would run before the cleanup.
        running = copy(self)
        running.background = None
        if (channel := channel_of(scope)) is not None:
            running._ladder = channel.ladder
        try:
            await super(Cancellable, running).__call__(scope, receive, send)
        finally:
            await running.aclose()
        if self.background is not None:
            await self.background()

    async def close_on_exit(self, *exc: object) -> None:
        """``aclose``, for an exit stack."""
        await self.aclose()

    async def aclose(self) -> None:
        """Run what has not run of the cleanup. Called at the end; harmless to call again."""
        policy = self._policy_over(self._ladder.policy if self._ladder is not None else CancelPolicy())
        await run_cleanups(self._cleanups, policy.cleanup_timeout, type(self).__name__)


class CancellableStreamingResponse(Cancellable, StreamingResponse):
    """A ``StreamingResponse`` that ends when its client leaves, and closes its iterator.

    ::

        @router.get("/export")
        async def export():
            return CancellableStreamingResponse(rows(), media_type="application/x-ndjson", cleanup=[release])

    :param content: a sync or async iterable of str, bytes or memoryview. A synchronous one is pulled, and
        closed, in worker threads
    :param policy: how the response ends early; on a ``CancellableRoute``: instead of the route's
    :param send_timeout: seconds that one chunk may wait for a client that does not read (cause ``stalled``)
    :param cleanup: async callables without arguments, run once on every path; see :meth:`add_cleanup`
    :raises TypeError: an argument is of the wrong type; the message names it
    :raises ValueError: an argument is out of range; the message names it
    """

    def __init__(
        self,
        content: ContentStream,
        status_code: int = 200,
        headers: Mapping[str, str] | None = None,
        media_type: str | None = None,
        background: BackgroundTask | None = None,
        *,
        policy: CancelPolicy | None = None,
        send_timeout: float | None = None,
        cleanup: Cleanup | Iterable[Cleanup] = (),
    ) -> None:
        self._configure(policy, send_timeout, cleanup)
        super().__init__(_as_async(content), status_code, headers, media_type, background)
        self._sources: list[object] = [self.body_iterator]

    async def stream_response(self, send: Send) -> None:
        with draining(self._ladder) if self._ladder is not None and is_event_stream(self) else nullcontext():
            await self._stream_chunks(send)

    async def _stream_chunks(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        ladder = self._ladder
        self._check()
        async for chunk in self.body_iterator:
            if ladder is not None and ladder.cause is not None:
                self._check()
            if not isinstance(chunk, (bytes, memoryview)):
                chunk = chunk.encode(self.charset)
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            if ladder is not None and ladder.cause is not None:
                self._check()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _check(self) -> None:
        """The chunk boundary: after the signal nothing more is pulled or sent."""
        if self._ladder is not None and self._ladder.cause is not None:
            self._ladder.settle()
            raise RequestCancelled(self._ladder.cause)

    async def aclose(self) -> None:
        try:
            await self.close_content()
        finally:
            await super().aclose()

    async def close_content(self) -> None:
        """Close what produces the body. Harmless to call again."""
        sources = self._sources.copy()
        self._sources.clear()
        if sources and self.body_iterator is not sources[0]:  # somebody wrapped it
            await close(self.body_iterator)
        for source in sources:
            await close(source)


class CancellableFileResponse(Cancellable, FileResponse):
    """A ``FileResponse`` with the same policy, ``send_timeout`` and cleanup.

    ::

        return CancellableFileResponse(path, cleanup=[partial(remove, path)])

    :param path: the file, and further arguments as for ``FileResponse``
    :param policy: how the response ends early; on a ``CancellableRoute``: instead of the route's
    :param send_timeout: seconds that one chunk may wait for a client that does not read (cause ``stalled``)
    :param cleanup: async callables without arguments, run once on every path; see :meth:`add_cleanup`
    """

    def __init__(
        self,
        *args: Any,
        policy: CancelPolicy | None = None,
        send_timeout: float | None = None,
        cleanup: Cleanup | Iterable[Cleanup] = (),
        **kwargs: Any,
    ) -> None:
        self._configure(policy, send_timeout, cleanup)
        super().__init__(*args, **kwargs)


def _as_async(content: ContentStream) -> AsyncContentStream:
    if isinstance(content, AsyncIterable):
        return content
    if isinstance(content, (bytes, bytearray, memoryview)) or not isinstance(content, Iterable):
        if inspect.isroutine(content):
            raise TypeError(f"content must be an iterable: call {content.__qualname__}, do not pass it")
        raise TypeError(f"content must be a sync or async iterable of str, bytes or memoryview, not {content!r}")
    return InThread(content)
