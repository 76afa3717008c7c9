"""Brokers: the same tests in memory, on Redis, and on Valkey where it is installed.

What is only Redis' is in ``test_broker_redis``; the log and its readers by themselves are in ``test_broker_log``.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import anyio
import pytest
from fastapi.sse import ServerSentEvent as FastAPIEvent
from pydantic import BaseModel

from fastapi_cancel import BrokerUnavailable, Gap, InvalidEvent, ServerSentEvent
from fastapi_cancel.broker import Broker, Event, MemoryBroker, Stalled, Subscription
from fastapi_cancel.events import encode

from .brokers import NewBroker, a_kind, its_backend, its_store, new_brokers  # noqa: F401 (fixtures)
from .conftest import DEADLINE, NOT_TESTED
from .redis_server import STORES

pytestmark = pytest.mark.anyio


@pytest.mark.skipif("valkey" in STORES, reason="these run on Valkey, too")
@pytest.mark.parametrize("kind", [None])
def test_on_valkey(kind: None) -> None:
    pytest.skip(f"{NOT_TESTED} brokers on Valkey: no valkey-server is installed")


async def take(events: Subscription, number: int) -> list[Event]:
    with anyio.fail_after(DEADLINE):
        return [await anext(events) for _ in range(number)]


def data(events: list[Event]) -> list[str | None]:
    return [event.data for event in events]


class Model(BaseModel):
    price: float


@dataclass
class Point:
    x: int


ITEMS: list[Any] = [
    "text",
    "two\nlines",
    "",
    5,
    {"data": "a", "event": "b", "comment": "c", "retry": 5},
    b"event: raw\r\ndata: bytes\r\n\r\n",
    b"data: with LF\n\n",
    bytearray(b"data: x\r\r"),
    memoryview(b": a comment\n\n"),
    ServerSentEvent("theirs", event="named"),
    FastAPIEvent(data={"json": [1]}),
    Model(price=1.5),
    Point(3),
    "snowman \u2603",
]
NO_PLACES = [
    "",
    "abc",
    "1",
    "-1",
    "1-",
    "1-1-1",
    "0-0",
    "1-1",
    "1" * 20 + "-5",
    "\u0661-\u0661",
    "1-1\n",
]


class TestBroker:
    async def test_who_listens_gets_what_is_published_with_its_id(self, new: NewBroker) -> None:
        async with new() as broker, broker.subscribe("news") as events:
            ids = [await broker.publish("news", f"{number}") for number in range(3)]
            got = await take(events, 3)
            assert [event.id for event in got] == ids
            assert data(got) == ["0", "1", "2"]
            assert events.position == ids[-1]
            assert got[0].frame == f"id: {ids[0]}\r\ndata: 0\r\n\r\n".encode()

    async def test_ids_are_consecutive_within_a_channel(self, new: NewBroker) -> None:
        async with new() as broker:
            first, second = [await broker.publish("a", "x") for _ in range(2)]
            await broker.publish("b", "x")
            third = await broker.publish("a", "x")
        epoch, number = first.split("-")
        assert [second, third] == [f"{epoch}-{int(number) + 1}", f"{epoch}-{int(number) + 2}"]

    async def test_from_now_on(self, new: NewBroker) -> None:
        async with new() as broker:
            await broker.publish("news", "before")
            async with broker.subscribe("news") as events:
                await broker.publish("news", "after")
                assert data(await take(events, 1)) == ["after"]

    async def test_channels_are_apart(self, new: NewBroker) -> None:
        async with new() as broker, broker.subscribe("a") as a, broker.subscribe("b") as b:
            await broker.publish("a", "for a")
            await broker.publish("b", "for b")
            assert data(await take(a, 1) + await take(b, 1)) == ["for a", "for b"]

    @pytest.mark.parametrize("length", [0, 1, 250])
    async def test_who_comes_back_misses_nothing(self, new: NewBroker, length: int) -> None:
        async with new(retain=1000) as broker:
            first = await broker.publish("news", "first")
            for number in range(length):
                await broker.publish("news", number)
            async with broker.subscribe("news", first) as events:
                await broker.publish("news", "last")
                assert data(await take(events, length + 1)) == [*map(str, range(length)), "last"]

    async def test_what_is_forgotten_is_told_and_counted(self, new: NewBroker) -> None:
        async with new(retain=3) as broker:
            ids = [await broker.publish("news", number) for number in range(7)]
            async with broker.subscribe("news", ids[0]) as events:
                gap, *rest = await take(events, 4)
                assert isinstance(gap, Gap)
                assert (gap.missed, gap.event, gap.data, gap.id) == (3, "gap", '{"missed":3}', ids[3])
                assert data(rest) == ["4", "5", "6"]
            async with broker.subscribe("news", gap.id) as events:
                assert data(await take(events, 3)) == ["4", "5", "6"]

    async def test_a_reader_that_falls_behind_what_is_kept_is_told(self, new: NewBroker) -> None:
        async with new(retain=2) as broker, broker.subscribe("news") as events:
            for number in range(5):
                await broker.publish("news", number)
            gap, *rest = await take(events, 3)
            assert isinstance(gap, Gap)
            assert gap.missed == 3
            assert data(rest) == ["3", "4"]

    @pytest.mark.parametrize("id", NO_PLACES)
    async def test_an_id_that_says_nothing_is_a_gap(self, new: NewBroker, id: str) -> None:
        async with new() as broker:
            await broker.publish("news", "kept")
            async with broker.subscribe("news", id) as events:
                await broker.publish("news", "new")
                gap, *rest = await take(events, 3)
                assert isinstance(gap, Gap)
                assert gap.missed is None
                assert data(rest) == ["kept", "new"]
            async with broker.subscribe("nothing yet", id) as events:
                (gap,) = await take(events, 1)
                assert isinstance(gap, Gap)
                await broker.publish("nothing yet", "new")
                assert data(await take(events, 1)) == ["new"]

    async def test_an_id_of_a_life_that_was_lost_is_a_gap_and_nothing_comes_twice(self, new: NewBroker) -> None:
        """It is newer than all there is: who has it has seen that."""
        async with new() as broker:
            await broker.publish("news", "kept")
            async with broker.subscribe("news", "1111111111111111111-5") as events:
                (gap,) = await take(events, 1)
                assert isinstance(gap, Gap)
                assert gap.missed is None
                await broker.publish("news", "new")
                assert data(await take(events, 1)) == ["new"]

    async def test_an_id_that_does_not_exist_yet_is_a_gap(self, new: NewBroker) -> None:
        async with new() as broker:
            epoch = (await broker.publish("news", "kept")).partition("-")[0]
            async with broker.subscribe("news", f"{epoch}-1000") as events:
                (gap,) = await take(events, 1)
                assert isinstance(gap, Gap)
                assert gap.missed is None
                assert events.position == f"{epoch}-1"
                await broker.publish("news", "new")
                assert data(await take(events, 1)) == ["new"]

    async def test_an_event_is_forgotten_at_its_age(self, new: NewBroker) -> None:
        age = 2
        async with new(max_age=age) as broker, broker.subscribe("news"):
            first = await broker.publish("news", "seen")
            await broker.publish("news", "old")
            await anyio.sleep(1.2 * age)
            await broker.publish("news", "young")
            async with broker.subscribe("news", first) as events:
                gap, young = await take(events, 2)
                assert isinstance(gap, Gap)
                assert (gap.missed, young.data) == (1, "young")

    async def test_a_channel_is_not_forgotten_while_somebody_listens(self, new: NewBroker) -> None:
        """Though others are joined all the time, which is what the keeper of the logs waits for."""
        age = 2
        async with new(max_age=age) as broker, broker.subscribe("idle") as events:
            first = await broker.publish("idle", "first")
            assert data(await take(events, 1)) == ["first"]
            for number in range(10):
                await anyio.sleep(age / 5)
                async with broker.subscribe(f"busy {number}"):
                    await broker.publish(f"busy {number}", "x")
            second = await broker.publish("idle", "second")
            assert first.partition("-")[0] == second.partition("-")[0]
            assert data(await take(events, 1)) == ["second"]

    async def test_a_channel_is_forgotten_when_nobody_does(self, new: NewBroker) -> None:
        age = 0.05
        async with new(max_age=age) as broker:
            first = await broker.publish("idle", "first")
            await anyio.sleep(1.5 * age)
            for number in range(100):
                await broker.publish("other", number)
            second = await broker.publish("idle", "second")
            assert first.partition("-")[0] < second.partition("-")[0]

    async def test_who_reads_slowly_skips(self, new: NewBroker) -> None:
        async with new() as broker, broker.subscribe("news", lag=2) as events:
            await broker.publish("news", "read")
            assert data(await take(events, 1)) == ["read"]
            await wait_for_it(events)
            ids = [await broker.publish("news", number) for number in range(5)]
            await heard(broker, ids[-1])
            gap, *rest = await take(events, 3)
            assert isinstance(gap, Gap)
            assert gap.missed == 3
            assert data(rest) == ["3", "4"]

    async def test_who_reads_slowly_is_ended(self, new: NewBroker) -> None:
        async with new() as broker, broker.subscribe("news", lag=2, slow="end") as events:
            await wait_for_it(events)
            ids = [await broker.publish("news", number) for number in range(3)]
            await heard(broker, ids[-1])
            with pytest.raises(Stalled, match="more than 2 events"):
                await take(events, 1)

    async def test_nobody_is_slow_before_he_has_caught_up(self, new: NewBroker) -> None:
        async with new() as broker:
            first = await broker.publish("news", "first")
            for number in range(5):
                await broker.publish("news", number)
            async with broker.subscribe("news", first, lag=2, slow="end") as events:
                assert data(await take(events, 5)) == ["0", "1", "2", "3", "4"]

    async def test_the_content_of_a_response_begins_with_its_place(self, new: NewBroker) -> None:
        async with new() as broker:
            await broker.publish("news", "before")
            events = broker.events("news")
            here = await anext(events)
            assert encode(here) == (f"id: {here.id}\r\n\r\n".encode(), here.id)
            assert (here.data, here.event) == (None, None)
            id = await broker.publish("news", "first")
            assert (await anext(events)).id == id
            await close(events)
            events = broker.events("news", here.id)
            assert encode(await anext(events)) == (f"id: {id}\r\ndata: first\r\n\r\n".encode(), id)
            await close(events)

    async def test_the_content_of_a_response_is_a_generator(self, new: NewBroker) -> None:
        async with new() as broker:
            events = broker.events("news")
            await anext(events)
            await broker.publish("news", "first")
            assert (await events.asend(None)).data == "first"
            with pytest.raises(ZeroDivisionError):
                await events.athrow(ZeroDivisionError())
            with pytest.raises(StopAsyncIteration):
                await anext(events)

    @pytest.mark.parametrize("item", ITEMS)
    async def test_all_that_can_be_sent_can_be_published(self, new: NewBroker, item: Any) -> None:
        async with new() as broker, broker.subscribe("news") as events:
            id = await broker.publish("news", item)
            (event,) = await take(events, 1)
            assert event.frame == f"id: {id}\r\n".encode() + encode(item)[0]

    async def test_events_know_their_fields(self, new: NewBroker) -> None:
        async with new() as broker, broker.subscribe("news") as events:
            await broker.publish("news", {"data": "a\nb: c", "event": "both"})
            await broker.publish("news", b"data:tight\ndata\n\n")
            await broker.publish("news", {"comment": "nothing"})
            await broker.publish("news", b"data: \xff\n\n")
            both, tight, nothing, broken = await take(events, 4)
        assert (both.data, both.event) == ("a\nb: c", "both")
        assert (tight.data, tight.event) == ("tight", None)
        assert (nothing.data, nothing.event) == (None, None)
        assert broken.data == "\ufffd"
        assert repr(both) == f"<Event {both.id} both: 'a\\nb: c'>"

    @pytest.mark.parametrize(
        ("item", "message"),
        [
            ({"data": "a", "id": "mine"}, "id from the broker"),
            (ServerSentEvent("a", id="mine"), "id from the broker"),
            (b"id: mine\ndata: x\n\n", "id from the broker"),
            (b"data: x\r\nid\r\n\r\n", "id from the broker"),
            (None, "no event"),
            (b"", "no event"),
            (b"data: half\n", "empty line"),
            ({"date": "x"}, "no 'date'"),
        ],
    )
    async def test_what_is_no_event_is_refused(self, new: NewBroker, item: Any, message: str) -> None:
        async with new() as broker:
            with pytest.raises(InvalidEvent, match=message):
                await broker.publish("news", item)

    async def test_ids_in_the_data_are_none(self, new: NewBroker) -> None:
        async with new() as broker:
            await broker.publish("news", b"data: id: 5\nidle: x\n\n")
            await broker.publish("news", "id: 5")

    async def test_an_event_of_another_channel_has_an_id(self, new: NewBroker) -> None:
        async with new() as broker, broker.subscribe("a") as events:
            await broker.publish("a", "x")
            (event,) = await take(events, 1)
            with pytest.raises(InvalidEvent, match="id from the broker"):
                await broker.publish("b", event)

    @pytest.mark.parametrize(
        ("kind_of", "settings", "message"),
        [
            (ValueError, {"retain": 0}, "retain must be a whole number"),
            (TypeError, {"retain": 1.5}, "retain must be a whole number"),
            (TypeError, {"retain": True}, "retain must be a whole number"),
            (ValueError, {"max_age": 0}, "max_age must be a finite number of seconds"),
            (TypeError, {"max_age": "long"}, "max_age must be a finite number of seconds"),
            (TypeError, {"retein": 5}, "retein"),
        ],
    )
    async def test_wrong_settings_name_themselves(
        self, new: NewBroker, kind_of: type[Exception], settings: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(kind_of, match=message):
            new(**settings)

    async def test_wrong_arguments_name_themselves(self, new: NewBroker) -> None:
        wrong: Any
        async with new() as broker:
            for wrong in ["", 5, None]:
                with pytest.raises((TypeError, ValueError), match="channel must be a str"):
                    broker.subscribe(wrong)
                with pytest.raises((TypeError, ValueError), match="channel must be a str"):
                    await broker.publish(wrong, "x")
            for wrong in [0, -1]:
                with pytest.raises(ValueError, match="lag must be a whole number"):
                    broker.subscribe("a", lag=wrong)
            wrong = "wait"
            with pytest.raises(ValueError, match="slow must be 'skip' or 'end'"):
                broker.subscribe("a", slow=wrong)

    async def test_subscribers_that_wait_are_told_of_the_closing(self, new: NewBroker) -> None:
        told: list[str] = []
        waiting = [anyio.Event() for _ in range(3)]

        async def listen(number: int) -> None:
            try:
                async with broker.subscribe("news") as events:
                    waiting[number].set()
                    await anext(events)
            except BrokerUnavailable as exc:
                told.append(str(exc))

        broker = new()
        with anyio.fail_after(DEADLINE):
            async with anyio.create_task_group() as group:
                async with broker:
                    for number in range(3):
                        group.start_soon(listen, number)
                    for event in waiting:
                        await event.wait()
        assert told == ["the broker has been closed"] * 3
        await broker.aclose()

    async def test_a_broker_may_be_opened_again(self, new: NewBroker) -> None:
        broker = new()
        for _ in range(2):
            async with broker, broker.subscribe("news") as events:
                await broker.publish("news", "x")
                assert data(await take(events, 1)) == ["x"]

    async def test_leaving_while_being_cancelled(self, new: NewBroker) -> None:
        async with new() as broker:
            async with anyio.create_task_group() as group:
                inside = anyio.Event()

                async def listen() -> None:
                    async with broker.subscribe("news") as events:
                        inside.set()
                        await anext(events)

                group.start_soon(listen)
                await inside.wait()
                group.cancel_scope.cancel()
            await nobody_listens(broker)

    async def test_cancelled_at_each_point_of_subscribing(self, new: NewBroker) -> None:
        async with new() as broker:
            for turns in range(12):
                async with anyio.create_task_group() as group:

                    async def listen() -> None:
                        async with broker.subscribe("news") as events:
                            await anext(events)

                    group.start_soon(listen)
                    for _ in range(turns):
                        await anyio.lowlevel.checkpoint()
                    group.cancel_scope.cancel()
                await nobody_listens(broker)
            async with broker.subscribe("news") as events:
                await broker.publish("news", "still")
                assert data(await take(events, 1)) == ["still"]

    async def test_many_subscribers_in_the_order_of_their_waiting(self, new: NewBroker, anyio_backend: str) -> None:
        order: list[int] = []
        many, listening = 200, 0
        ready = anyio.Event()

        async def listen(number: int) -> None:
            nonlocal listening
            async with broker.subscribe("news") as events:
                listening += 1
                if listening == many:
                    ready.set()
                async for event in events:
                    order.append(number)
                    if event.data == "2":
                        return

        async with new() as broker:
            with anyio.fail_after(DEADLINE):
                async with anyio.create_task_group() as group:
                    for number in range(many):
                        group.start_soon(listen, number)
                    await ready.wait()
                    for number in range(3):
                        await broker.publish("news", number)
            await nobody_listens(broker)
        assert sorted(order) == sorted([*range(many)] * 3)


async def close(events: Any) -> None:
    await events.aclose()


async def wait_for_it(events: Subscription) -> None:
    """Have it wait once: it has caught up then."""
    with anyio.move_on_after(0.01):
        await anext(events)


async def heard(broker: Broker, id: str) -> None:
    """This process knows of the event. In memory it does at once."""
    here = getattr(broker, "_channels", {}).get("news")
    with anyio.fail_after(DEADLINE):
        while here is not None and str(here.log.place) != id:
            await here.log.wait()


async def nobody_listens(broker: Broker, soon: bool = False) -> None:
    """Neither here nor in Redis."""
    if isinstance(broker, MemoryBroker):
        assert not broker._readers
        return
    inside: Any = broker
    topic, client = inside._names.topic("news"), inside._link._commands
    with anyio.fail_after(DEADLINE):
        while soon and (inside._channels or (await client.pubsub_numsub(topic))[0][1]):
            await anyio.sleep(0.001)
    assert not inside._channels
    assert topic not in inside._link._wanted
    assert await client.pubsub_numsub(topic) == [(topic.encode(), 0)]


@pytest.mark.parametrize("kind", ["memory", *STORES], scope="module")
class TestOnAsyncio:
    async def test_native_cancellation(self, new: NewBroker) -> None:
        async with new() as broker:
            for turns in range(12):

                async def listen() -> None:
                    async with broker.subscribe("news") as events:
                        await anext(events)

                task = asyncio.create_task(listen())
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled()
                await nobody_listens(broker)

    async def test_publishing_is_cancelled(self, new: NewBroker) -> None:
        """Python 3.11: in redis-py alone a cancellation can get lost."""

        async def publish_and_wait() -> None:
            await broker.publish("news", "x")
            await asyncio.Event().wait()

        async with new() as broker:
            for turns in range(25):
                task = asyncio.create_task(publish_and_wait())
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                done, _ = await asyncio.wait([task], timeout=DEADLINE)
                assert done, turns

    async def test_cancelled_again_while_leaving(self, new: NewBroker) -> None:
        """The looker leaves for it."""
        async with new() as broker:
            for turns in range(8):
                inside = asyncio.Event()

                async def listen(inside: asyncio.Event) -> None:
                    async with broker.subscribe("news") as events:
                        inside.set()
                        await anext(events)

                task = asyncio.create_task(listen(inside))
                await inside.wait()
                task.cancel()
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                await nobody_listens(broker, soon=True)

    async def test_woken_in_order(self, new: NewBroker) -> None:
        order: list[int] = []

        async def listen(number: int, events: Subscription) -> None:
            while await anext(events):
                order.append(number)

        async with new() as broker, broker.subscribe("news") as a, broker.subscribe("news") as b:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(listen(number, events)) for number, events in enumerate([a, b])]
                for number in range(3):
                    await broker.publish("news", number)
                    while len(order) < 2 * (number + 1):
                        await asyncio.sleep(0)
                for task in tasks:
                    task.cancel()
        assert order == [0, 1] * 3
