"""Server-sent events: ``return SSEResponse(feed(), heartbeat=15)``. How they are sent: :mod:`._event_stream`."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterable, Awaitable, Callable, Coroutine, Iterable, Mapping
from datetime import UTC, datetime
from functools import partial
from types import EllipsisType
from typing import Any

import anyio
from sse_starlette.event import JSONServerSentEvent, ServerSentEvent
from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette._utils import is_async_callable
from starlette.background import BackgroundTask
from starlette.responses import AsyncContentStream
from starlette.types import Message, Receive, Scope, Send

from . import shutdown
from ._beside import Beside
from ._closing import Cleanup
from ._event_stream import EventStream, StreamInfo
from ._looks import within
from .channel import Channel
from .events import check_retry, encode
from .ladder import Ladder
from .policy import CancelPolicy, check_seconds
from .protect import channel_of, ladder_for
from .responses import CancellableStreamingResponse, _as_async

__all__ = ["JSONServerSentEvent", "SSEResponse", "ServerSentEvent", "StreamInfo"]

logger = logging.getLogger("fastapi_cancel")

HEARING = 0.1  # seconds until we believe that a cancellation from outside is not because the client has left
AT_ONCE, NO_LIMIT = 0.001, 1e9  # seconds: what sse-starlette's cleanup_timeout of 0 and None are to us

shutdown.status = AppStatus

Event = Any
"""What :func:`~fastapi_cancel.events.encode` takes."""


class SSEResponse(CancellableStreamingResponse, EventSourceResponse):
    """Server-sent events, ended when the client leaves, and cleaned up.

    It is an ``EventSourceResponse`` of sse-starlette by type and by argument. ::

        @router.get("/events")
        async def events(last: LastEventID):
            return SSEResponse(feed(after=last), heartbeat=15)

    :param content: a sync or async iterable of events: all that :func:`~fastapi_cancel.events.encode` takes.
        ``None`` is skipped: nothing is sent for it
    :param heartbeat: seconds without anything sent, after which a comment is; ``None``: never. Default: 15
    :param retry: milliseconds that the client is to wait before it comes back; sent first, and with the farewell
    :param farewell: the last event of a stream that the server ends early (shutdown, stop, timeout): an event,
        or a function that makes one of the :class:`StreamInfo`
    :param on_disconnect: an async callable, run with the :class:`StreamInfo` once the stream has ended early,
        for whatever cause
    :param cleanup: async callables without arguments, run once on every path; see :meth:`add_cleanup`
    :param batch: whether events that are ready go out together. What a generator does after its ``yield`` may
        then come before the sending, by two milliseconds at the most. False: each is sent before the next is made
    :param policy: how the stream ends early; on a ``CancellableRoute``: instead of the route's
    :param send_timeout: seconds that one ``send`` may wait for a client that does not read (cause ``stalled``)
    :param ping: sse-starlette's name for ``heartbeat``, where 0 means never
    :param sep: the line ending: CR LF, CR or LF; default CR LF
    :param ping_message_factory: makes the heartbeat, instead of a comment
    :param data_sender_callable: an async callable that runs beside the stream, and ends with it
    :param client_close_handler_callable: an async callable, run with the ASGI message once the stream has ended,
        if the client has left before, whatever the cause of the end
    :param shutdown_event: set when the server is told to stop
    :param shutdown_grace_period: seconds that the content may go on after that; 0: the grace of the policy
    :param cleanup_timeout: seconds that a cleanup may take, ``None``: no limit; instead of the policy's
    :raises TypeError: an argument is of the wrong type; the message names it
    :raises ValueError: an argument is out of range; the message names it
    """

    body_iterator: AsyncContentStream
    _stream: EventStream | None = None
    _told_end = _told_close = False

    def __init__(
        self,
        content: AsyncIterable[Event] | Iterable[Event],
        status_code: int = 200,
        headers: Mapping[str, str] | None = None,
        media_type: str = "text/event-stream",
        background: BackgroundTask | None = None,
        ping: float | None = None,
        sep: str | None = None,
        ping_message_factory: Callable[[], Event] | None = None,
        data_sender_callable: Callable[[], Coroutine[Any, Any, None]] | None = None,
        send_timeout: float | None = None,
        client_close_handler_callable: Callable[[Message], Awaitable[None]] | None = None,
        shutdown_event: anyio.Event | None = None,
        shutdown_grace_period: float = 0,
        cleanup_timeout: float | EllipsisType | None = ...,
        *,
        heartbeat: float | EllipsisType | None = ...,
        retry: int | None = None,
        farewell: Event | Callable[[StreamInfo], Event] = None,
        on_disconnect: Callable[[StreamInfo], Awaitable[object]] | None = None,
        batch: bool = True,
        policy: CancelPolicy | None = None,
        cleanup: Cleanup | Iterable[Cleanup] = (),
    ) -> None:
        self._configure(policy, send_timeout, cleanup)
        check_seconds("ping", ping, zero=True, none=True)
        check_seconds("shutdown_grace_period", shutdown_grace_period, zero=True)
        if heartbeat is not ...:
            check_seconds("heartbeat", heartbeat, none=True)
            if ping is not None:
                raise TypeError("heartbeat and ping are two names for one thing: give one of them")
        if cleanup_timeout is not ...:
            check_seconds("cleanup_timeout", cleanup_timeout, zero=True, none=True)
        if retry is not None:
            check_retry(retry)
        if not isinstance(batch, bool):
            raise TypeError(f"batch must be True or False, not {batch!r}")
        if on_disconnect is not None and not is_async_callable(on_disconnect):
            raise TypeError(f"on_disconnect must be an async callable, not {on_disconnect!r}")
        for name, function in {
            "ping_message_factory": ping_message_factory,
            "data_sender_callable": data_sender_callable,
            "client_close_handler_callable": client_close_handler_callable,
        }.items():
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be callable, not {function!r}")
        EventSourceResponse.__init__(
            self,
            _as_async(content),
            status_code,
            headers,
            media_type,
            background,
            ping=ping if heartbeat is ... else heartbeat or 0,
            sep=sep,
            ping_message_factory=ping_message_factory,
            send_timeout=send_timeout,
            client_close_handler_callable=client_close_handler_callable,
            data_sender_callable=data_sender_callable,
            shutdown_event=shutdown_event,
            shutdown_grace_period=shutdown_grace_period,
        )
        del self.headers["connection"]  # HTTP/1.1 needs none, HTTP/2 forbids it (RFC 9113, section 8.2.2)
        del self._headers, self._send_lock  # of no use from here on, and a thousand bytes
        self._sources = [self.body_iterator]
        self.batch = batch
        self._limit = cleanup_timeout
        self._retry = retry
        self._farewell = farewell
        self._on_disconnect = on_disconnect

    @property
    def info(self) -> StreamInfo:
        """What has been sent until now."""
        if self._stream is not None:
            return self._stream.info
        return StreamInfo(self._ladder.cause if self._ladder is not None else None)

    def shut_down(self) -> None:
        """The server is told to stop: farewell after the grace, then the cancellation."""
        ladder = self._ladder
        assert ladder is not None
        if self._shutdown_event is not None:
            self._shutdown_event.set()
        if self._shutdown_grace_period and ladder.cause is None and "shutdown" in ladder.policy.causes:
            ladder.adopt(ladder.policy.replace(grace=self._shutdown_grace_period))
        ladder.signal("shutdown")

    def take_content(self) -> tuple[AsyncContentStream, list[Cleanup]]:
        """Take out what makes the events, with its cleanups, to run it elsewhere; see :mod:`.resumable`."""
        cleanups, self._cleanups = self._cleanups, []
        return self.body_iterator, cleanups

    def put_content(self, content: AsyncIterable[Event]) -> SSEResponse:
        """Send these events instead of its own, which have been taken out."""
        self.body_iterator = _as_async(content)
        self._sources = [self.body_iterator]
        return self

    # -- one request -------------------------------------------------------------------------

    def _policy_over(self, default: CancelPolicy) -> CancelPolicy:
        policy = super()._policy_over(default)
        if self._limit is ...:
            return policy
        return policy.replace(cleanup_timeout=NO_LIMIT if self._limit is None else self._limit or AT_ONCE)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._stream is not None:
            raise RuntimeError("an SSEResponse is for one request: its content has been sent")
        channel = channel_of(scope)
        try:
            # A HEAD would never be answered to its end (sysid/sse-starlette#218).
            if scope["type"] == "http" and scope["method"].upper() == "HEAD":
                await send(self._start())
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            elif channel is not None:
                await self._serve_on(channel, scope, send)
            else:  # the endpoint opted out, or a WebSocket is denied: nobody watches the client
                ladder = ladder_for(self._policy_over(CancelPolicy()).replace(causes=()), scope)
                await ladder.run(self._serve(ladder, scope, _deny(send) if scope["type"] == "websocket" else send))
        finally:
            await self.aclose()
        if channel is not None:
            channel.response = None  # whose background task would run again if the client has gone
        if self.background is not None:
            await self.background()

    async def _serve_on(self, channel: Channel, scope: Scope, send: Send) -> None:
        try:
            await self._serve(channel.ladder, scope, send)
        except BaseException as exc:
            channel.interrupted = True
            if self._stream is not None and self._stream.gave_up:
                channel.closing = True  # no more of this
            if isinstance(exc, anyio.get_cancelled_exc_class()) and channel.ladder.cause is None:
                await self._hear(channel.ladder)
            raise

    async def _hear(self, ladder: Ladder) -> None:
        """Cancelled from outside: by a middleware, perhaps, whose ``send`` has raised because the client has left.

        Then our ``receive`` is about to say so, and there may be somebody to be told. A server that stops says nothing.
        """
        if self._on_disconnect is not None or self.client_close_handler_callable is not None:
            heard = anyio.Event()
            ladder.listen(heard.set)
            with anyio.CancelScope(shield=True):
                await within(HEARING, heard.wait)

    async def _serve(self, ladder: Ladder, scope: Scope, send: Send) -> None:
        self._ladder = ladder
        self._stream = stream = EventStream(self, ladder, send)
        sender: Beside | None = None
        try:
            await send(self._start())
            with shutdown.draining(ladder, self):
                if self.data_sender_callable is not None:
                    sender = Beside(self.data_sender_callable, scope, ladder, done=partial(self._sender_done, stream))
                await stream.run()
        finally:
            self.active = False
            try:
                if sender is not None:
                    await sender.end(at_once=True)
            finally:
                stream.let_go()

    def _start(self) -> Message:
        return {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}

    def _sender_done(self, stream: EventStream, sender: Beside) -> None:
        if sender.error is not None:
            if self.active:
                stream.fail(sender.error)
            else:
                logger.error("data_sender_callable %r failed", self.data_sender_callable, exc_info=sender.error)

    async def aclose(self) -> None:
        info = self.info
        if info.cause is not None and not self._told_end:
            self._told_end = True
            if self._on_disconnect is not None:
                self._cleanups.append(partial(self._on_disconnect, info))
        if self._ladder is not None and self._ladder.left and not self._told_close:
            self._told_close = True
            if self.client_close_handler_callable is not None:
                self._cleanups.append(partial(self.client_close_handler_callable, {"type": "http.disconnect"}))
        await super().aclose()

    # -- what the stream asks for ------------------------------------------------------------

    def make_greeting(self) -> bytes:
        return b"" if self._retry is None else f"retry: {self._retry}{self.sep}{self.sep}".encode()

    def make_heartbeat(self) -> bytes:
        if self.ping_message_factory is not None:
            return encode(self.ping_message_factory(), self.sep)[0]
        return f": ping - {datetime.now(UTC)}{self.sep}{self.sep}".encode()

    def make_farewell(self, info: StreamInfo) -> bytes:
        farewell = self._farewell(info) if callable(self._farewell) else self._farewell
        return self.make_greeting() + (encode(farewell, self.sep)[0] if farewell is not None else b"")


def _deny(send: Send) -> Send:
    """Refuse a WebSocket with a response (ASGI extension "websocket.http.response")."""

    async def send_denial(message: Message) -> None:
        await send({**message, "type": "websocket." + message["type"]})

    return send_denial
