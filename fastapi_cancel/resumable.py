"""Streams that outlive a connection: the work runs apart from its clients, who come, go and come back anywhere.

::

    broker = connect("redis://localhost")
    streams = Resumable(broker, linger=30)
    app = FastAPI(lifespan=lifespan(broker, streams))

    @router.get("/chats/{chat}/answer")
    async def answer(chat: str, last: LastEventID):
        return await streams.start(f"chats/{chat}", SSEResponse(generate(chat), heartbeat=15), after=last)

A *producer* pulls the content into the log of a channel (:mod:`.broker`), in the process where it was started. The
responses read the log, wherever they are. The last event of a log is a comment that says how the stream ended.

Who is told what, and by whom:

- *the producer* is told of its readers: how far the quickest is, and when the last one has left. It asks again three
  times in its lease, so that a lost message or a dead reader costs time only.
- *the readers* ask three times in the same lease whether the producer is heard of. One that is not, twice in a row,
  is dead: a Redis that was away must not look like that.
- *whoever stops the key* reaches the producer, as any other run (:mod:`.remote`).

A producer whose stream was taken by another run, because it was replaced or had not been heard of for its lease,
cannot append any more: each event is appended under the run's name and number, once however often it is tried.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from time import monotonic
from types import TracebackType
from typing import Any, Literal, get_args

import anyio
from anyio.abc import TaskGroup
from fastapi import HTTPException
from pydantic_core import to_json
from starlette.responses import Response

from ._closing import close, run_cleanups
from .broker import Broker, BrokerUnavailable, Event, Gap, Subscription
from .broker.base import check_count, check_name
from .broker.log import SEP, Place
from .broker.streams import LIVE, Found
from .events import encode
from .exceptions import CancelError
from .ladder import Ladder
from .policy import HERE, CancelPolicy, check_seconds
from .protect import ladder_for
from .sse import SSEResponse, StreamInfo

logger = logging.getLogger("fastapi_cancel")

Live = Literal["join", "replace", "refuse"]
DONE, FAILED = "done", "failed"
FINISHING = 5.0  # seconds for the last word of a producer, and of a reader
AGAIN = 0.1, 2.0  # seconds until an event that could not be appended is tried again: at first, at the most
_ENDING = re.compile(rb"\r\n: stream (\w+)\r\n\r\n$")
_ID = re.compile(rb"^id(:.*)?(\r\n|\n|\r)", re.MULTILINE)


class AlreadyRunning(CancelError, HTTPException):
    """A stream is live under this key, and ``live="refuse"``: answered with 409."""

    def __init__(self, key: str) -> None:
        HTTPException.__init__(self, 409, f"a stream is live under the key {key!r}")


class StreamLost(CancelError):
    """Another run has taken the stream, or its producer has died."""


class Resumable:
    """Starts streams, and has clients read them again from where they were.

    To be opened and closed inside of its broker: ``async with``, or in :func:`~fastapi_cancel.lifespan`.

    :param broker: keeps the events: as many of a stream as it retains of a channel
    :param linger: seconds without any reader, in any process, after which the work is cancelled (cause ``disconnect``)
    :param keep: seconds that a stream can be read after its end
    :param lease: seconds without a sign of life after which a producer, or a reader, may be taken for dead. Readers
        are told of a dead producer after twice that at the most
    :param ahead: how many events may be produced before the quickest reader has read them; then the work waits. By
        default half of what the broker retains
    :param live: what ``start`` does where a stream is live under the key: ``"join"`` it, ``"replace"`` it (the other
        is stopped), or ``"refuse"`` (409)
    :param patience: seconds that a producer tries to append an event while the broker is away; then it fails
    :param policy: how the work ends early
    :raises TypeError: an argument is of the wrong type; the message names it
    :raises ValueError: an argument is out of range; the message names it
    """

    def __init__(
        self,
        broker: Broker,
        *,
        linger: float = 30.0,
        keep: float = 300.0,
        lease: float = 15.0,
        ahead: int | None = None,
        live: Live = "join",
        patience: float = 30.0,
        policy: CancelPolicy | None = None,
    ) -> None:
        if not isinstance(broker, Broker):
            raise TypeError(f"broker must be a Broker, not {broker!r}")
        check_seconds("linger", linger, zero=True)
        check_seconds("keep", keep)
        check_seconds("lease", lease)
        check_seconds("patience", patience, zero=True)
        if ahead is not None:
            check_count("ahead", ahead)
            if ahead > broker.retain:
                raise ValueError(f"ahead must be {broker.retain} at the most, which the broker retains, not {ahead!r}")
        if live not in get_args(Live):
            raise ValueError(f"live must be one of {', '.join(get_args(Live))}, not {live!r}")
        if policy is not None and not isinstance(policy, CancelPolicy):
            raise TypeError(f"policy must be a CancelPolicy, not {policy!r}")
        self.broker = broker
        self.linger = linger
        self.keep = keep
        self.lease = lease
        self.ahead = ahead or max(1, broker.retain // 2)
        self.patience = patience
        self.policy = policy or CancelPolicy()
        self._live = live
        self._producers: set[_Producer] = set()
        self._readers: set[_Reader] = set()
        self._group: TaskGroup | None = None

    async def __aenter__(self) -> Resumable:
        self._context = copy_context()
        self._group = anyio.create_task_group()
        await self._group.__aenter__()
        self._group.start_soon(self._attend)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """The streams that are produced here end (cause ``shutdown``); their cleanups are waited for."""
        group, self._group = self._group, None
        assert group is not None
        try:
            with anyio.CancelScope(shield=True):
                for producer in list(self._producers):
                    producer.shut_down()
                while self._producers:
                    await next(iter(self._producers)).ended.wait()
        finally:
            group.cancel_scope.cancel()
            await group.__aexit__(kind, exc, traceback)

    async def start(self, key: str, response: SSEResponse, after: str | None = None) -> Response:
        """Start a stream under ``key``, or go on with the one that is there.

        The content of ``response``, and its cleanups, are the work: they run apart from the client, in the context
        (:mod:`contextvars`) in which the streams were opened. All else is for this client: heartbeat, headers,
        ``on_disconnect``. If the work is not to run, it is closed.

        :param after: the ``Last-Event-ID`` of a client that comes back: nothing is started, see :meth:`resume`
        :return: ``response``, which reads the stream from its beginning; or 204 where there is nothing to resume
        :raises AlreadyRunning: a stream is live, and ``live="refuse"``
        :raises BrokerUnavailable: the broker is away
        """
        check_name("key", key)
        if not isinstance(response, SSEResponse):
            raise TypeError(f"response must be an SSEResponse, not {response!r}")
        if self._group is None:
            raise RuntimeError("not open: async with streams, or lifespan(broker, streams)")
        producer = _Producer(self, key, response)
        try:
            if after is not None:
                found = await self.broker.streams.find(key)
            else:
                found = await self._begin(producer, self._group)
        finally:
            if not producer.began:
                await producer.clean_up()
        return self._answer(key, found, after, lambda events: response.put_content(events))

    async def _begin(self, producer: _Producer, group: TaskGroup) -> Found:
        key, run = producer.key, producer.run
        with anyio.CancelScope(shield=True):  # who claims it must begin
            found, before = await self.broker.streams.claim(key, run, self.lease, self._live == "replace")
            if found.run == run:
                producer.began = True
                self._producers.add(producer)
                self._context.copy().run(group.start_soon, producer.produce)
                if before is not None:
                    await self.broker.runs.stop(key, before, "replaced", 0)
        if found.run != run and self._live == "refuse":
            raise AlreadyRunning(key)
        return found

    async def resume(self, key: str, after: str | None = None, **options: Any) -> Response:
        """Read the stream of ``key``, from the event behind ``after`` on.

        An id of another run begins at the beginning, behind a :class:`Gap`.

        :param options: for the :class:`SSEResponse`
        :return: the response; or 204, which tells an ``EventSource`` to stay away: there is no such stream, or
            this client has seen its end
        :raises BrokerUnavailable: the broker is away
        """
        check_name("key", key)
        found = await self.broker.streams.find(key)
        return self._answer(key, found, after, lambda events: SSEResponse(events, **options))

    def _answer(
        self, key: str, found: Found | None, after: str | None, respond: Callable[[AsyncIterator[Any]], Response]
    ) -> Response:
        place = Place.parse(after) if after is not None else None
        if found is None:
            return Response(status_code=204)
        ours = place is not None and place.epoch == found.epoch
        if ours and place is not None and found.state != LIVE and place.number >= found.last - (found.state == DONE):
            return Response(status_code=204)
        begin = place if ours and place is not None else Place(found.epoch, 0)
        return respond(self._read(key, found, begin, is_other=after is not None and not ours))

    async def _read(self, key: str, found: Found, place: Place, is_other: bool) -> AsyncIterator[Event | bytes]:
        """The events of a stream, to its end."""
        if is_other:
            yield Gap(place, None)
        streams = self.broker.streams
        async with self.broker.subscribe(streams.channel(key), str(place)) as events:
            reader = _Reader(key, found.run, events, place.number)
            self._readers.add(reader)
            try:
                await self._tell(reader)
                async for event in events:
                    at = Place.parse(event.id)
                    assert at is not None
                    if at.epoch != found.epoch:
                        yield _ended("lost")
                        return
                    if (ending := _ENDING.search(event.frame)) is not None:
                        if (state := ending[1].decode()) != DONE:
                            yield f"id: {event.id}{SEP}".encode() + _ended(state)
                        return
                    reader.at = at.number
                    if reader.at - reader.told >= max(1, self.ahead // 4):
                        await self._tell(reader)
                    yield event
            except StreamLost as lost:
                yield _ended(str(lost))
            finally:
                self._readers.discard(reader)
                with anyio.move_on_after(FINISHING, shield=True), suppress(BrokerUnavailable):
                    await streams.depart(key, found.run, reader.id)

    async def _tell(self, reader: _Reader) -> None:
        """Say that it reads, and how far it is; hear of its producer."""
        reader.told = reader.at
        with suppress(BrokerUnavailable):
            heard_of = await self.broker.streams.attend(reader.key, reader.run, reader.id, reader.at, self.lease)
            reader.unheard = 0 if heard_of else reader.unheard + 1
            if heard_of is None:
                reader.events.end(StreamLost("lost"))
            elif reader.unheard > 1:
                reader.events.end(StreamLost("died"))

    async def _attend(self) -> None:
        while True:
            await anyio.sleep(self.lease / 3)
            for reader in list(self._readers):
                await self._tell(reader)

    def forget(self, producer: _Producer) -> None:
        """It has ended."""
        self._producers.discard(producer)


class _Reader:
    """Somebody who reads a stream in this process.

    :ivar at: the number of the last event that was read
    :ivar told: what the producer knows of that
    :ivar unheard: how often in a row the producer was not heard of
    """

    def __init__(self, key: str, run: str, events: Subscription, at: int) -> None:
        self.id = secrets.token_hex(8)
        self.key = key
        self.run = run
        self.events = events
        self.at = self.told = at
        self.unheard = 0


class _Producer:
    """The work of a stream, in a task of its own under a ladder of its own.

    :ivar began: whether it has a stream, and a task
    :ivar ended: set when it has ended, its cleanups included
    """

    def __init__(self, streams: Resumable, key: str, response: SSEResponse) -> None:
        self.key = key
        self.run = secrets.token_hex(8)
        self.began = False
        self.ended = anyio.Event()
        self._content, self._cleanups = response.take_content()
        self._streams = streams
        self._records = streams.broker.streams
        self._farewell = response.make_farewell
        self._since = monotonic()
        self._number = self._read_to = 0
        self._ladder: Ladder | None = None
        self._news = anyio.Event()

    def shut_down(self) -> None:
        if self._ladder is not None:
            self._ladder.signal("shutdown")

    async def produce(self) -> None:
        """From the first event to the last word."""
        streams = self._streams
        state: str | None = FAILED
        ladder = ladder_for(streams.policy, {"type": "stream", "path": self.key})
        try:
            await ladder.run(self._work(ladder))
            state = ladder.cause or DONE
        except StreamLost as lost:
            state = None
            logger.warning("%s: %s", ladder.name(), lost)
        except Exception:
            logger.exception("%s failed", ladder.name())
        finally:
            self._records.heed(self.run, None)
            try:
                with anyio.move_on_after(FINISHING, shield=True), suppress(BrokerUnavailable, StreamLost):
                    if state is not None:
                        await self._conclude(ladder, state)
            finally:
                streams.forget(self)
                self.ended.set()

    async def _work(self, ladder: Ladder) -> None:
        streams = self._streams
        self._ladder = ladder
        self._records.heed(self.run, self._hear)
        ladder.spawn(partial(self._stay, ladder))
        try:
            async with streams.broker.runs.running(self.key, self.run, ladder.stop):
                async for item in self._content:
                    if item is not None:
                        wire, _ = encode(item, SEP)
                        await self._wait_for_readers()
                        await self._put(_ID.sub(b"", wire))
        finally:
            await self.clean_up()

    async def clean_up(self) -> None:
        """Close the content, and run the hooks that came with it."""
        await close(self._content)
        await run_cleanups(self._cleanups, self._streams.policy.cleanup_timeout, f"the stream {self.key!r}")

    async def _conclude(self, ladder: Ladder, state: str) -> None:
        if ladder.cause in HERE and (farewell := self._farewell_of(ladder)):
            await self._put(farewell)
        await self._put(f": stream {state}{SEP}{SEP}".encode())
        await self._records.finish(self.key, self.run, state, self._number, self._streams.keep)

    def _farewell_of(self, ladder: Ladder) -> bytes:
        try:
            info = StreamInfo(ladder.cause, monotonic() - self._since, self._number, reason=ladder.reason)
            return self._farewell(info)
        except Exception:
            logger.exception("%s: the farewell failed", ladder.name())
            return b""

    # -- to the log --------------------------------------------------------------------------

    async def _wait_for_readers(self) -> None:
        """Back-pressure: stay within reach of the quickest reader."""
        while self._number - self._read_to >= self._streams.ahead:
            await self._news.wait()

    async def _put(self, wire: bytes) -> None:
        """Append an event, however often the broker goes away meanwhile.

        :raises StreamLost: the stream is another run's
        :raises BrokerUnavailable: it was away for too long
        """
        wait, longest = AGAIN
        until = monotonic() + self._streams.patience
        while True:
            try:
                if not await self._records.produce(self.key, self.run, self._number + 1, wire):
                    raise StreamLost("the stream has been taken by another run, or Redis has lost it")
                self._number += 1
                return
            except BrokerUnavailable:
                if monotonic() > until:
                    raise
            await anyio.sleep(wait)
            wait = min(2 * wait, longest)

    # -- its readers -------------------------------------------------------------------------

    def _hear(self, at: int | None) -> None:
        if at is not None:
            self._read_to = max(self._read_to, at)
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = anyio.Event()

    async def _stay(self, ladder: Ladder) -> None:
        """Be heard of, and end the work when nobody has read it for ``linger``."""
        streams = self._streams
        while True:
            wait = streams.lease / 3
            with suppress(BrokerUnavailable):
                if (seen := await self._records.renew(self.key, self.run, streams.lease)) is None:
                    ladder.stop("lost")
                    return
                idle, read_to = seen
                self._read_to = max(self._read_to, read_to)
                if idle is not None and idle >= streams.linger:
                    ladder.signal("disconnect")
                    return
                if idle is not None:
                    wait = min(wait, streams.linger - idle)
            with anyio.move_on_after(wait):
                await self._news.wait()


def _ended(reason: str) -> bytes:
    return b"event: ended\r\ndata: " + to_json({"reason": reason}) + b"\r\n\r\n"
