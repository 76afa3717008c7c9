"""The work of a stream that outlives its clients: pulled, appended to the log, heard of, ended (:mod:`.resumable`)."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Awaitable, Callable
from functools import partial
from time import monotonic
from typing import Protocol

import anyio

from ._closing import close, run_cleanups
from ._event_stream import MAX_BUSY
from .broker import Broker, BrokerUnavailable
from .broker.log import SEP
from .broker.streams import DONE, FAILED
from .events import encode, is_whole
from .exceptions import CancelError, RequestCancelled
from .ladder import RUN, Ladder
from .policy import HERE, CancelPolicy
from .protect import ladder_for
from .sse import SSEResponse, StreamInfo

logger = logging.getLogger("fastapi_cancel")

FINISHING = 5.0  # seconds for the last words, if the process ends
AGAIN = 0.1, 2.0  # seconds until an event that could not be appended is tried again: at first, at the most
_ID = re.compile(rb"(?:^|(?<=[\r\n]))id(?::[^\r\n]*)?(?:\r\n|\n|\r)")


class StreamLost(CancelError):
    """The stream is another run's, or gone."""


class Terms(Protocol):
    """On which a stream is produced: see :class:`~fastapi_cancel.resumable.Resumable`.

    ``is_closing``: the streams are to end. ``forget``: is told of a producer that has ended.
    """

    broker: Broker
    policy: CancelPolicy
    linger: float
    keep: float
    lease: float
    ahead: int
    patience: float

    @property
    def is_closing(self) -> bool: ...
    def forget(self, producer: Producer) -> None: ...


class Producer:
    """The work of a stream, in a task of its own under a ladder of its own.

    :ivar began: whether it has a stream, and a task
    :ivar ended: set when it has ended, its cleanups included
    """

    def __init__(self, terms: Terms, key: str, response: SSEResponse) -> None:
        self.key = key
        self.run = secrets.token_hex(8)
        self.began = False
        self.ended = anyio.Event()
        self._content, self._cleanups = response.take_content()
        self._terms = terms
        self._records = terms.broker.streams
        self._farewell = response.make_farewell
        self._since = monotonic()
        self._number = self._read_to = 0
        self._ladder: Ladder | None = None
        self._works = True
        self._progress = anyio.Event()
        self._departure = anyio.Event()

    def shut_down(self) -> None:
        if self._ladder is not None:  # else it will see for itself
            self._ladder.signal("shutdown")

    async def produce(self) -> None:
        """From the first event to the last word. Raises nothing: the others go on."""
        ladder = ladder_for(self._terms.policy, {"type": "stream", "path": self.key})
        try:
            state = await self._run(ladder)
            limit = FINISHING if self._terms.is_closing or state == FAILED else None
            with anyio.fail_after(limit, shield=True):
                words = self._last_words(ladder)
                await self._insist(lambda: self._records.finish(self.key, self.run, state, self._terms.keep, *words))
        except (StreamLost, BrokerUnavailable, TimeoutError) as exc:
            logger.warning("%s has ended, and cannot say so: %s", ladder.name(), exc or "the broker does not answer")
        except Exception:
            logger.exception("%s has ended, and cannot say so", ladder.name())
        finally:
            self._records.heed(self.run, None)
            self._terms.forget(self)
            self.ended.set()

    async def _run(self, ladder: Ladder) -> str:
        """The work, to the end of its cleanup. How it has ended."""
        try:
            await ladder.run(self._work(ladder))
        except RequestCancelled:
            pass
        except StreamLost:
            raise
        except Exception:
            logger.exception("%s failed", ladder.name())
            return FAILED
        return ladder.cause or DONE

    async def _work(self, ladder: Ladder) -> None:
        terms = self._terms
        self._ladder = ladder
        if terms.is_closing:
            ladder.signal("shutdown")
        self._records.heed(self.run, self._hear)
        ladder.spawn(partial(self._stay, ladder))
        try:
            async with terms.broker.runs.running(self.key, self.run, ladder.stop):
                await self._pump(ladder)
                ladder.complete()
        finally:
            try:
                await self.clean_up()
            finally:
                self._works = False
                self._departure.set()

    async def _pump(self, ladder: Ladder) -> None:
        turned = monotonic()
        wire = b""
        self._check(ladder)
        async for item in self._content:
            self._check(ladder)
            if item is not None:
                wire += encode(item, SEP)[0]
            if is_whole(wire):  # else these are bytes, and the rest of the event is to come
                while self._number - self._read_to >= self._terms.ahead:
                    await self._progress.wait()
                await self._put(_ID.sub(b"", wire))
                wire = b""
            if monotonic() - turned > MAX_BUSY:
                await ladder.turn()
                turned = monotonic()
            self._check(ladder)  # redis-py can lose a cancellation, and there is but one

    def _check(self, ladder: Ladder) -> None:
        """Between two events: after the signal, and its grace, there are no more."""
        if ladder.cause is not None and ladder.state != RUN:
            ladder.settle()
            raise RequestCancelled(ladder.cause)

    async def clean_up(self) -> None:
        """Close the content, and run the hooks that came with it."""
        await close(self._content)
        await run_cleanups(self._cleanups, self._terms.policy.cleanup_timeout, f"the stream {self.key!r}")

    def _last_words(self, ladder: Ladder) -> list[bytes]:
        if ladder.cause not in HERE:
            return []
        try:
            info = StreamInfo(ladder.cause, monotonic() - self._since, self._number, reason=ladder.reason)
            return [word for word in [self._farewell(info)] if word]
        except Exception:
            logger.exception("%s: the farewell failed", ladder.name())
            return []

    # -- to the log --------------------------------------------------------------------------

    async def _put(self, wire: bytes) -> None:
        await self._insist(lambda: self._records.produce(self.key, self.run, self._number + 1, wire))
        self._number += 1

    async def _insist(self, append: Callable[[], Awaitable[bool]]) -> None:
        """Append, however often the broker goes away meanwhile.

        :raises StreamLost: the stream is another run's
        :raises BrokerUnavailable: it was away for too long
        """
        wait, longest = AGAIN
        until = monotonic() + self._terms.patience
        while True:
            try:
                if await append():
                    return
                raise StreamLost("another run has taken the stream, or the broker has lost it")
            except BrokerUnavailable:
                if monotonic() > until:
                    raise
            await anyio.sleep(wait)
            wait = min(2 * wait, longest)

    # -- its readers -------------------------------------------------------------------------

    def _hear(self, at: int | None) -> None:
        if at is None:
            self._departure.set()
        else:
            self._read_to = max(self._read_to, at)
            self._progress.set()
            self._progress = anyio.Event()

    async def _stay(self, ladder: Ladder) -> None:
        """Be heard of, and end the work when nobody has read it for ``linger``."""
        terms = self._terms
        while self._works:  # the ladder cancels us when the work has ended; but redis-py can lose that
            wait = terms.lease / 3
            try:
                seen = await self._records.renew(self.key, self.run, terms.lease)
            except BrokerUnavailable:
                wait = terms.lease / 10
            else:
                if seen is None:
                    ladder.stop("lost")
                    return
                idle, read_to = seen
                self._hear(read_to)
                if idle is not None and idle >= terms.linger:
                    ladder.signal("disconnect")
                elif idle is not None:
                    wait = min(wait, terms.linger - idle)
            with anyio.move_on_after(wait):
                await self._departure.wait()
            self._departure = anyio.Event()
