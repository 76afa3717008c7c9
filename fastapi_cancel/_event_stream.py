"""One event stream on its way out: pulled, encoded, gathered, sent, kept alive, ended.

Theory of operation
===================

One task does nearly everything: the task of the request pulls the content, encodes it and sends it. It pulls
by hand (:mod:`._ahead`), so it knows without waiting whether another event is there. While events keep coming
they are gathered, and go out together: bounded by bytes and by time.

While the task waits for the content, somebody else must be able to send: the rest of a burst, a heartbeat, the
farewell. Each is sent *aside*, by a helper of the ladder. The task cannot do it: it waits inside the content's
``__anext__``, with whatever time limits and cancel scopes the content has around it, and a ``send`` that blocks
there would be hit by those. The task itself sends only between two events, once nothing is being sent aside.

A content that learns of events past its task (:mod:`._feed`) offers them to the stream. While the task waits, they are
sent aside as well, by whoever offers them, and the task sleeps on.

======== ================================================== ==========================================
flag     meaning                                            who may send
======== ================================================== ==========================================
_pulls   the task waits for the content                     one helper, or offer, at a time
--       the task has an event, or sends                    the task, after the helper is through
_busy    a helper, or an offer, sends                       that one, to its end
======== ================================================== ==========================================

The ends of a stream:

- *the content ends, or fails*: what was gathered goes out, then the last message or the error.
- *the client leaves, or does not read*: nothing more is sent. The content is interrupted where it waits, or
  closed where it yields.
- *shutdown, stop, timeout*: while the grace runs, everything goes on. Then the farewell is sent, aside if the
  task waits and by the task otherwise; the content is interrupted or closed; the last message is sent.

Races, and why each is harmless:

- *a heartbeat is due while the task has an event*: the stream is not idle, so there is none.
- *the content goes on while a helper sends*: the task waits for it before it sends, between two events. If the
  content makes it wait again before it has sent, the helper takes over what was gathered.
- *the client leaves while a helper sends*: the channel hears it, the ladder interrupts the task; the helper ends.
- *the farewell is due while a helper sends*: the task says it while unwinding.
- *events are offered while a helper sends, or once there is a cause*: not taken. The task pulls them.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterable, Awaitable, Coroutine, Generator
from contextlib import suppress
from contextvars import Context, copy_context
from dataclasses import dataclass
from functools import partial
from time import monotonic
from types import coroutine
from typing import Any, Protocol

import anyio
from starlette.types import Message, Send

from ._ahead import Ahead
from ._feed import MAX_BYTES, Burst, Feed
from ._heart import Pulse, current_heart
from ._native import NativeLadder
from ._parting import parting
from .events import encode, is_whole
from .exceptions import ClientGone, InvalidEvent, RequestCancelled, Stalled
from .ladder import RUN, Ladder
from .policy import HERE, Cause

logger = logging.getLogger("fastapi_cancel")

# Events that are ready go out together, up to MAX_BYTES and:
MAX_DELAY = 0.002  # seconds between the first of them and the sending
MAX_BUSY = 0.05  # seconds without a turn of the event loop (C17)
QUICK = 0.001  # seconds in which the content of a burst yields again
IDLE = 1.0  # seconds until we look again at a stream whose heartbeats were switched off meanwhile


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """How an event stream ended.

    :ivar cause: why it ended early; ``None``: it did not
    :ivar seconds: how long it was open
    :ivar events: how many events were sent; heartbeats and the farewell do not count
    :ivar bytes: how many bytes were sent, heartbeats and farewell included
    :ivar last_id: the id of the last event sent that had one
    :ivar reason: what whoever stopped it says about that
    """

    cause: Cause | None
    seconds: float = 0.0
    events: int = 0
    bytes: int = 0
    last_id: str | None = None
    reason: str = ""


class Source(Protocol):
    """Whose events these are. ``ping_interval``: seconds, 0 for never; ``batch``: those that are ready go together."""

    sep: str
    batch: bool

    @property
    def body_iterator(self) -> AsyncIterable[object]: ...
    @property
    def ping_interval(self) -> float: ...
    def make_greeting(self) -> bytes: ...
    def make_heartbeat(self) -> bytes: ...
    def make_farewell(self, info: StreamInfo) -> bytes: ...
    async def close_content(self) -> None: ...


class EventStream:
    """Sends the events of ``source``, to the last message.

    :ivar gave_up: the client did not read its farewell
    """

    __slots__ = (
        "_began",
        "_busy",
        "_bytes",
        "_context",
        "_error",
        "_events",
        "_gathered",
        "_gathered_id",
        "_ladder",
        "_last_id",
        "_pulls",
        "_pulse",
        "_said",
        "_send",
        "_sent_at",
        "_source",
        "_tail",
        "_through",
        "gave_up",
    )

    def __init__(self, source: Source, ladder: Ladder, send: Send) -> None:
        self._source = source
        self._ladder = ladder
        self._send = send
        self._began = self._sent_at = monotonic()
        self._events = self._bytes = 0
        self._last_id: str | None = None
        self._gathered: list[bytes] = []
        self._gathered_id: str | None = None
        self._tail = b"\n\n"
        self._pulls = self._busy = self._said = self.gave_up = False
        self._through: anyio.Event | None = None
        self._pulse: Pulse | None = None
        self._error: Exception | None = None
        self._context = copy_context()  # what is made aside is made for this request, whoever asks for it
        ladder.parting = self._part_here

    @property
    def info(self) -> StreamInfo:
        """What has been sent until now."""
        ladder = self._ladder
        return StreamInfo(
            ladder.cause, monotonic() - self._began, self._events, self._bytes, self._last_id, ladder.reason
        )

    async def run(self) -> None:
        """Send it all.

        :raises RequestCancelled: it ended early, at a chunk boundary
        """
        try:
            if greeting := self._source.make_greeting():
                await self._put(greeting)
            try:
                await self._pump()
            except InvalidEvent as fault:
                logger.error("%s: the stream ends here: %s", self._ladder.name(), fault, exc_info=fault)
            except Stalled:
                self._ladder.signal("stalled", at_once=True)
                self._check()
            except (RequestCancelled, ClientGone):
                raise
            except Exception:
                await self._flush()
                raise
            if (words := self._last_words()) or self._gathered:
                await self._put(words)  # not with the last message: who leaves during that has got everything
            await self._put(more_body=False)
        except (RequestCancelled, anyio.get_cancelled_exc_class()):
            if self._error is None and self._ladder.cause in HERE:
                await self._part()
            if self._error is not None and self._ladder.cause is not None and not self._ladder.others_cancel():
                error, self._error = self._error, None
                raise error from None
            raise
        finally:
            if self._pulse is not None:
                self._pulse.stop()
            if self._error is not None:
                logger.error("%s: something beside the stream failed", self._ladder.name(), exc_info=self._error)

    def let_go(self) -> None:
        """It is over: only ``info`` is left. The source, and a channel that holds it, are to be freed at once."""
        del self._source
        self._send = _nowhere  # a helper may still be on its way

    def fail(self, error: Exception) -> None:
        """Have the stream end at once with an error that somebody beside it met."""
        self._error = error
        self._ladder.signal("stop", at_once=True)

    # -- the task of the request -------------------------------------------------------------

    async def _pump(self) -> None:
        """Pull, encode, gather and send, until the content ends."""
        ladder, gathered, sep = self._ladder, self._gathered, self._source.sep
        items = Ahead(content := self._source.body_iterator)
        if isinstance(content, Feed) and self._source.batch and isinstance(ladder, NativeLadder):
            content.follow(partial(self._offer, ladder))
        quick = QUICK if self._source.batch else -1.0  # nothing is as quick
        size = 0
        last = flushed = turned = monotonic()
        while True:
            if ladder.cause is not None:
                self._check()
            if waited := not items.poll():
                await self._wait(items)
                if ladder.cause is not None:
                    self._check()
            if items.ended:
                return
            now = monotonic()
            if items.item is not None:
                try:
                    event, id = encode(items.item, sep)
                except InvalidEvent as fault:
                    await self._flush()
                    items.fail(fault)
                    continue
                gathered.append(event)
                size += len(event)
                if id is not None:
                    self._gathered_id = id
            # Alone after a wait, or after slow work of the content: at once. In a burst: together.
            if waited or now - last > quick or now - flushed > MAX_DELAY or size > MAX_BYTES:
                if gathered:
                    await self._put()
                    size = 0
                if waited:
                    turned = now
                elif monotonic() - turned > MAX_BUSY:
                    await ladder.turn()
                    turned = monotonic()
                now = flushed = monotonic()
            last = now

    async def _wait(self, items: Ahead) -> None:
        """Wait for the content; meanwhile helpers may send."""
        if self._gathered and not self._busy:
            self._send_aside(self._take())
        if self._pulse is None and (interval := self._source.ping_interval):
            self._pulse = current_heart().add(self._look_here, self._sent_at + interval)
        self._pulls = True
        try:
            await items.wait()
        finally:
            self._pulls = False

    def _check(self) -> None:
        """The chunk boundary: a client that is still there gets the grace, any other nothing more."""
        ladder = self._ladder
        assert ladder.cause is not None
        if ladder.state != RUN or ladder.cause not in HERE:
            ladder.settle()
            raise RequestCancelled(ladder.cause)

    def _take(self) -> Burst:
        """What was gathered."""
        burst = b"".join(self._gathered), len(self._gathered), self._gathered_id
        self._gathered.clear()
        self._gathered_id = None
        return burst

    async def _put(self, tail: bytes = b"", more_body: bool = True) -> None:
        """Send what was gathered, and ``tail``, once nothing is being sent aside."""
        while self._busy:
            self._through = anyio.Event()
            await self._through.wait()
        body, events, last_id = self._take()
        await self._send_burst((body + tail, events, last_id), more_body)

    async def _flush(self) -> None:
        """Before an error of the content comes out, what it yielded; but no ending is to hide the error."""
        try:
            await self._put()
        except ClientGone:
            pass
        except BaseException:
            if self._ladder.cause is None or self._ladder.others_cancel():  # somebody else's goes first (C14)
                raise

    async def _send_burst(self, burst: Burst, more_body: bool = True) -> None:
        body, events, last_id = burst
        try:
            await self._send({"type": "http.response.body", "body": body, "more_body": more_body})
        except ClientGone:
            if "disconnect" in self._ladder.policy.causes:
                raise
            return  # it is to run to its end for nobody
        self._sent_at = monotonic()
        self._bytes += len(body)
        self._events += events
        if last_id is not None:
            self._last_id = last_id
        self._tail = (self._tail + body[-4:])[-4:]

    async def _part(self) -> None:
        """Interrupted, with a client that is perhaps still there: end the response as it should."""
        with suppress(ClientGone):
            with parting() as scope:
                if (words := self._last_words()) or self._gathered:
                    await self._put(words)
            self.gave_up = scope.cancelled_caught
            try:
                await self._source.close_content()
            finally:
                if not self.gave_up:
                    with parting():
                        await self._put(more_body=False)

    # -- aside -------------------------------------------------------------------------------

    def _send_aside(self, burst: Burst) -> None:
        self._busy = True  # the helper may begin later
        self._ladder.spawn(partial(self._aside, burst))

    async def _aside(self, burst: Burst) -> None:
        await self._see_through(self._send_burst(burst))

    async def _see_through(self, sending: Awaitable[None]) -> None:
        self._busy = True
        try:
            await sending
            while self._pulls and self._gathered:  # by a task that came past while we were busy
                await self._send_burst(self._take())
        except ClientGone:
            pass  # the ladder knows
        except Exception as exc:
            self.fail(exc)
        finally:
            self._busy = False
            if self._through is not None:
                self._through.set()

    def _offer(self, ladder: NativeLadder, burst: Burst) -> Awaitable[None] | bool:
        """Send events past the task, if that waits and nobody else sends."""
        if not self._pulls or self._busy or ladder.cause is not None:
            return False
        self._busy = True
        ladder.waits += 1  # since the last of these, the event loop has turned
        steps = self._send_burst(burst)
        try:
            waits_for = self._context.run(steps.send, None)
        except (StopIteration, ClientGone):
            pass  # sent; or the ladder knows
        except Exception as exc:
            self.fail(exc)
        except anyio.get_cancelled_exc_class():
            self._cut_short(ladder)
        else:
            ladder.enlist()
            return self._finish(ladder, _rest_of(self._context, steps, waits_for))  # is busy again at once
        finally:
            self._busy = False
        return True

    async def _finish(self, ladder: NativeLadder, sending: Awaitable[None]) -> None:
        try:
            await self._see_through(sending)
        except anyio.get_cancelled_exc_class():
            self._cut_short(ladder)
            raise

    def _cut_short(self, ladder: NativeLadder) -> None:
        """Somebody has cancelled a send, and not the stream: nobody knows what of it is out."""
        if not ladder.others_cancel():
            self.fail(RuntimeError("a send of this stream was cancelled"))

    def _look_here(self, now: float) -> float:
        return self._context.copy().run(self._look, now)

    def _part_here(self) -> None:
        self._context.copy().run(self._part_aside)

    def _look(self, now: float) -> float:
        """Send a heartbeat if one is due. When the next one may be."""
        interval = self._source.ping_interval
        due = self._sent_at + (interval or IDLE)
        if due > now:
            return due
        if interval and self._pulls and not self._busy and not self._said and is_whole(self._tail):
            try:
                self._send_aside((self._source.make_heartbeat(), 0, None))
            except Exception as exc:
                self.fail(exc)
        return now + (interval or IDLE)

    def _part_aside(self) -> None:
        """The grace is over: say the farewell now if the content waits."""
        if self._pulls and not self._busy and (words := self._last_words()):
            self._send_aside((words, 0, None))

    def _last_words(self) -> bytes:
        """The farewell, if it is time for one and it has not been said."""
        ladder = self._ladder
        if self._said or self._error is not None or ladder.cause not in HERE or not is_whole(self._tail):
            return b""
        self._said = True
        try:
            return self._source.make_farewell(self.info)
        except Exception:
            logger.exception("%s: the farewell failed", ladder.name())
            return b""


@coroutine
def _rest_of(context: Context, steps: Coroutine[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
    """Go on, in ``context``, with what has begun to wait."""
    with suppress(StopIteration):
        while True:
            try:
                value = yield waits_for
            except BaseException as exc:
                waits_for = context.run(steps.throw, exc)
            else:
                waits_for = context.run(steps.send, value)


async def _nowhere(message: Message) -> None:
    raise ClientGone("the stream has ended")
