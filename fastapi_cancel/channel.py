"""The channel: one request's ``receive`` and ``send``, and the one reader of the first.

Theory of operation
===================

**Reading.** One of two calls the server's ``receive``, never both at a time (``_reading``):

- the *application* (``_read``), when it asks for a message while the body is not complete and nobody is reading.
  The usual request body, which came with its headers, costs nothing extra this way;
- the *watcher* (``takes``), beside the work. It is started at the work's first wait that is not itself such a read,
  or, where the loss of the connection can be overheard (:mod:`._overheard`), when there is something to read.
  It keeps at most one message (``_ahead``) for the application, and stops while that is a piece of an unfinished
  body: back-pressure stays with the server. The work's next wait starts it again, or the end of a read by another
  task of the application. While the head or the last message of the response goes out it starts ``HANDING_ON`` late,
  and for the last one it pauses: that is seldom a wait, but in a middleware for a turn or two, the work is done, and
  uvicorn would wake it only to say that the response is complete.

Once the body is complete, only the watcher reads, so that a peek (``request.is_disconnected()`` asks
under a cancelled scope) never cancels the server's ``receive``: Hypercorn and Daphne deliver
http.disconnect once, and it must not be lost.

With ``Expect: 100-continue`` reading invites the body (uvicorn sends the 100 from ``receive``), so the
watcher waits until the application has asked for it, or has got a piece of its response through. Not only
its start: middleware may hold that back (``BaseHTTPMiddleware`` does, for some turns of the event loop).

**The input** moves one way: open → (body complete) → ended. It ends by http.disconnect or by an
``OSError``. Any other exception of ``receive`` belongs to whoever reads: FastAPI's body limit raises
its 413 there. If the watcher meets it, it is kept (``_error``) for the application's next read.

**The output** moves one way: nothing → started → completed. ``gone`` means that nothing more may be sent.

Races, and why each is harmless:

- *the client leaves before it is watched*: the watcher is told so when it starts, if the work still runs.
- *http.disconnect while the last message is going out*: uvicorn answers it as soon as the response is
  complete. ``_finishing`` is set before that message is handed on, so it is read as the end it is. But that
  ``send`` must return soon: Hypercorn's never does once an HTTP/2 stream has been reset that had no credit.
- *the client leaves while the application waits for the watcher's message*: it is woken first and
  signalled second, so the disconnect that it is handed is its one interruption.
- *the watcher is closed in the very turn that woke it, and begun anew in that turn*: a wake-up counts only if it is
  that of the future which is waited for now (``Reader.step``).
- *two tasks of the application read at once*: the second waits for the first one's news.
- *the application's own read is cancelled*: nothing was taken; the next reader goes on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Iterable
from functools import partial
from operator import itemgetter
from time import monotonic
from typing import Any

import anyio
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from ._overheard import Overheard, overhear
from ._parting import LOOKS, PARTING
from ._pieces import Pieces
from ._stepper import Reader
from .exceptions import ClientGone
from .ladder import Ladder, Timer
from .policy import CancelPolicy, Cause

HANDING_ON = 0.002  # seconds that the head or the end of a response may take before its client is watched
SECOND_LOOK = 0.05  # seconds from when a client would have stalled until we believe it


class Channel(Reader):
    """One request's ``receive`` and ``send``, as an ASGI 2.4 server gives them.

    :param receive: the server's, or that of the middleware around
    :param send: likewise
    :param policy: how the request ends early
    :ivar made: its ladder, as soon as there is one
    :ivar closing: the last message was handed on, though it may not have got through
    :ivar interrupted: completed or not, the response did not come to its own end
    :ivar response: what goes out, once the route's handler has returned it
    """

    # CPython keeps thirty attributes of an instance at hand, and is slow with all of them if there are more.
    __slots__ = (
        *("scope", "policy", "made", "response", "interrupted", "closing", "completed", "gone"),
        *("_server_send", "_asked", "_body_complete", "_ended", "_reading", "_ahead", "_error", "_news"),
        *("_finishing", "_flowing", "_start", "_pieces", "_closing"),
        *("_sending_since", "_doubted", "_stall_watched", "_overheard", "_handing_on", "_later", "__weakref__"),
    )

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, policy: CancelPolicy, response: Response | None
    ) -> None:
        self.scope = scope
        self.policy = policy
        self.server_receive = receive
        self._server_send = send
        self.made: Ladder | None = None
        self.response = response
        self.interrupted = self.closing = self.completed = self.gone = False
        self._asked = self._body_complete = self._ended = self._reading = False
        self._finishing = self._flowing = self._stall_watched = self._handing_on = False
        self._ahead: Message | None = None
        self._error: Exception | None = None
        self._news: anyio.Event | None = None
        self._start: Message | None = None
        self._pieces: Pieces | None = None
        self._closing: anyio.CancelScope | None = None
        self._sending_since: float | None = None
        self._doubted: float | None = None
        self._coming = self._future = None
        self._overheard: Overheard | None = None
        self._later: Timer | None = None

    @property
    def ladder(self) -> Ladder:
        """Is told that the client has left, and that the response is complete."""
        assert self.made is not None
        return self.made

    @property
    def cause(self) -> Cause | None:
        """Why the work ends early, if it does."""
        return self.made.cause if self.made is not None else None

    def take(self, ladder: Ladder) -> None:
        """Have this ladder, from now on."""
        self.made = ladder
        ladder.watch = self.watch

    def drive(self, work: Coroutine[Any, Any, None]) -> Awaitable[None]:
        """Run the work. Our own cancellation ends here; everything else passes."""
        return self.ladder.run(work)

    # -- reading -----------------------------------------------------------------------------

    async def receive(self) -> Message:
        """The application's ``receive``. After the client has left: http.disconnect, at once and always."""
        self._asked = True
        while True:
            if self._ahead is not None:
                message, self._ahead = self._ahead, None
                self._watch_again()
                return message
            if self._error is not None:
                raise self._error
            if self._ended:
                if self.made is not None:
                    self.made.settle()
                return {"type": "http.disconnect"}
            if self._body_complete and not self._reading:
                self._read_on()  # started eagerly, it may have its news already
            if self._reading:
                await self._wait_for_news()
            elif not self._body_complete:
                try:
                    message = await self._read()
                finally:
                    self._watch_again()
                if message["type"] != "http.disconnect":
                    return message

    def watch(self) -> bool:
        """Have the client watched, if that may be now.

        :return: False: it may not yet, ask again
        """
        if self._ended or self._error is not None or self._listens():
            return True
        if self._reading or (self._ahead is not None and not self._body_complete):
            return False
        if not self._asked and not self._flowing and _expects_continue(self.scope["headers"]):
            return False
        if self._handing_on and self._later is None:
            self._later = self._call_later(HANDING_ON, self._watch_after_all)
        if self._later is not None:
            return False
        self._read_on()
        return True

    def _watch_after_all(self) -> None:
        self._handing_on, self._later = False, None
        self._watch_again()

    def _call_later(self, seconds: float, function: Callable[[], object]) -> Timer | None:
        return self.ladder.call_later(seconds, function) if self.ladder.cheap_timers else None

    def _listens(self) -> bool:
        if self._overheard is None and (overheard := overhear(self.server_receive)) is not None:
            self._overheard = overheard
            overheard.add(self)
        return self._overheard is not None

    def connection_lost(self) -> None:
        """Overheard. What the server says of it is for whoever reads already."""
        if not (self._reading or self._ended):
            self._read_on()

    def _read_on(self) -> None:
        self._reading = True
        self._start_watcher()

    def _start_watcher(self) -> None:
        self.ladder.start_watcher(self)

    def _pause_watcher(self) -> None:
        self.ladder.pause_watcher()

    def _watch_again(self) -> None:
        self.ladder.watch_again()

    async def watch_on(self) -> None:
        try:
            while self.takes(await self.server_receive()):
                pass
        except Exception as exc:
            self.fails(exc)
        except BaseExceptionGroup as group:  # a task group of the middleware, perhaps cancelled at once
            self._error, rest = group.split(Exception)
            if rest is not None and rest.split(anyio.get_cancelled_exc_class())[1] is not None:
                raise
        finally:
            self.rests()

    def takes(self, message: Message) -> bool:
        self._heard(message)
        if self._ended:
            return False
        if self._body_complete:
            self._ahead = message
            return True
        if not message.get("body"):  # httpx's ASGITransport begins with an empty piece
            return True
        self._ahead = message
        if not self._listens():
            self.ladder.unwatched()
        return False

    def fails(self, exc: Exception) -> None:
        if _is_loss(exc):
            self._heard({"type": "http.disconnect"})
        else:
            self._error = exc

    def rests(self) -> None:
        self._reading = False
        if self._news is not None:
            self._tell(self._news)

    async def _read(self) -> Message:
        self._reading = True
        try:
            message = await self.server_receive()
        except Exception as exc:
            if not _is_loss(exc):
                raise
            message = {"type": "http.disconnect"}
        finally:
            self.rests()
        self._heard(message)
        return message

    def _heard(self, message: Message) -> None:
        if self._news is not None:
            self._tell(self._news)  # before any signal: see the races above
        if message["type"] == "http.disconnect":
            self._end()
        elif not message.get("more_body", False):
            self._body_complete = True

    def _tell(self, news: anyio.Event) -> None:
        news.set()
        self._news = None

    def _end(self) -> None:
        self._ended = True
        if self.completed:
            if self._closing is not None:
                self._closing.cancel()
            return
        if self._finishing:
            self._part(LOOKS)
        else:
            self._leave()

    def _part(self, looks: int) -> None:
        if looks:
            self.ladder.start_timer("parting", PARTING / LOOKS, partial(self._part, looks - 1))
        else:
            self._leave()

    def _leave(self) -> None:
        self.gone = True
        self.ladder.signal("disconnect")

    async def _wait_for_news(self) -> None:
        if self._news is None:
            self._news = anyio.Event()
        await self._news.wait()

    # -- sending -----------------------------------------------------------------------------

    async def send(self, message: Message) -> None:
        """The application's ``send``.

        :raises ClientGone: the client has left, or does not read
        """
        kind = message["type"]
        last = False
        if kind == "http.response.body":
            if message.get("more_body", False):
                pieces = self._pieces or self._begin_pieces()
                if pieces.too_fast(self.ladder.waits):
                    await self.ladder.turn()
                    if not self.gone:  # Hypercorn hears of it a turn later
                        await self.ladder.turn()
                last = pieces.is_last(message.get("body", b""))
            else:
                last = True
            if self._start is not None and self._start.get("trailers", False):
                last = False
        elif kind == "http.response.start":
            self._start = message if not self.gone else None
        else:
            last = kind == "http.response.pathsend" or (
                kind == "http.response.trailers" and not message.get("more_trailers", False)
            )
        if self.gone:
            self.ladder.settle()
            raise ClientGone("the client has left")
        if self.completed and self._ended:
            return  # all that was announced is out, and on Hypercorn's HTTP/2 this might never return
        if last:
            self._finishing = self.closing = True
            if self._reading:
                self._pause_watcher()  # uvicorn would wake it, to say that the response is complete
        self._handing_on = last or kind == "http.response.start"
        try:
            if self.completed:
                await self._send_until_left(message)
            elif (patience := (self.policy if self.made is None else self.made.policy).send_timeout) is None:
                await self._server_send(message)
            else:
                await self._send_within(patience, message)
        except OSError as exc:
            self._finishing = False
            self._end()
            self.ladder.settle()
            raise ClientGone("the client has left") from exc
        except BaseException:
            self._finishing = False
            raise
        finally:
            self._handing_on = False
            if self._later is not None:
                self._later.cancel()
                self._later = None
        if last:
            self.completed = True
            if self.made is not None:
                self.made.complete()
                if not message.get("more_body", False):
                    self.made.watch = None  # nobody will send again
        elif not self._flowing and kind == "http.response.body":
            self._flowing = True
            self._watch_again()  # it may read now, even if the body was never asked for

    @property
    def started(self) -> bool:
        """Whether the response has begun, so that no other can."""
        return self._start is not None

    def _begin_pieces(self) -> Pieces:
        self._pieces = Pieces(self._start.get("headers", ()) if self._start is not None else ())
        return self._pieces

    async def _send_until_left(self, message: Message) -> None:
        # All that was announced is out. On Hypercorn's HTTP/2 the end may wait for ever for a client that has left.
        with anyio.CancelScope() as self._closing:
            await self._server_send(message)
        self._closing = None

    async def _send_within(self, patience: float, message: Message) -> None:
        self._sending_since = monotonic()
        if not self._stall_watched:
            self._stall_watched = True
            self.ladder.start_timer("stall", patience, self._check_stall)
        try:
            await self._server_send(message)
        finally:
            self._sending_since = None

    def _check_stall(self) -> None:
        # One timer at a time, moved on when it fires: sends are many, stalls are few.
        self._stall_watched = False
        patience, since = self.ladder.policy.send_timeout, self._sending_since
        if since is None or patience is None:
            return
        left = since + patience - monotonic()
        if left <= 0 and self._doubted != since:  # perhaps it was the event loop that stood still
            self._doubted, left = since, SECOND_LOOK
        if left > 0:
            self._stall_watched = True
            self.ladder.start_timer("stall", left, self._check_stall)
        else:
            self.gone = self.ladder.signal("stalled") or self.gone

    def close(self) -> None:
        """The work has ended: whoever still holds on to ``receive`` is told so."""
        self._ended = True
        self._ahead = self._error = None
        if self._overheard is not None:
            self._overheard.remove(self)


_name = itemgetter(0)


def _expects_continue(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    # Asked at the first wait of every request: no loop in Python for those that expect nothing.
    return b"expect" in map(_name, headers) and any(
        name == b"expect" and value.lower() == b"100-continue" for name, value in headers
    )


def _is_loss(exc: Exception) -> bool:
    """Whether ``receive`` says by this that the client is gone. BaseHTTPMiddleware receives inside a task group."""
    return isinstance(exc, OSError) or (isinstance(exc, ExceptionGroup) and exc.split(OSError)[1] is None)
