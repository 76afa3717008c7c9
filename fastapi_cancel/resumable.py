"""Streams that outlive a connection: the work runs apart from its clients, who come, go and come back anywhere.

::

    broker = connect("redis://localhost")
    streams = Resumable(broker, linger=30)
    app = FastAPI(lifespan=lifespan(broker, streams))

    @router.get("/chats/{chat}/answer")
    async def answer(chat: str, last: LastEventID):
        return await streams.start(f"chats/{chat}", SSEResponse(generate(chat), heartbeat=15), after=last)

A *producer* pulls the content into the log of a channel (:mod:`.broker`), in the process where it was started. The
responses read the log, wherever they are. Its last event says how the stream has ended.

Who is told what, and by whom:

- *the producer* is told of its readers: how far the quickest is, and when the last one has left. It asks again three
  times in its lease, so that a lost message or a dead reader costs time only.
- *the readers* ask three times in the same lease whether the producer is heard of. One that is not, for another
  half of the lease in which Redis answers, is dead: a Redis that was away must not look like that.
- *whoever stops the key* reaches the producer, as any other run (:mod:`.remote`).

A producer whose stream was taken by another run, because it was replaced or had not been heard of for its lease,
cannot append any more: each event is appended under the run's name and number, once however often it is tried.

Races, and why each is harmless:

- *the work is cancelled while it appends*: nobody knows whether that event is there. The last words are appended
  behind whatever there is, and nothing can be appended behind them.
- *nobody has read it yet*: who starts a stream is its first reader from the start, so ``linger=0`` does not end it.
- *Redis comes back, and the producer asks before its readers do*: they have two thirds of a lease.
- *a stop comes before the work has begun*: it waits for it (:mod:`.broker.runs`); the content is closed, never begun.
- *the last reader leaves while another comes*: the work ends, and the one that has come is told so.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from contextvars import copy_context
from time import monotonic
from types import TracebackType
from typing import Any, Literal, get_args

import anyio
from anyio.abc import TaskGroup
from fastapi import HTTPException
from pydantic_core import to_json
from starlette.responses import Response

from ._producer import Producer, StreamLost
from .broker import Broker, BrokerUnavailable, Event, Gap, Subscription
from .broker.base import check_count, check_name
from .broker.log import SEP, Place
from .broker.runs import EARLY_AT_MOST
from .broker.streams import DONE, LIVE, Fate, Found, how_ended
from .exceptions import CancelError
from .policy import CancelPolicy, check_seconds
from .sse import SSEResponse

logger = logging.getLogger("fastapi_cancel")

Live = Literal["join", "replace", "refuse"]
DEPARTING = 5.0  # seconds for a reader to say that it has left


class AlreadyRunning(CancelError, HTTPException):
    """A stream is live under this key, and ``live="refuse"``: answered with 409."""

    def __init__(self, key: str) -> None:
        HTTPException.__init__(self, 409, f"a stream is live under the key {key!r}")


class Resumable:
    """Starts streams, and has clients read them again from where they were.

    To be opened and closed inside of its broker: ``async with``, or in :func:`~fastapi_cancel.lifespan`.

    :param broker: keeps the events: as many of a stream as it retains of a channel
    :param linger: seconds without any reader, in any process, after which the work is cancelled (cause ``disconnect``)
    :param keep: seconds that a stream can be read after its end; not longer than the broker keeps an event
    :param lease: seconds without a sign of life after which a producer, or a reader, may be taken for dead. Readers
        are told of a dead producer after twice that at the most; a dead reader counts as one for as long
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
        for name, seconds in {"keep": keep, "lease": lease}.items():
            check_seconds(name, seconds)
            if seconds > broker.max_age:
                raise ValueError(
                    f"{name} must be {broker.max_age:g} seconds at the most, which the broker keeps events"
                )
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
        self._producers: set[Producer] = set()
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
            await group.__aexit__(None, None, None)  # which would wrap what goes through

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
        producer = Producer(self, key, response)
        try:
            found = await (self.broker.streams.find(key) if after is not None else self._begin(producer, self._group))
        finally:
            if not producer.began:
                await producer.clean_up()
        return self._answer(key, found, after, response.put_content, producer)

    async def _begin(self, producer: Producer, group: TaskGroup) -> Found:
        key, run = producer.key, producer.run
        found: Found | None = None
        with anyio.CancelScope(shield=True):  # who claims it must begin
            found, before = await self.broker.streams.claim(key, run, self.lease, self._live == "replace")
            if found.run == run:
                self._context.copy().run(group.start_soon, producer.produce)
                producer.began = True
                self._producers.add(producer)
            if before is not None:
                with suppress(BrokerUnavailable):  # then it will find out
                    await self.broker.runs.stop(key, before, "replaced", EARLY_AT_MOST)
        assert found is not None
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
        self,
        key: str,
        found: Found | None,
        after: str | None,
        respond: Callable[[AsyncIterator[Event | bytes]], SSEResponse],
        producer: Producer | None = None,
    ) -> Response:
        place = Place.parse(after) if after is not None else None
        if found is None:
            return Response(status_code=204)
        if place is not None and place.epoch != found.epoch:
            place = None
        if place is not None and found.state != LIVE and place.number >= found.last - (found.state == DONE):
            return Response(status_code=204)
        reader = _Reader(key, found, place, is_first=producer is not None and producer.began)
        response = respond(self._read(reader, is_elsewhere=after is not None and place is None))
        response.add_cleanup(self._depart, reader)
        return response

    async def _read(self, reader: _Reader, is_elsewhere: bool) -> AsyncIterator[Event | bytes]:
        """The events of a stream, to its end."""
        if is_elsewhere:
            yield Gap(reader.place, None)
        try:
            async with self.broker.subscribe(self.broker.streams.channel(reader.key), str(reader.place)) as events:
                reader.events = events
                self._readers.add(reader)
                await self._tell(reader)
                async for event in events:
                    at = Place.parse(event.id)
                    assert at is not None
                    if at.epoch != reader.epoch:
                        yield _ended("replaced" if await self._tell(reader) == "replaced" else "lost")
                        return
                    if (state := how_ended(event.frame)) is not None:
                        if state != DONE:
                            yield f"id: {event.id}{SEP}".encode() + _ended(state)
                        return
                    reader.at = at.number
                    if reader.at - reader.told >= max(1, self.ahead // 4):
                        await self._tell(reader)
                    yield event
        except StreamLost as lost:
            yield _ended(str(lost))
        except BrokerUnavailable:
            yield _ended("unavailable")
        finally:
            self._readers.discard(reader)

    async def _tell(self, reader: _Reader) -> Fate:
        """Say that it reads, and how far it is; hear what has become of the run."""
        reader.told = reader.at
        try:
            fate = await self.broker.streams.attend(reader.key, reader.run, reader.id, reader.at, self.lease)
        except BrokerUnavailable:
            reader.silent_since = None
            return "lost"
        reader.is_known = True
        if fate != "silent":
            reader.silent_since = None
        elif reader.silent_since is None:
            reader.silent_since = monotonic()
        elif monotonic() - reader.silent_since >= self.lease / 2:
            reader.events.end(StreamLost("died"))
        if fate in ("replaced", "lost"):
            reader.events.end(StreamLost(fate))
        return fate

    async def _depart(self, reader: _Reader) -> None:
        if reader.is_known:
            with anyio.move_on_after(DEPARTING, shield=True), suppress(BrokerUnavailable):
                await self.broker.streams.depart(reader.key, reader.run, reader.id)

    async def _attend(self) -> None:
        """Speak for the readers now and then."""
        while True:
            await anyio.sleep(self.lease / 3)
            for reader in list(self._readers):
                if reader in self._readers:
                    await self._tell(reader)
                    if reader not in self._readers:  # it may have departed before it was said to read
                        await self._depart(reader)

    @property
    def is_closing(self) -> bool:
        """Whether the streams are to end."""
        return self._group is None

    def forget(self, producer: Producer) -> None:
        """It has ended."""
        self._producers.discard(producer)


class _Reader:
    """Somebody who reads a stream in this process.

    :ivar at: the number of the last event that was read
    :ivar told: what the producer knows of that
    :ivar is_known: whether the record may have it among the readers
    :ivar silent_since: since when the producer has not been heard of
    """

    events: Subscription

    def __init__(self, key: str, found: Found, place: Place | None, is_first: bool) -> None:
        self.id = found.run if is_first else secrets.token_hex(8)
        self.key = key
        self.run = found.run
        self.epoch = found.epoch
        self.place = place or Place(found.epoch, 0)
        self.at = self.told = self.place.number
        self.is_known = is_first
        self.silent_since: float | None = None


def _ended(reason: str) -> bytes:
    return b"event: ended\r\ndata: " + to_json({"reason": reason}) + b"\r\n\r\n"
