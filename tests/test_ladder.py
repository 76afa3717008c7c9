"""Signal, grace, cancel once, cleanup, force. In process, with each of the three ladders, and with one made late."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, cast

import anyio
import pytest
from anyio.to_thread import run_sync

from fastapi_cancel import CancelPolicy, Cause, _native
from fastapi_cancel._light import LightChannel
from fastapi_cancel._native import NativeLadder
from fastapi_cancel._scoped import GroupLadder, ScopedLadder
from fastapi_cancel.ladder import DONE, Ladder
from fastapi_cancel.protect import ladder_for

pytestmark = pytest.mark.anyio
native = pytest.mark.parametrize("anyio_backend", ["asyncio-native", "asyncio-late"], indirect=True)
scoped = pytest.mark.parametrize("anyio_backend", ["asyncio-scoped"], indirect=True)
edges = pytest.mark.parametrize("anyio_backend", ["asyncio-native", "asyncio-late", "asyncio-scoped"], indirect=True)
SCOPE = {"type": "http", "method": "GET", "path": "/export", "root_path": "/api"}
Work = Callable[[], Coroutine[Any, Any, None]]
Kind = Callable[..., Awaitable[Ladder]]


async def in_task(function: Callable[[], Awaitable[None]]) -> None:
    """Run in a plain task, without any AnyIO scope around."""
    await asyncio.create_task(function())  # type: ignore[arg-type]


class Unwatched(LightChannel):
    def watch(self) -> bool:
        return True


class Late:
    """The ladder of a request that gets it when something is first asked of it: when a method is called, say."""

    def __init__(self, channel: Unwatched) -> None:
        self.__dict__["channel"] = channel

    def run(self, work: Coroutine[Any, Any, None]) -> Awaitable[None]:
        return cast(Awaitable[None], self.__dict__["channel"].drive(work))

    def __getattr__(self, name: str) -> Any:
        if callable(getattr(NativeLadder, name, None)):
            return lambda *args, **kwargs: getattr(self.__dict__["channel"].ladder, name)(*args, **kwargs)
        return getattr(self.__dict__["channel"].ladder, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["channel"].ladder, name, value)


async def unused(*args: Any) -> Any:
    raise AssertionError


def make(kind: str, **policy: Any) -> Ladder:
    if kind == "group":
        return GroupLadder(CancelPolicy(**policy), SCOPE)
    task = asyncio.current_task()
    assert task is not None
    if kind == "late" and "timeout" not in policy:  # else it has one from the beginning
        return cast(Ladder, Late(Unwatched(SCOPE, unused, unused, CancelPolicy(**policy), None, task)))
    return (ScopedLadder if kind == "scoped" else NativeLadder)(CancelPolicy(**policy), SCOPE, task)


@pytest.fixture(params=["asyncio-native", "asyncio-late", "asyncio-scoped", "asyncio-group", "trio-group"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param).split("-")[0]


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.node.callspec.params["anyio_backend"]
    return name.split("-")[1]


@pytest.fixture
def edge(kind: str) -> bool:
    """Whether a cleanup can await without a shield."""
    return kind != "group"


async def run(kind: str, work: Work, started: anyio.Event, cause: Any = "disconnect", **policy: Any) -> Ladder:
    """Run ``work``; give the signal from another task once ``started`` is set."""
    ladders: list[Ladder] = []

    async def host() -> None:
        ladders.append(ladder := make(kind, **policy))

        async def signal() -> None:
            await started.wait()
            assert ladder.signal(cause)
            assert not ladder.signal("stop")

        if kind == "group":
            async with anyio.create_task_group() as group:
                group.start_soon(signal)
                await ladder.run(work())
        else:
            signalling = asyncio.create_task(signal())
            await ladder.run(work())
            await signalling

    with anyio.fail_after(5):
        if kind in ("native", "late"):
            await in_task(host)
        elif kind == "scoped":
            with anyio.CancelScope():
                await host()
        else:
            await host()
    assert ladders[0].state == DONE
    return ladders[0]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("anyio_backend", ["asyncio-group", "trio-group"], indirect=True)
async def test_a_cleanup_that_hangs_is_forced_though_the_server_cancels_meanwhile(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """C7, C14: what unwinds from an error of its own is shielded from the server."""
    hanging = anyio.Event()

    async def work() -> None:
        ladder.signal("disconnect")
        ladder.settle()
        hanging.set()
        await anyio.sleep_forever()

    async def cancel() -> None:
        await hanging.wait()
        server.cancel()

    ladder = make(kind, cleanup_timeout=0.1)
    with anyio.CancelScope() as server:
        async with anyio.create_task_group() as group:
            group.start_soon(cancel)
            await ladder.run(work())
    assert "cleanup not finished after 0.1 s" in caplog.text
    assert ladder.state == DONE


async def test_the_work_is_cancelled_once_and_its_cleanup_awaits(kind: str, edge: bool) -> None:
    """C7."""
    started, seen = anyio.Event(), list[Any]()

    async def work() -> None:
        try:
            started.set()
            await anyio.sleep_forever()
        except BaseException as exc:
            seen.append(isinstance(exc, anyio.get_cancelled_exc_class()))
            raise
        finally:
            with anyio.CancelScope(shield=not edge):
                for _ in range(5):
                    await anyio.sleep(0.001)
                seen.append("cleaned")

    ladder = await run(kind, work, started)
    assert seen == [True, "cleaned"]
    assert ladder.cause == "disconnect"


async def test_the_cancellation_comes_in_the_next_turn_or_two(kind: str) -> None:
    """C3."""
    started = anyio.Event()
    turns = 0
    counting = True

    async def count() -> None:
        nonlocal turns
        await started.wait()
        while counting:
            await anyio.sleep(0)
            turns += 1

    async def work() -> None:
        nonlocal counting
        try:
            started.set()
            await anyio.sleep_forever()
        finally:
            counting = False

    async with anyio.create_task_group() as group:
        group.start_soon(count)
        await anyio.sleep(0)
        await run(kind, work, started)
    assert turns <= 4  # the task that signals takes one, the counter's own last turn is another


async def test_a_swallowed_cancellation_is_forced_at_the_deadline(
    kind: str, edge: bool, caplog: pytest.LogCaptureFixture
) -> None:
    started, seen = anyio.Event(), list[Any]()

    async def work() -> None:
        for _ in range(3):
            try:
                started.set()
                await anyio.sleep_forever()
            except anyio.get_cancelled_exc_class():
                seen.append("cancelled")
        raise anyio.get_cancelled_exc_class() if edge else ValueError

    if edge:
        await run(kind, work, started, cleanup_timeout=0.05)
        assert seen == ["cancelled"] * 3
        assert "GET /api/export: cleanup not finished after 0.05 s (cause: disconnect), forcing it" in caplog.text
    else:  # Trio's own semantics: each await raises, at once
        with pytest.raises(ExceptionGroup):
            await run(kind, work, started)
        assert caplog.text == ""


async def test_a_work_behind_a_shield_is_reported_and_not_torn_down(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """C8."""
    started, seen = anyio.Event(), list[Any]()

    async def work() -> None:
        with anyio.CancelScope(shield=True):
            started.set()
            await anyio.sleep(0.1)
            seen.append("committed")
        await anyio.sleep_forever()

    await run(kind, work, started, cleanup_timeout=0.03)
    assert seen == ["committed"]
    assert "still shielded" in caplog.text or kind == "group"


async def test_threads_are_waited_for(kind: str) -> None:
    """C8, C9."""
    started, seen = anyio.Event(), list[Any]()

    async def work() -> None:
        def thread() -> None:
            anyio.from_thread.run_sync(started.set)
            while not seen:
                seen.append("thread")

        await run_sync(thread)
        await anyio.sleep_forever()

    await run(kind, work, started)
    assert seen == ["thread"]


@edges
async def test_tasks_that_the_work_awaits_are_cancelled_once(kind: str, edge: bool) -> None:
    """Also when the cancellation had to wait for a shield."""
    started, seen = anyio.Event(), list[Any]()

    async def job() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.02)
            seen.append("job")

    async def work() -> None:
        with anyio.CancelScope(shield=True):
            started.set()
            await anyio.sleep(0.01)
        await asyncio.gather(job(), asyncio.create_task(job()), return_exceptions=True)

    await run(kind, work, started)
    assert seen == ["job", "job"]


@edges
async def test_a_result_that_has_arrived_is_not_lost(kind: str, edge: bool) -> None:
    """A connection that the pool has handed out must reach whoever gives it back."""
    started, seen = anyio.Event(), list[Any]()
    connection: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def work() -> None:
        seen.append(await connection)
        try:
            await anyio.sleep_forever()
        finally:
            seen.append("given back")

    async def hand_over() -> None:
        await anyio.sleep(0.01)
        connection.set_result("connection")
        started.set()

    async with anyio.create_task_group() as group:
        group.start_soon(hand_over)
        await run(kind, work, started)
    assert seen == ["connection", "given back"]


async def test_a_timeout_of_the_works_own_is_left_alone(kind: str) -> None:
    started, seen = anyio.Event(), list[Any]()

    async def work() -> None:
        with anyio.move_on_after(0.01):
            await anyio.sleep_forever()
        seen.append("moved on")
        with pytest.raises(TimeoutError):
            with anyio.fail_after(0.01):
                await anyio.sleep_forever()
        started.set()
        await anyio.sleep_forever()

    await run(kind, work, started)
    assert seen == ["moved on"]


async def test_timeouts_work_inside_the_cleanup(kind: str, edge: bool) -> None:
    started, seen = anyio.Event(), list[Any]()

    async def work() -> None:
        try:
            started.set()
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=not edge):
                with anyio.move_on_after(0.01) as scope:
                    await anyio.sleep_forever()
                seen.append(scope.cancelled_caught)
                if edge:
                    with pytest.raises(TimeoutError):
                        async with asyncio.timeout(0.01):
                            await asyncio.sleep(60)
                    seen.append("timeout")

    await run(kind, work, started)
    assert seen == [True, "timeout"] if edge else [True]


@edges
async def test_a_signal_while_a_timeout_of_the_work_unwinds(kind: str, edge: bool) -> None:
    """The work is interrupted already; ours waits until that is over."""
    started, seen = anyio.Event(), list[Any]()

    async def work() -> None:
        try:
            async with asyncio.timeout(0.01):
                try:
                    await asyncio.sleep(60)
                finally:
                    started.set()
                    await asyncio.sleep(0.02)
                    seen.append("first cleanup")
        except TimeoutError:
            seen.append("timeout")
        await asyncio.sleep(60)

    await run(kind, work, started)
    assert seen == ["first cleanup", "timeout"]


async def test_grace(kind: str) -> None:
    started, seen = anyio.Event(), list[Any]()

    async def finishes() -> None:
        started.set()
        await anyio.sleep(0.02)
        seen.append("finished by itself")

    async def goes_on() -> None:
        try:
            started.set()
            await anyio.sleep_forever()
        finally:
            seen.append("cancelled")

    await run(kind, finishes, started, grace=3)
    started = anyio.Event()
    await run(kind, goes_on, started, grace=0.02)
    assert seen == ["finished by itself", "cancelled"]


async def test_complete_wins_over_a_cancellation_that_is_due(kind: str) -> None:
    """C5."""
    started, seen = anyio.Event(), list[Any]()
    ladders: list[Ladder] = []

    async def work() -> None:
        with anyio.CancelScope(shield=True):
            started.set()
            await anyio.sleep(0.01)
        ladders[0].complete()
        if kind != "group":
            await anyio.sleep(0.01)
        seen.append("background")

    async def host() -> None:
        ladders.append(make(kind))
        if kind == "group":
            async with anyio.create_task_group() as group:
                group.start_soon(signal)
                await ladders[0].run(work())
        else:
            signalling = asyncio.create_task(signal())
            await ladders[0].run(work())
            await signalling

    async def signal() -> None:
        await started.wait()
        ladders[0].signal("timeout")

    await (in_task(host) if kind in ("native", "late") else host())
    assert seen == ["background"]


async def test_the_time_limit(kind: str) -> None:
    ladder = make(kind, timeout=0.02)

    async def work() -> None:
        await anyio.sleep_forever()

    with anyio.fail_after(5):
        await ladder.run(work())
    assert ladder.cause == "timeout"


async def test_causes_that_the_policy_leaves_out_are_ignored(kind: str) -> None:
    ladder = make(kind, causes=["stop"])

    async def work() -> None:
        assert not ladder.signal("disconnect")
        assert ladder.signal("stop")
        ladder.listen(lambda: seen.append("told late"))
        await anyio.sleep_forever()

    seen: list[str] = []
    ladder.listen(lambda: seen.append("told"))
    with anyio.fail_after(5):
        await ladder.run(work())
    assert seen == ["told", "told late"]


async def test_settle_spares_the_cancellation(kind: str) -> None:
    """C7: the work unwinds from its own error when the cancellation would come."""
    ladder = make(kind)
    seen: list[Any] = []

    async def work() -> None:
        try:
            ladder.signal("disconnect")
            ladder.settle()
            raise OSError
        finally:
            await anyio.sleep(0.01)
            seen.append("cleaned")

    with pytest.raises(OSError):  # noqa: PT011
        await ladder.run(work())
    assert seen == ["cleaned"]


async def test_settle_within_the_grace(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    ladder = make(kind, grace=0.5, cleanup_timeout=0.5)

    async def work() -> None:
        ladder.signal("disconnect")
        ladder.settle()
        try:
            await anyio.sleep(0.55)
            seen.append("no longer than grace and cleanup_timeout")
            await anyio.sleep_forever()
        finally:
            seen.append("forced")

    seen: list[str] = []
    with anyio.fail_after(5):
        await ladder.run(work())
    assert seen == ["no longer than grace and cleanup_timeout", "forced"]


async def test_an_attempt_that_comes_too_late_does_nothing(kind: str) -> None:
    """It was due when the work began to wait, and is not when the loop gets to it."""
    ladder = make(kind)

    async def work() -> None:
        ladder.complete()
        ladder._attempt()
        await anyio.sleep(0.001)

    await ladder.run(work())
    assert ladder.state == DONE


async def test_an_error_passes(kind: str) -> None:
    ladder = make(kind)

    async def work() -> None:
        await anyio.sleep(0)
        raise KeyError

    with pytest.raises(KeyError):
        await ladder.run(work())


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
async def test_an_error_that_ends_the_process_passes_bare(kind: str, error: type[BaseException]) -> None:
    ladder = make(kind)

    async def work() -> None:
        await anyio.sleep(0.001)
        raise error

    with pytest.raises(BaseException) as info:  # noqa: PT011
        await ladder.run(work())
    assert info.type is error


@pytest.mark.parametrize("anyio_backend", ["asyncio-scoped", "asyncio-group", "trio-group"], indirect=True)
async def test_a_result_is_not_lost_to_a_cancellation_from_further_out(kind: str) -> None:
    """The response is out; that somebody cancels the caller from then on must not undo it."""
    ladder = make(kind)
    reached = []

    with anyio.CancelScope() as scope:

        async def work() -> None:
            await anyio.sleep(0.001)
            ladder.complete()
            scope.cancel()

        await ladder.run(work())
        reached.append(True)
    assert reached


async def test_an_error_of_the_cleanup_passes(kind: str, edge: bool) -> None:
    started = anyio.Event()

    async def work() -> None:
        try:
            started.set()
            await anyio.sleep_forever()
        finally:
            raise KeyError

    with pytest.raises((KeyError, ExceptionGroup)):
        await run(kind, work, started)


@native
async def test_closing_the_coroutine_closes_the_work(kind: str) -> None:
    """As an event loop does that is closed over its tasks."""
    seen: list[Any] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        except GeneratorExit:
            seen.append("closed")
            raise

    async def host() -> None:
        await make(kind).run(work())

    coro = host()
    coro.send(None)
    coro.close()
    assert seen == ["closed"]


@edges
async def test_the_cleanup_gets_its_time_after_a_shield_that_took_longer(kind: str) -> None:
    """C7, C8: being shielded for longer than `cleanup_timeout` is not a cleanup."""
    started, seen = anyio.Event(), list[Any]()

    async def work() -> None:
        try:
            with anyio.CancelScope(shield=True):
                started.set()
                await anyio.sleep(0.6)
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(0.001)
            await anyio.sleep(0.001)
            seen.append("cleaned")

    await run(kind, work, started, cleanup_timeout=0.5)
    assert seen == ["cleaned"]


@edges
async def test_a_cleanup_that_shields_itself_is_forced_after_that(kind: str) -> None:
    started, seen = anyio.Event(), list[Any]()

    async def work() -> None:
        try:
            started.set()
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.1)
                seen.append("shielded")
            await anyio.sleep_forever()

    await run(kind, work, started, cleanup_timeout=0.03)
    assert seen == ["shielded"]


@scoped
async def test_a_shield_further_out_shields_from_what_is_further_out_only(kind: str) -> None:
    """C8: a middleware may shield the whole application."""
    ladder = make(kind)
    asyncio.get_running_loop().call_later(0.01, ladder.signal, "disconnect")
    with anyio.fail_after(5), anyio.CancelScope(shield=True):
        await ladder.run(asyncio.sleep(60))


@edges
async def test_a_cancellation_that_the_work_swallowed_does_not_keep_ours_away(kind: str) -> None:
    """Somebody cancelled the task, the work ignored that and never called `uncancel`."""
    ladder = make(kind, cleanup_timeout=0.5)
    seen = []

    async def work() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            seen.append("swallowed")
        try:
            ladder.signal("disconnect")
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.001)
            seen.append("cleaned")

    async def host() -> None:
        with pytest.raises(asyncio.CancelledError):
            await ladder.run(work())

    with anyio.fail_after(5):
        task = asyncio.current_task()
        assert task is not None
        await host()
        task.uncancel()
    assert seen == ["swallowed", "cleaned"]


@edges
async def test_a_native_cancellation_after_the_work_took_ours_back_is_not_swallowed(kind: str) -> None:
    """C14."""
    seen = []

    async def work() -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if kind != "scoped":
                task.uncancel()
            seen.append("swallowed")
        swallowed.set()
        await asyncio.sleep(60)

    swallowed = asyncio.Event()

    async def host() -> None:
        ladder = make(kind)
        asyncio.get_running_loop().call_later(0.01, ladder.signal, "disconnect")
        await ladder.run(work())

    task = asyncio.create_task(host())
    await swallowed.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == ["swallowed"]


@native
async def test_a_request_leaves_no_reference_cycle(kind: str) -> None:
    async def host(work: Work) -> weakref.ref[Ladder]:
        ladder = make(kind)
        ladder.listen(lambda: ladder.cause)
        asyncio.get_running_loop().call_soon(ladder.signal, "disconnect")
        await ladder.run(work())
        return weakref.ref(ladder)

    async def cancelled() -> None:
        await asyncio.sleep(60)

    gc.collect()
    gc.disable()
    try:
        ladders = [await host(cancelled) for _ in range(10)]
        await asyncio.sleep(0)  # the helpers end a turn later
        assert [ladder() for ladder in ladders] == [None] * 10
    finally:
        gc.enable()


@native
@pytest.mark.parametrize("cause", [None, "disconnect"])
async def test_nor_does_one_whose_wait_fails(kind: str, cause: Cause | None) -> None:
    """In the work, or in its cleanup: an error refers to the frames that it went through, and they to the wait."""

    class Resource:
        pass

    def failing() -> asyncio.Future[None]:
        future = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(future.set_exception, ZeroDivisionError())
        return future

    async def host() -> weakref.ref[Resource]:
        ladder, resource = make(kind), Resource()

        async def work(resource: Resource) -> None:
            try:
                if cause is not None:
                    asyncio.get_running_loop().call_soon(ladder.signal, cause)
                    await asyncio.sleep(60)
            finally:
                await failing()

        try:
            await ladder.run(work(resource))
        except ZeroDivisionError:
            return weakref.ref(resource)
        raise AssertionError("no error")

    gc.collect()
    gc.disable()
    try:
        resource = await host()
        await asyncio.sleep(0)
        assert resource() is None
    finally:
        gc.enable()


def test_a_loop_that_is_closed_under_a_request() -> None:
    """No "Event loop is closed" on top of that."""
    loop = asyncio.new_event_loop()

    async def host() -> None:
        ladder = make("native")
        ladder.spawn(anyio.sleep_forever)
        await ladder.run(asyncio.sleep(60))

    coro = host()
    task = loop.create_task(coro)
    loop.run_until_complete(asyncio.sleep(0.001))
    helpers = asyncio.all_tasks(loop) - {task}
    loop.close()
    coro.close()
    for each in (task, *helpers):
        each._log_destroy_pending = False  # type: ignore[attr-defined]
        each.get_coro().close()


# -- C14: cancellation from outside --------------------------------------------------------------


async def outside(kind: str, work: Work, before: Callable[[Ladder], object] = bool) -> bool:
    """Run ``work`` in a task that is cancelled natively. Whether the cancellation came through."""
    started = asyncio.Event()
    ladders: list[Ladder] = []

    async def host() -> None:
        ladders.append(make(kind))
        with anyio.CancelScope():
            started.set()
            await ladders[0].run(work())

    task = asyncio.create_task(host())
    await started.wait()
    await anyio.sleep(0.01)
    before(ladders[0])
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        return True
    return False


@edges
async def test_a_native_cancellation_goes_through_untouched(kind: str, anyio_backend: str) -> None:
    seen: list[Any] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            seen.append("cleaned")

    assert await outside(kind, work)
    assert seen == ["cleaned"]


@edges
async def test_a_native_cancellation_in_the_same_turn_as_ours_is_not_swallowed(kind: str) -> None:

    async def work() -> None:
        await asyncio.sleep(60)

    assert await outside(kind, work, before=lambda ladder: ladder.signal("disconnect"))


@edges
async def test_a_native_cancellation_during_the_cleanup_goes_through(kind: str) -> None:
    started, seen = asyncio.Event(), list[Any]()
    tasks: list[asyncio.Task[None]] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            started.set()
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0.01)
                seen.append("inner cleanup")

    async def host() -> None:
        ladder = make(kind)
        asyncio.get_running_loop().call_later(0.01, ladder.signal, "disconnect")
        await ladder.run(work())

    tasks.append(asyncio.create_task(host()))
    await started.wait()
    tasks[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    assert seen == ["inner cleanup"]


@scoped
async def test_a_scope_further_out_reaches_the_work_once(kind: str) -> None:
    """A task group around, as BaseHTTPMiddleware's: AnyIO would cancel the cleanup at each await."""
    seen: list[Any] = []

    async def work() -> None:
        try:
            with anyio.move_on_after(0.001):
                await asyncio.sleep(60)
            moved_on.set()
            await asyncio.sleep(60)
        finally:
            for _ in range(3):
                await asyncio.sleep(0.005)
            seen.append("cleaned")

    async def cancel() -> None:
        await moved_on.wait()
        group.cancel_scope.cancel()

    moved_on = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(cancel)
        await make(kind).run(work())
        seen.append("not reached")
    assert seen == ["cleaned"]


@scoped
async def test_a_scope_further_out_waits_for_the_cleanup_of_a_cancelled_work(kind: str) -> None:
    seen: list[Any] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.04)
            seen.append("cleaned")

    with anyio.CancelScope() as scope:
        ladder = make(kind)
        asyncio.get_running_loop().call_later(0.01, ladder.signal, "disconnect")
        ladder.listen(lambda: asyncio.get_running_loop().call_later(0.01, scope.cancel))
        await ladder.run(work())
        await anyio.sleep(1)
    assert scope.cancelled_caught
    assert seen == ["cleaned"]


@edges
async def test_a_fresh_cancelled_error_is_recognised_as_ours(kind: str) -> None:
    started = anyio.Event()

    async def work() -> None:
        fresh = asyncio.CancelledError()
        try:
            started.set()
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass
        raise fresh

    await run(kind, work, started)


# -- which ladder --------------------------------------------------------------------------------


async def test_the_ladder_fits_the_task(kind: str, anyio_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[type[Ladder]] = []

    async def look() -> None:
        found.append(type(ladder_for(CancelPolicy(), SCOPE)))
        with anyio.CancelScope():
            found.append(type(ladder_for(CancelPolicy(), SCOPE)))

    if anyio_backend == "trio":
        await look()
        assert found == [GroupLadder, GroupLadder]
        return
    await in_task(look)
    assert found == [NativeLadder, ScopedLadder]
    monkeypatch.setattr(_native, "_states", None)
    await in_task(look)
    assert found[2:] == [ScopedLadder, ScopedLadder]


@scoped
async def test_shields_are_honoured_without_that_look(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """AnyIO does so by itself."""
    monkeypatch.setattr(_native, "_states", None)
    started, seen = anyio.Event(), list[Any]()

    async def work() -> None:
        with anyio.CancelScope(shield=True):
            started.set()
            await anyio.sleep(0.02)
            seen.append("committed")
        try:
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(0.001)
            seen.append("cleaned")

    await run(kind, work, started)
    assert seen == ["committed", "cleaned"]


def test_without_the_look_into_anyio_everything_goes_the_anyio_way(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    from anyio._backends import _asyncio

    monkeypatch.delattr(_asyncio, "_task_states")
    try:
        assert importlib.reload(_native)._states is None
    finally:
        monkeypatch.undo()
        importlib.reload(_native)


async def test_the_log_names_the_function(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    ladder = GroupLadder(CancelPolicy(), {"type": "http", "path": "/x", "endpoint": test_grace})
    assert ladder.name() == "http /x (test_grace)"
