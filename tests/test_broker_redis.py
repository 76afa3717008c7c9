"""Brokers in Redis: what Redis itself can do to them, on real servers that are killed, paused and started again."""

from __future__ import annotations

import asyncio
import logging
import sys
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import anyio
import pytest
import redis
import trio

from fastapi_cancel import BrokerUnavailable, Gap, connect
from fastapi_cancel.broker import Event, MemoryBroker, Subscription, _link
from fastapi_cancel.broker import redis as in_redis
from fastapi_cancel.broker.log import NOWHERE
from fastapi_cancel.broker.redis import RedisBroker
from fastapi_cancel.testing.live import free_port

from .conftest import DEADLINE
from .redis_server import RedisServer, servers_of

on_asyncio = pytest.mark.anyio
SECRET = "hunter2"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def open_at(server: RedisServer, **settings: Any) -> RedisBroker:
    broker = connect(server.url, **settings)
    assert isinstance(broker, RedisBroker)
    return broker


async def take(events: Subscription, number: int) -> list[Event]:
    with anyio.fail_after(DEADLINE):
        return [await anext(events) for _ in range(number)]


def data(events: list[Event]) -> list[str | None]:
    return [event.data for event in events]


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(DEADLINE):
        while not condition():
            await anyio.sleep(0.002)


async def restart(server: RedisServer) -> None:
    await anyio.to_thread.run_sync(server.kill)
    assert await anyio.to_thread.run_sync(server.start)


async def publish_until_it_fails(broker: RedisBroker) -> BrokerUnavailable:
    try:
        while True:
            await broker.publish("news", "x")
    except BrokerUnavailable as exc:
        return exc


async def publish(broker: RedisBroker, item: object) -> str:
    """Until it works: right after a restart a connection may not have noticed yet."""
    with anyio.fail_after(DEADLINE):
        while True:
            try:
                return await broker.publish("news", item)
            except BrokerUnavailable:
                await anyio.sleep(0.01)


# -- URLs ------------------------------------------------------------------------------------


def test_settings_in_the_url() -> None:
    broker = connect("redis://localhost/3?retain=5&max_age=2.5&prefix=p&connections=2&patience=none&client_name=me")
    assert isinstance(broker, RedisBroker)
    assert (broker.retain, broker.max_age, broker._names.log("x"), broker._patience) == (5, 2.5, "plog:x", None)
    pool = broker._link._commands.connection_pool
    assert (pool.max_connections, pool.connection_kwargs["db"], pool.connection_kwargs["client_name"]) == (2, 3, "me")


def test_arguments_go_before_the_url() -> None:
    assert connect("redis://localhost?retain=5", retain=7).retain == 7
    assert connect("memory://?retain=5", max_age=3).retain == 5


def test_in_memory_what_is_about_redis_says_nothing() -> None:
    assert isinstance(connect("memory://?patience=5", connections=3, prefix="p"), MemoryBroker)


@pytest.mark.parametrize(
    ("kind", "url", "settings", "message"),
    [
        (TypeError, None, {}, "url must be a str"),
        (ValueError, "http://localhost", {}, "url must begin with memory://, redis://"),
        (ValueError, "localhost:6379", {}, "url must begin with"),
        (ValueError, "memory://?retain=many", {}, "retain in the URL must be int, not 'many'"),
        (ValueError, "memory://?colour=blue", {}, "memory:// has no colour"),
        (ValueError, "redis://localhost?patience=long", {}, "patience in the URL must be float"),
        (ValueError, "redis://localhost?colour=blue", {}, "redis://localhost cannot be used.*'colour'"),
        (ValueError, "redis://localhost?decode_responses=1", {}, "decode_responses is not for you to set"),
        (ValueError, "redis://localhost?socket_timeout=long", {}, "cannot be used.*socket_timeout"),
        (ValueError, "redis://[::1", {}, "url cannot be read"),
        (ValueError, "redis://localhost", {"connections": 0}, "connections must be a whole number"),
        (ValueError, "redis://localhost", {"patience": -1}, "patience must be a finite number of seconds"),
        (TypeError, "redis://localhost", {"prefix": 5}, "prefix must be a str"),
    ],
)
def test_what_is_wrong_names_itself(kind: type[Exception], url: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(kind, match=message):
        connect(url, **settings)


def test_a_url_that_is_none() -> None:
    wrong: Any = None
    with pytest.raises(TypeError, match="url must be a str"):
        RedisBroker(wrong)


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{SECRET}/@localhost",
        f"redis://:12{SECRET}?x@localhost",
        f"redis://me:12?{SECRET}@localhost",
        f"redis://me:12#{SECRET}@localhost",
        f"redis://me:{SECRET}@localhost:port",
        f"redis://me:{SECRET}\u2100@localhost",
        f"redis://me:{SECRET}@localhost?colour=blue",
        f"redis://localhost?password={SECRET}&colour=blue",
        f"http://me:{SECRET}@localhost",
        f"me:{SECRET}@localhost",
    ],
)
def test_errors_about_a_url_do_not_tell_its_password(url: str) -> None:
    for make in (connect, RedisBroker):
        with pytest.raises(ValueError, match="url") as caught:
            make(url)
        assert SECRET not in "".join(traceback.format_exception(caught.value, chain=True)).replace(url, "")
        assert SECRET not in str(caught.value)


def test_redis_py_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith("fastapi_cancel.broker.") and ("redis" in name or "link" in name):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(ImportError, match=r"pip install 'fastapi-cancel\[redis\]'"):
        connect("redis://localhost")
    assert isinstance(connect(), MemoryBroker)


# -- opening ---------------------------------------------------------------------------------


def test_not_on_trio() -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="needs asyncio"):
            await connect("redis://localhost").open()

    trio.run(main)


@on_asyncio
async def test_not_opened() -> None:
    with pytest.raises(RuntimeError, match="not opened"):
        await connect("redis://localhost").publish("news", "x")


@on_asyncio
async def test_away_at_the_start() -> None:
    port = free_port()
    with pytest.raises(BrokerUnavailable, match=f"redis://127.0.0.1:{port}: .*onnect"):
        async with connect(f"redis://127.0.0.1:{port}"):
            pass


@on_asyncio
async def test_too_old(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    broker = open_at(redis_server)

    async def info(commands: object, section: str) -> dict[str, str]:
        return {"redis_version": "6.0.16"}

    monkeypatch.setattr("redis.asyncio.Redis.info", info)
    with pytest.raises(BrokerUnavailable, match=r"Redis 6\.0\.16 is too old, 6\.2 is needed"):
        await broker.open()


@on_asyncio
async def test_a_cluster_is_told(store: None) -> None:
    with RedisServer("--cluster-enabled yes") as server:
        with pytest.raises(BrokerUnavailable, match="Redis Cluster is not supported"):
            await open_at(server).open()
        server.kill()


@on_asyncio
async def test_a_sentinel_is_told(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    broker = open_at(redis_server)

    async def info(commands: object, section: str) -> dict[str, str]:
        return {"redis_version": "7.0.15", "redis_mode": "sentinel"}

    monkeypatch.setattr("redis.asyncio.Redis.info", info)
    with pytest.raises(BrokerUnavailable, match="this is a sentinel"):
        await broker.open()


@on_asyncio
async def test_passwords_are_not_told(own_redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    own_redis.client().config_set("requirepass", SECRET)
    with pytest.raises(BrokerUnavailable) as caught:
        await connect(own_redis.url.replace("//", f"//:{SECRET}wrong@")).open()
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    broker = RedisBroker(own_redis.url.replace("//", f"//:{SECRET}@"))
    async with broker, broker.subscribe("news") as events:
        await broker.publish("news", "x")
        assert data(await take(events, 1)) == ["x"]
        own_redis.kill()
        error = await publish_until_it_fails(broker)
        await until(lambda: "away" in caplog.text)
    assert SECRET not in "".join(traceback.format_exception(error))
    assert SECRET not in caplog.text
    assert f"redis://127.0.0.1:{own_redis.port}" in caplog.text


@on_asyncio
async def test_tls(certificate: str) -> None:
    port = free_port()
    files = f"--tls-cert-file {certificate}/cert --tls-key-file {certificate}/key --tls-auth-clients no"
    with servers_of("redis"), RedisServer(f"--tls-port {port} {files}"):  # not every Valkey is built with TLS
        broker = connect(f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificate}/cert")
        async with broker, broker.subscribe("news") as events:
            await broker.publish("news", "x")
            assert data(await take(events, 1)) == ["x"]
        with pytest.raises(BrokerUnavailable, match="rediss://127"):  # nobody knows the certificate
            await connect(f"rediss://127.0.0.1:{port}").open()


# -- Redis is away ---------------------------------------------------------------------------


@on_asyncio
async def test_subscribers_wait_and_then_fail(own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_at(own_redis) as broker:
        async with broker.subscribe("news") as events:
            monkeypatch.setattr(broker, "_patience", 0.3)
            own_redis.kill()
            await publish_until_it_fails(broker)
            with pytest.raises(BrokerUnavailable, match=r"127\.0\.0\.1"):
                await take(events, 1)
        for after in (None, "1-1"):
            with pytest.raises(BrokerUnavailable, match=r"127\.0\.0\.1"):
                async with broker.subscribe("news", after):
                    pass
        monkeypatch.setattr(broker, "_patience", DEADLINE)
        own_redis.start()
        await until(lambda: broker.failure is None)
        async with broker.subscribe("news") as events:
            await publish(broker, "again")
            assert data(await take(events, 1)) == ["again"]


@on_asyncio
async def test_closed_while_redis_is_away(own_redis: RedisServer) -> None:
    broker = open_at(own_redis)
    async with anyio.create_task_group() as group:
        async with broker:

            async def listen(*after: str) -> None:
                with pytest.raises(BrokerUnavailable, match="closed"):
                    async with broker.subscribe("news", *after) as events:
                        await anext(events)

            async with broker.subscribe("news"):
                own_redis.kill()
                group.start_soon(listen)
                group.start_soon(listen, "1-1")
                await until(lambda: broker._losing is not None)


@on_asyncio
@pytest.mark.parametrize("patience", [30, None])
async def test_nothing_that_redis_kept_is_lost(persistent_redis: RedisServer, patience: float | None) -> None:
    """kill -9 and a restart, with persistence: no gap, for those who wait and for those who come back."""
    async with open_at(persistent_redis, patience=patience) as here, open_at(persistent_redis) as there:
        async with here.subscribe("news") as waiting, here.subscribe("news") as slow:
            ids = [await there.publish("news", number) for number in range(5)]
            assert data(await take(waiting, 5)) == [*"01234"]
            await restart(persistent_redis)
            for number in range(5, 8):
                await publish(there, number)
            assert data(await take(waiting, 3)) == [*"567"]
            assert data(await take(slow, 8)) == [*"01234567"]
            async with there.subscribe("news", ids[1]) as back:
                assert data(await take(back, 6)) == [*"234567"]
            assert waiting.position > ids[-1]


@on_asyncio
async def test_a_restart_without_persistence_is_a_gap(own_redis: RedisServer) -> None:
    async with open_at(own_redis) as here, open_at(own_redis) as there:
        async with here.subscribe("news") as waiting:
            id = await there.publish("news", "seen")
            assert data(await take(waiting, 1)) == ["seen"]
            await restart(own_redis)
            (gap,) = await take(waiting, 1)
            assert isinstance(gap, Gap)
            assert gap.missed is None
            await publish(there, "new")
            assert data(await take(waiting, 1)) == ["new"]
            async with there.subscribe("news", id) as back:
                gap, new = await take(back, 2)
                assert isinstance(gap, Gap)
                assert new.data == "new"


@on_asyncio
async def test_what_a_snapshot_does_not_have_is_a_gap(own_redis: RedisServer) -> None:
    """Redis comes back as it was, and must not give the same ids again: what has them would be dropped as old."""
    async with open_at(own_redis) as here, open_at(own_redis) as there:
        async with here.subscribe("news") as waiting:
            ids = [await there.publish("news", number) for number in range(2)]
            own_redis.client().save()
            ids += [await there.publish("news", number) for number in range(2, 4)]
            assert data(await take(waiting, 4)) == [*"0123"]
            await restart(own_redis)
            ids += [await publish(there, number) for number in range(4, 8)]
            assert len(set(ids)) == 8
            gap, *rest = await take(waiting, 5)
            assert isinstance(gap, Gap)
            assert data(rest) == [*"4567"]
            async with there.subscribe("news", ids[3]) as back:
                gap, *rest = await take(back, 5)
                assert isinstance(gap, Gap)
                assert data(rest) == [*"4567"]
            async with there.subscribe("news", ids[1]) as back:  # which has seen all that the snapshot has
                assert data(await take(back, 4)) == [*"4567"]


@on_asyncio
async def test_what_a_snapshot_does_not_have_is_told_before_anything_new_comes(own_redis: RedisServer) -> None:
    async with open_at(own_redis) as here:
        await here.publish("news", "saved")
        own_redis.client().save()
        id = await here.publish("news", "lost")
        await restart(own_redis)
        async with here.subscribe("news", id) as back:
            assert isinstance((await take(back, 1))[0], Gap)


@on_asyncio
async def test_flushed_is_a_gap(redis_server: RedisServer) -> None:
    async with open_at(redis_server, prefix="flushed:") as broker, broker.subscribe("news") as events:
        await broker.publish("news", "seen")
        await take(events, 1)
        redis_server.client().flushall()
        await broker.publish("news", "new")
        gap, new = await take(events, 2)
        assert isinstance(gap, Gap)
        assert (gap.missed, new.data) == (None, "new")


@on_asyncio
async def test_a_pause(own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis says nothing for longer than we wait: publishing fails, listening goes on without loss."""
    monkeypatch.setattr(_link, "QUIET", 0.1)
    monkeypatch.setattr(_link, "COMMAND", 0.1)
    with own_redis.client() as outside:
        async with open_at(own_redis) as broker, broker.subscribe("news") as events:
            first = await broker.publish("news", 0)
            outside.client_pause(1_000)
            with pytest.raises(BrokerUnavailable, match=r"127\.0\.0\.1"):
                await broker.publish("news", "paused")
            await until(lambda: broker._losing is not None)
            await until(lambda: broker._losing is None)
            async with broker.subscribe("news", first) as back:
                await publish(broker, 1)
                got = data(await take(events, 2))
                while got[-1] != "1":
                    got += data(await take(events, 1))
                assert [each for each in got if each != "paused"] == ["0", "1"]
                assert (await take(back, 1))[0].data in ("1", "paused")


@on_asyncio
async def test_quiet_is_not_away(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_link, "QUIET", 0.01)
    monkeypatch.setattr(_link, "COMMAND", 0.2)
    async with open_at(redis_server, prefix="quiet:") as broker, broker.subscribe("news") as events:
        with redis_server.client() as outside:
            pings = outside.info("commandstats")["cmdstat_ping"]["calls"]
            await until(lambda: outside.info("commandstats")["cmdstat_ping"]["calls"] > pings + 3)
        await broker.publish("news", "x")
        assert data(await take(events, 1)) == ["x"]


@on_asyncio
async def test_the_connection_that_listens_is_killed_all_the_time(redis_server: RedisServer) -> None:
    many = 400
    async with open_at(redis_server, prefix="killed:") as here, open_at(redis_server, prefix="killed:") as there:
        with redis_server.client() as outside:

            async def publish_all() -> None:
                for number in range(many):
                    await there.publish("news", number)
                    if number % 50 == 25:
                        outside.client_kill_filter(_type="pubsub")
                        await anyio.sleep(0.02)

            async with here.subscribe("news") as events, asyncio.TaskGroup() as group:
                group.create_task(publish_all())
                assert data(await take(events, many)) == [*map(str, range(many))]


@on_asyncio
async def test_joining_and_leaving_while_connections_are_killed(redis_server: RedisServer) -> None:
    async with open_at(redis_server, prefix="churn:") as broker:
        with redis_server.client() as outside:

            async def come_and_go(number: int) -> None:
                for turn in range(20):
                    async with broker.subscribe(f"{number}") as events:
                        id = None
                        while id is None:
                            try:
                                id = await broker.publish(f"{number}", turn)
                            except BrokerUnavailable:
                                await anyio.sleep(0.005)
                        while (await take(events, 1))[0].id != id:
                            pass

            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(come_and_go(number)) for number in range(20)]
                while not all(task.done() for task in tasks):
                    outside.client_kill_filter(_type="pubsub")
                    outside.client_kill_filter(_type="normal", skipme=True)
                    await anyio.sleep(0.03)
            await until(lambda: not broker._channels)
            await until(lambda: not outside.pubsub_channels("churn:channel:*"))


@on_asyncio
async def test_who_could_not_listen_is_not_slow(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_link, "BACK_OFF", (0.4, 0.4))
    async with open_at(redis_server, prefix="slow:") as here, open_at(redis_server, prefix="slow:") as there:
        async with here.subscribe("news", lag=2, slow="end") as events:
            with anyio.move_on_after(0.01):
                await anext(events)
            with redis_server.client() as outside:
                outside.client_kill_filter(_type="pubsub")
            for number in range(10):
                await there.publish("news", number)
            assert data(await take(events, 10)) == [*"0123456789"]


@on_asyncio
async def test_an_id_of_which_this_worker_has_not_heard_yet(redis_server: RedisServer) -> None:
    async with open_at(redis_server, prefix="ahead:") as here, open_at(redis_server, prefix="ahead:") as there:
        async with there.subscribe("news"):
            topic = there._names.topic("news")
            hear, there._link._wanted[topic] = (
                there._link._wanted[topic],
                lambda message: None,
            )  # it is deaf for a while
            id = await here.publish("news", "seen elsewhere")
            async with there.subscribe("news", id) as events:
                async with anyio.create_task_group() as group:

                    async def first() -> None:
                        assert data(await take(events, 1)) == ["new"]

                    group.start_soon(first)
                    await until(lambda: str(there._channels["news"].log.place) == id)
                    there._link._wanted[topic] = hear
                    await here.publish("news", "new")


@on_asyncio
async def test_who_is_at_the_same_place_reads_together(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    ask = RedisBroker.ask_patiently

    async def count(self: RedisBroker, *arguments: Any) -> Any:
        asked.append(arguments)
        return await ask(self, *arguments)

    monkeypatch.setattr(RedisBroker, "ask_patiently", count)
    async with open_at(redis_server, prefix="together:") as broker:
        await broker.publish("news", "first")
        async with broker.subscribe("news", "1-1") as a, broker.subscribe("news", "1-1") as b:
            both = await asyncio.gather(take(a, 2), take(b, 2))
        assert len(asked) == 1
        assert data(both[0]) == data(both[1]) == ['{"missed":null}', "first"]


@on_asyncio
async def test_what_others_say_on_our_channels_is_ignored(redis_server: RedisServer) -> None:
    async with open_at(redis_server, prefix="garbage:") as broker, broker.subscribe("news") as events:
        with redis_server.client() as outside:
            for message in [b"", b"garbage", b"\xff\xfe 5", b"1-", b"5-5 data: old\r\n\r\n"]:
                outside.publish("garbage:channel:news", message)
        for kind in (b"message", b"unsubscribe"):  # of a channel that was left meanwhile
            broker._link._hear({"type": kind.decode(), "channel": b"garbage:channel:left", "data": b"1-1 "})
        await broker.publish("news", "x")
        assert data(await take(events, 1)) == ["x"]


@on_asyncio
async def test_commands_fail_while_listening_works(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_redis, "AGAIN", 0.01)
    monkeypatch.setattr(in_redis, "SPARE", 0.1)
    async with open_at(redis_server, prefix="broken:", patience=0.1) as broker:
        run = broker._link.run

        async def fail(*args: Any) -> list[Any]:
            raise BrokerUnavailable("out of memory")

        monkeypatch.setattr(broker._link, "run", fail)
        with pytest.raises(BrokerUnavailable, match="no answer"):
            async with broker.subscribe("news"):
                pass
        monkeypatch.setattr(broker, "_patience", DEADLINE)
        async with anyio.create_task_group() as group:

            async def listen() -> None:
                async with broker.subscribe("news", "1-1") as events:
                    assert isinstance((await take(events, 1))[0], Gap)
                    monkeypatch.setattr(broker, "_patience", 0.1)
                    monkeypatch.setattr(broker._link, "run", fail)
                    events._here = NOWHERE
                    with pytest.raises(BrokerUnavailable, match="no answer"):
                        await anext(events)

            group.start_soon(listen)
            await anyio.sleep(0.03)
            monkeypatch.setattr(broker._link, "run", run)


# -- connections -----------------------------------------------------------------------------


def connections(outside: redis.Redis, name: str) -> int:
    return sum(each["name"] == name for each in outside.client_list())


@asynccontextmanager
async def subscribers(broker: RedisBroker, number: int, channels: int) -> AsyncIterator[None]:
    inside = 0

    async def listen(channel: str) -> None:
        nonlocal inside
        async with broker.subscribe(channel) as events:
            inside += 1
            async for _ in events:
                pass

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(listen(f"{each % channels}")) for each in range(number)]
        await until(lambda: inside == number)
        yield
        for task in tasks:
            task.cancel()


@on_asyncio
async def test_few_connections_however_many_subscribers(redis_server: RedisServer) -> None:
    with redis_server.client() as outside:
        async with connect(f"{redis_server.url}?client_name=few", connections=3, prefix="few:") as broker:
            assert isinstance(broker, RedisBroker)
            async with subscribers(broker, 1_000, 300):
                assert outside.pubsub_numpat() == 0
                assert len(outside.pubsub_channels("few:channel:*")) == 300
                async with asyncio.TaskGroup() as group:
                    for number in range(300):
                        group.create_task(broker.publish(f"{number}", "x"))
                    for number in range(100):
                        group.create_task(come_back(broker, f"{number}"))
                assert 1 < connections(outside, "few") <= 4
        assert outside.pubsub_channels("few:channel:*") == []


async def come_back(broker: RedisBroker, channel: str) -> None:
    async with broker.subscribe(channel, "1-1") as events:
        await take(events, 1)


@on_asyncio
async def test_a_thousand_rounds_leave_nothing(redis_server: RedisServer) -> None:
    with redis_server.client() as outside:
        async with connect(f"{redis_server.url}?client_name=rounds", prefix="rounds:") as broker:
            assert isinstance(broker, RedisBroker)
            await broker.publish("news", "x")
            before = outside.pubsub_channels("rounds:channel:*")
            for _ in range(1_000):
                async with broker.subscribe("news"):
                    pass
            assert outside.pubsub_channels("rounds:channel:*") == before == []
            assert outside.pubsub_numsub("rounds:channel:news") == [(b"rounds:channel:news", 0)]
            assert outside.pubsub_numpat() == 0
            assert outside.info("clients")["blocked_clients"] == 0
            assert connections(outside, "rounds") <= 5
            assert not broker._channels
        await until(lambda: connections(outside, "rounds") == 0)


@on_asyncio
async def test_no_task_is_left(redis_server: RedisServer) -> None:
    before = asyncio.all_tasks()
    async with open_at(redis_server, prefix="tasks:") as broker, broker.subscribe("news", "1-1") as events:
        await take(events, 1)
    assert asyncio.all_tasks() == before


def test_opened_again_in_another_event_loop(redis_server: RedisServer) -> None:
    """As tests do with the broker of an application."""
    broker = open_at(redis_server)

    async def use(text: str) -> None:
        async with broker, broker.subscribe("loops") as events:
            async with anyio.create_task_group() as group:  # more than there are connections
                for _ in range(10):
                    group.start_soon(broker.publish, "loops", text)
            assert data(await take(events, 10)) == [text] * 10

    for text in ("first", "second"):
        asyncio.run(use(text))


@on_asyncio
async def test_cancelled_while_it_opens(own_redis: RedisServer) -> None:
    """Whenever: no connection is left, and no task."""
    await anyio.sleep(0)
    tasks = len(asyncio.all_tasks())
    with own_redis.client() as outside:
        for turns in count():
            broker = open_at(own_redis)
            opening = asyncio.get_running_loop().create_task(broker.open())
            for _ in range(turns):
                await asyncio.sleep(0)
            in_time = opening.cancel()
            await asyncio.wait([opening])
            if not opening.cancelled():  # redis-py can lose it
                await broker.aclose()
            assert len(asyncio.all_tasks()) == tasks
            await until(lambda: len(outside.client_list()) == 1)
            if not in_time:
                return


@on_asyncio
async def test_opened_twice(redis_server: RedisServer) -> None:
    async with open_at(redis_server) as broker:
        with pytest.raises(RuntimeError, match="the broker is open already"):
            await broker.open()
        await broker.publish("news", "still there")
