"""Server-sent events: ``return SSEResponse(feed(), heartbeat=15)``.

Theory of operation
===================

One task does nearly everything: the task of the request pulls the content, encodes it and sends it. It pulls
by hand (:mod:`._ahead`), so it knows without waiting whether another event is there. While events keep coming
they are gathered, and go out together: bounded by bytes and by time.

While the task waits for the content, somebody else must be able to send: the rest of a burst, a heartbeat, the
farewell. Each is sent *aside*, by a helper of the ladder. The task cannot do it: it waits inside the content's
``__anext__``, with whatever time limits and cancel scopes the content has around it, and a ``send`` that blocks
there would be hit by those. The task itself sends only between two events, once nothing is being sent aside.

====== =================================================== ==========================================
flag   meaning                                             who may send
====== =================================================== ==========================================
pulls  the task waits for the content                      one helper at a time (``_aside``)
--     the task has an event, or sends                     the task, after ``_aside`` is through
====== =================================================== ==========================================

The ends of a stream:

- *the content ends, or fails*: what was gathered goes out, then the last message or the error.
- *the client leaves, or does not read*: nothing more is sent. The content is interrupted where it waits, or
  closed where it yields.
- *shutdown, stop, timeout*: while the grace runs, everything goes on. Then the farewell is sent, aside if the
  task waits and by the task otherwise; the content is interrupted or closed; the last message is sent.

Races, and why each is harmless:

- *a heartbeat is due while the task has an event*: it is not idle, so there is none.
- *the content goes on while a heartbeat is being sent*: the task waits for it before it sends, between events.
- *the client leaves during a heartbeat*: the channel hears it, the ladder interrupts the task; the helper ends.
- *the farewell is due while a burst goes out aside*: the helper is busy, so the task sends it while unwinding.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from time import monotonic
from types import EllipsisType
from typing import Any, NamedTuple

import anyio
from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette._utils import is_async_callable
from starlette.background import BackgroundTask
from starlette.responses import AsyncContentStream
from starlette.types import Message, Receive, Scope, Send

from . import shutdown
from ._ahead import Ahead
from ._beside import Beside
from ._closing import Cleanup
from ._heart import Pulse, heart_for
from .channel import Channel
from .events import check_retry, encode, is_whole
from .exceptions import ClientGone, InvalidEvent, RequestCancelled
from .ladder import RUN, Ladder
from .policy import CancelPolicy, Cause, check_seconds
from .protect import channel_of, ladder_for
from .responses import CancellableStreamingResponse, _as_async

logger = logging.getLogger("fastapi_cancel")

# Events that are ready go out together, up to:
MAX_BYTES = 65536
MAX_DELAY = 0.002  # seconds between the first of them and the sending
MAX_BUSY = 0.05  # seconds without a turn of the event loop (C17)
QUICK = 0.001  # seconds in which the content of a burst yields again
PARTING = 1.0  # seconds that the farewell may take
IDLE = 1.0  # seconds until we look again at a stream whose heartbeats were switched off meanwhile
AT_ONCE, NO_LIMIT = 0.001, 1e9  # seconds: what sse-starlette's cleanup_timeout of 0 and None are to us

shutdown.status = AppStatus

HERE: frozenset[Cause] = frozenset({"stop", "timeout", "shutdown"})
"""The causes after which the client is still there."""


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """How an event stream ended.

    :ivar cause: why it ended early; ``None``: it did not
    :ivar seconds: how long it was open
    :ivar events: how many events were sent; heartbeats and the farewell do not count
    :ivar bytes: how many bytes were sent, heartbeats and farewell included
    :ivar last_id: the id of the last event sent that had one
    """

    cause: Cause | None
    seconds: float
    events: int
    bytes: int
    last_id: str | None


Event = Any
"""What :func:`~fastapi_cancel.events.encode` takes."""


class SSEResponse(CancellableStreamingResponse, EventSourceResponse):
    """Server-sent events, ended when the client leaves, and cleaned up.

    It is an ``EventSourceResponse`` of sse-starlette by type and by argument. ::

        @router.get("/events")
        async def events(last: LastEventID):
            return SSEResponse(feed(after=last), heartbeat=15)

    :param content: a sync or async iterable of events: all that :func:`~fastapi_cancel.events.encode` takes.
        ``None`` is skipped: nothing is sent for it. Events that are ready together go out together: what a
        generator does after its ``yield`` may come before the sending, by two milliseconds at the most
    :param heartbeat: seconds without anything sent, after which a comment is; ``None``: never. Default: 15
    :param retry: milliseconds that the client is to wait before it comes back; sent first, and with the farewell
    :param farewell: the last event of a stream that the server ends early (shutdown, stop, timeout): an event,
        or a function that makes one of the :class:`StreamInfo`
    :param on_disconnect: an async callable, run with the :class:`StreamInfo` once the stream has ended early,
        for whatever cause
    :param cleanup: async callables without arguments, run once on every path; see :meth:`add_cleanup`
    :param policy: how the stream ends early; on a ``CancellableRoute``: instead of the route's
    :param send_timeout: seconds that one ``send`` may wait for a client that does not read (cause ``stalled``)
    :param ping: sse-starlette's name for ``heartbeat``, where 0 means never
    :param sep: the line ending: CR LF, CR or LF; default CR LF
    :param ping_message_factory: makes the heartbeat, instead of a comment
    :param data_sender_callable: an async callable that runs beside the stream, and ends with it
    :param client_close_handler_callable: an async callable, run with the ASGI message when the client has left
    :param shutdown_event: set when the server is told to stop
    :param shutdown_grace_period: seconds that the content may go on after that; 0: the grace of the policy
    :param cleanup_timeout: seconds that a cleanup may take, ``None``: no limit; instead of the policy's
    :raises TypeError: an argument is of the wrong type; the message names it
    :raises ValueError: an argument is out of range; the message names it
    """

    body_iterator: AsyncContentStream
    _send: Send
    _began: float | None = None
    _sent_at = 0.0
    _events = _bytes = 0
    _last_id: str | None = None
    _gathered_id: str | None = None
    _tail = b"\n\n"
    _pulls = _busy = _said = _told = False
    _channel: Channel | None = None
    _through: anyio.Event | None = None
    _pulse: Pulse | None = None
    _error: Exception | None = None
    _fault: InvalidEvent | None = None

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
        data_sender_callable: Callable[[], Awaitable[None]] | None = None,
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
            shutdown_event=shutdown_event,
            shutdown_grace_period=shutdown_grace_period,
        )
        del self.headers["connection"]  # HTTP/1.1 needs none, HTTP/2 forbids it (RFC 9113, section 8.2.2)
        self._sources = [self.body_iterator]
        self._data_sender = data_sender_callable
        self._client_close_handler = client_close_handler_callable
        self._grace_on_shutdown = shutdown_grace_period
        self._limit = cleanup_timeout
        self._retry = retry
        self._farewell = farewell
        self._on_disconnect = on_disconnect
        self._gathered: list[bytes] = []

    @property
    def info(self) -> StreamInfo:
        """What has been sent until now."""
        return StreamInfo(
            self._ladder.cause if self._ladder is not None else None,
            monotonic() - self._began if self._began is not None else 0.0,
            self._events,
            self._bytes,
            self._last_id,
        )

    def shut_down(self) -> None:
        """The server is told to stop: farewell after the grace, then the cancellation."""
        ladder = self._running
        if self._shutdown_event is not None:
            self._shutdown_event.set()
        if self._grace_on_shutdown and ladder.cause is None and "shutdown" in ladder.policy.causes:
            ladder.adopt(ladder.policy.replace(grace=self._grace_on_shutdown))
        ladder.signal("shutdown")

    # -- one request -------------------------------------------------------------------------

    def _policy_over(self, default: CancelPolicy) -> CancelPolicy:
        policy = super()._policy_over(default)
        if self._limit is ...:
            return policy
        return policy.replace(cleanup_timeout=NO_LIMIT if self._limit is None else self._limit or AT_ONCE)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if (
                scope["type"] == "http" and scope["method"].upper() == "HEAD"
            ):  # it would never end (sysid/sse-starlette#218)
                await send(self._start())
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            elif (channel := channel_of(scope)) is not None:
                self._channel = channel
                await self._serve(channel.ladder, scope, send)
            else:  # the endpoint opted out, or a WebSocket is denied: nobody watches the client
                ladder = ladder_for(self._policy_over(CancelPolicy()).replace(causes=()), scope)
                await ladder.run(self._serve(ladder, scope, _deny(send) if scope["type"] == "websocket" else send))
        finally:
            await self.aclose()
        if self.background is not None:
            await self.background()

    async def _serve(self, ladder: Ladder, scope: Scope, send: Send) -> None:
        self._ladder = ladder
        self._send = send
        self._began = self._sent_at = monotonic()
        ladder.parting = self._part_aside
        sender: Beside | None = None
        try:
            await send(self._start())
            with shutdown.draining(ladder, self):
                if self._data_sender is not None:
                    sender = Beside(self._data_sender, scope, ladder, done=self._sender_done)
                await self._stream(ladder)
        finally:
            self.active = False
            if self._pulse is not None:
                self._pulse.stop()
            if sender is not None:
                await sender.end()

    def _start(self) -> Message:
        return {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}

    def _sender_done(self, sender: Beside) -> None:
        if sender.error is not None:
            if self.active:
                self._break(sender.error)
            else:
                logger.error("data_sender_callable %r failed", self._data_sender, exc_info=sender.error)

    def _break(self, error: Exception) -> None:
        """Have the stream end with an error that a helper met."""
        self._error = error
        self._running.signal("stop")

    async def aclose(self) -> None:
        info = self.info
        if info.cause is not None and not self._told:
            self._told = True
            if self._on_disconnect is not None:
                self._cleanups.append(partial(self._on_disconnect, info))
            if self._client_close_handler is not None and info.cause == "disconnect":
                self._cleanups.append(partial(self._client_close_handler, {"type": "http.disconnect"}))
        await super().aclose()

    # -- the stream --------------------------------------------------------------------------

    async def _stream(self, ladder: Ladder) -> None:
        try:
            if self._retry is not None:
                await self._put(self._retry_block())
            await self._pump(ladder)
        except (RequestCancelled, anyio.get_cancelled_exc_class()):
            if self._error is not None:
                raise self._error from None
            if ladder.cause in HERE:
                await self._part()
            raise
        except Exception as exc:
            with suppress(ClientGone):
                await self._put()
            if exc is not self._fault:
                raise
            logger.error("%s: the stream ends here: %s", ladder.name(), exc, exc_info=exc)
        if (words := self._last_words()) or self._gathered:
            await self._put(words)  # not with the last message: who leaves during that has got everything
        await self._put(more_body=False)

    async def _pump(self, ladder: Ladder) -> None:
        """Pull, encode, gather and send, until the content ends."""
        items = Ahead(self.body_iterator)
        gathered, sep = self._gathered, self.sep
        size = 0
        last = flushed = turned = monotonic()
        while True:
            if ladder.cause is not None or self._error is not None:
                self._check()
            if waited := not items.poll():
                await self._wait(items)
                if ladder.cause is not None or self._error is not None:
                    self._check()
            if items.ended:
                return
            now = monotonic()
            if items.item is not None:
                try:
                    event, id = encode(items.item, sep)
                except InvalidEvent as fault:
                    self._fault = fault
                    await self._put()
                    items.fail(fault)
                    continue
                gathered.append(event)
                size += len(event)
                if id is not None:
                    self._gathered_id = id
            if waited:
                turned = now
            # Alone after a wait, or after slow work of the content: at once. In a burst: together.
            if waited or now - last > QUICK or now - flushed > MAX_DELAY or size > MAX_BYTES:
                if gathered:
                    await self._put()
                    size = 0
                if monotonic() - turned > MAX_BUSY:
                    await ladder.turn()
                    turned = monotonic()
                now = flushed = monotonic()
            last = now

    async def _wait(self, items: Ahead) -> None:
        """Wait for the content; meanwhile helpers may send."""
        if self._gathered:
            self._send_aside(self._take())
        if self._pulse is None and self.ping_interval:
            self._pulse = Pulse(self._look)
            heart_for(self._running).add(self._pulse, self._sent_at + self.ping_interval)
        self._pulls = True
        try:
            await items.wait()
        finally:
            self._pulls = False

    def _check(self) -> None:
        """The chunk boundary: a client that is still there gets the grace, any other nothing more."""
        ladder = self._running
        if self._error is not None:
            raise self._error
        assert ladder.cause is not None
        if ladder.cause not in HERE or ladder.state != RUN:
            ladder.settle()
            raise RequestCancelled(ladder.cause)

    # -- sending -----------------------------------------------------------------------------

    def _take(self) -> _Burst:
        """What was gathered."""
        burst = _Burst(b"".join(self._gathered), len(self._gathered), self._gathered_id)
        self._gathered.clear()
        return burst

    async def _put(self, tail: bytes = b"", more_body: bool = True) -> None:
        """Send what was gathered, and ``tail``, once nothing is being sent aside."""
        while self._busy:
            self._through = anyio.Event()
            await self._through.wait()
        burst = self._take()
        await self._send_burst(burst._replace(body=burst.body + tail) if tail else burst, more_body)

    async def _send_burst(self, burst: _Burst, more_body: bool = True) -> None:
        try:
            await self._send({"type": "http.response.body", "body": burst.body, "more_body": more_body})
        except ClientGone:
            if "disconnect" in self._running.policy.causes:
                raise
            return  # it is to run to its end for nobody
        self._sent_at = monotonic()
        self._bytes += len(burst.body)
        self._events += burst.events
        if burst.last_id is not None:
            self._last_id = burst.last_id
        self._tail = (self._tail + burst.body[-4:])[-4:]

    def _send_aside(self, burst: _Burst) -> None:
        self._busy = True
        self._running.spawn(partial(self._aside, burst))

    async def _aside(self, burst: _Burst) -> None:
        try:
            await self._send_burst(burst)
        except ClientGone:
            pass  # the ladder knows
        except Exception as exc:
            self._break(exc)
        finally:
            self._busy = False
            if self._through is not None:
                self._through.set()

    # -- what is sent beside the events ------------------------------------------------------

    def _look(self, now: float) -> float:
        """Send a heartbeat if one is due. When the next one may be."""
        due = self._sent_at + (self.ping_interval or IDLE)
        if due > now:
            return due
        if self.ping_interval and self._pulls and not self._busy and is_whole(self._tail):
            try:
                self._send_aside(_Burst(self._heartbeat()))
            except Exception as exc:
                self._break(exc)
        return now + (self.ping_interval or IDLE)

    def _heartbeat(self) -> bytes:
        if self.ping_message_factory is not None:
            return encode(self.ping_message_factory(), self.sep)[0]
        return f": ping - {datetime.now(UTC)}{self.sep}{self.sep}".encode()

    def _retry_block(self) -> bytes:
        return f"retry: {self._retry}{self.sep}{self.sep}".encode()

    def _last_words(self) -> bytes:
        """The farewell, if it is time for one and it has not been said."""
        if self._said or not is_whole(self._tail) or self._running.cause not in HERE:
            return b""
        self._said = True
        farewell = self._farewell
        try:
            if callable(farewell):
                farewell = farewell(self.info)
            said = encode(farewell, self.sep)[0] if farewell is not None else b""
        except Exception:
            logger.exception("%s: farewell %r failed", self._running.name(), self._farewell)
            said = b""
        return self._retry_block() + said if self._retry is not None else said

    def _part_aside(self) -> None:
        """The grace is over: say the farewell now if the content waits."""
        if self._pulls and not self._busy and (words := self._last_words()):
            self._send_aside(_Burst(words))

    async def _part(self) -> None:
        """Interrupted, with a client that is still there: end the response as it should."""
        with anyio.move_on_after(PARTING, shield=True) as scope:
            if (words := self._last_words()) or self._gathered:
                await self._put(words)
        await self._close_content()
        if not scope.cancelled_caught:
            with anyio.move_on_after(PARTING, shield=True):
                await self._put(more_body=False)
        elif self._channel is not None:
            self._channel.closing = True  # it does not read: no more of this

    @property
    def _running(self) -> Ladder:
        assert self._ladder is not None
        return self._ladder


class _Burst(NamedTuple):
    """Events that go out together."""

    body: bytes
    events: int = 0
    last_id: str | None = None


def _deny(send: Send) -> Send:
    """Refuse a WebSocket with a response (ASGI extension "websocket.http.response")."""

    async def send_denial(message: Message) -> None:
        await send({**message, "type": "websocket." + message["type"]})

    return send_denial
