"""What a visit sees of the work behind it: waits, interruptions, tasks, generators, pools, log lines. In process."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import subprocess
import sys
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import aclosing, asynccontextmanager, suppress
from contextvars import Context
from functools import partial
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
import redis.asyncio as redis
from fastapi import BackgroundTasks, FastAPI, Request
from fastapi.sse import EventSourceResponse as NativeEventSourceResponse
from starlette.concurrency import iterate_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_cancel import CancellableRoute
from fastapi_cancel.testing import Habits, LeavingClient, Moment, Patience, Visit, after_chunks, at_wait, before_body
from fastapi_cancel.testing import watching as module
from fastapi_cancel.testing.backends import AsyncioBackend
from fastapi_cancel.testing.pools import checked, in_use, name
from fastapi_cancel.testing.records import Record
from fastapi_cancel.testing.sites import Site, site_of, stack_of_waiting
from fastapi_cancel.testing.stepping import Interruption, stepped

pytestmark = pytest.mark.anyio
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])
on_trio = pytest.mark.parametrize("anyio_backend", ["trio"])

SHORT = 0.001
LONG = 60
DEADLINE = 10
"""Seconds after which a test has hung."""


def served(handler: Callable[..., Any], cancellable: bool = False, **options: Any) -> LeavingClient:
    """A client of an application that does nothing else."""
    app = FastAPI()
    if cancellable:
        app.router.route_class = CancellableRoute
    app.get("/")(handler)
    return LeavingClient(app, **options)


async def visited(handler: Callable[..., Any], **options: Any) -> Visit:
    """A visit whose client stayed."""
    return await served(handler, **options).get("/")


def kinds(visit: Visit) -> list[str]:
    return [fault.kind for fault in visit.faults]


def lines(visit: Visit) -> list[str]:
    """Those of its only fault."""
    (fault,) = visit.faults
    return str(fault).splitlines()


async def cleaning(seconds: float = LONG, cleanup: float = SHORT) -> None:
    """Work whose cleanup awaits."""
    try:
        await anyio.sleep(seconds)
    finally:
        await anyio.sleep(cleanup)


# -- a cleanup that was killed -----------------------------------------------------------------


async def in_the_same_function() -> None:
    with anyio.move_on_after(SHORT):
        try:
            await anyio.sleep(LONG)
        finally:
            await anyio.sleep(SHORT)


async def in_another_function() -> None:
    with anyio.move_on_after(SHORT):
        await cleaning()


async def while_another_error_is_handled() -> None:
    with anyio.move_on_after(SHORT):
        try:
            await anyio.sleep(LONG)
        finally:
            try:
                raise KeyError
            except KeyError:
                await cleaning(SHORT)


async def in_a_child() -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(cleaning)
        await anyio.sleep(SHORT)
        group.cancel_scope.cancel()


@asynccontextmanager
async def a_resource() -> AsyncIterator[None]:
    try:
        yield
    finally:
        await anyio.sleep(SHORT)


async def in_a_context_manager() -> None:
    with anyio.move_on_after(SHORT):
        async with a_resource():
            await anyio.sleep(LONG)


async def and_the_next_one_shielded() -> None:
    async def work() -> None:
        try:
            try:
                await anyio.sleep(LONG)
            finally:
                await anyio.sleep(SHORT)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(SHORT)

    with anyio.move_on_after(SHORT):
        await work()


@pytest.mark.parametrize(
    ("kill", "where"),
    [
        (in_the_same_function, "in_the_same_function"),
        (in_another_function, "cleaning"),
        (while_another_error_is_handled, "cleaning"),
        (in_a_child, "cleaning"),
        (in_a_context_manager, "a_resource"),
        (and_the_next_one_shielded, "and_the_next_one_shielded.<locals>.work"),
    ],
)
async def test_a_cleanup_that_is_killed(anyio_backend: str, kill: Callable[[], Awaitable[None]], where: str) -> None:
    """AnyIO's and Trio's cancellation is level-triggered: a cleanup ends at its first await."""
    visit = await visited(kill)
    assert {*kinds(visit)} == {"cleanup killed"}
    for fault in visit.faults:
        assert fault.text.startswith("interrupted again while it handled an interruption, at\n")
        assert fault.text.endswith(f" in {where}")


@on_asyncio
async def test_a_cleanup_that_somebody_cancels_natively(anyio_backend: str) -> None:
    async def work() -> None:
        task = asyncio.create_task(cleaning(cleanup=LONG))
        await asyncio.sleep(0)
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(SHORT)
        with suppress(asyncio.CancelledError):
            await task

    visit = await visited(work)
    assert lines(visit)[1:] == [line for line in lines(visit)[1:] if line.endswith(" in cleaning")]
    assert kinds(visit) == ["cleanup killed"]


@on_asyncio
async def test_a_cleanup_that_is_killed_by_the_server(anyio_backend: str) -> None:
    """gunicorn cancels natively, some time after the client has left."""
    client = served(partial(cleaning, cleanup=LONG), cancellable=True, server=Habits(cancels_after=0.02))
    visit = await client.get("/", leave=at_wait(1))
    assert kinds(visit) == ["cleanup killed"]


@on_asyncio
async def test_a_cleanup_that_somebody_else_has_interrupted(anyio_backend: str) -> None:
    """Who awaits a task that is cleaning up hands his own cancellation on. It is told of that task only."""

    async def work() -> None:
        task = asyncio.create_task(cleaning(cleanup=LONG))
        await asyncio.sleep(SHORT)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    client = served(work, cancellable=True)
    async with client.visit("GET", "/") as visit:
        await visit.until(at_wait(4))
        visit.leave()
    assert lines(visit)[1:] == [line for line in lines(visit) if line.endswith(" in cleaning")]


async def its_own_limit() -> None:
    try:
        await anyio.sleep(LONG)
    finally:
        with anyio.move_on_after(SHORT, shield=True):
            await anyio.sleep(LONG)


async def its_own_limit_that_raises() -> None:
    try:
        await anyio.sleep(LONG)
    finally:
        with suppress(TimeoutError), anyio.fail_after(SHORT, shield=True):
            await anyio.sleep(LONG)


async def its_own_limit_in_another_function() -> None:
    async def cleanup() -> None:
        with anyio.move_on_after(SHORT, shield=True):
            await anyio.sleep(LONG)
        with anyio.CancelScope(shield=True):
            await anyio.sleep(SHORT)

    try:
        await anyio.sleep(LONG)
    finally:
        await cleanup()


async def its_own_limit_that_raises_and_more_to_do() -> None:
    """The limit is a generator, to which the second interruption comes from the function that it limits."""
    try:
        await anyio.sleep(LONG)
    finally:
        with suppress(TimeoutError), anyio.fail_after(SHORT, shield=True):
            await anyio.sleep(LONG)
        with anyio.CancelScope(shield=True):
            await anyio.sleep(SHORT)


async def its_own_group() -> None:
    async def ends(group: Any) -> None:
        await anyio.sleep(SHORT)
        group.cancel_scope.cancel()

    try:
        await anyio.sleep(LONG)
    finally:
        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as group:
                group.start_soon(ends, group)
                group.start_soon(anyio.sleep, LONG)
                await anyio.sleep(LONG)


@pytest.mark.parametrize(
    "work",
    [
        its_own_limit,
        its_own_limit_that_raises,
        its_own_limit_that_raises_and_more_to_do,
        its_own_limit_in_another_function,
        its_own_group,
    ],
)
async def test_a_cleanup_that_limits_itself_is_not_killed(
    anyio_backend: str, work: Callable[[], Awaitable[None]]
) -> None:
    visit = await served(work, cancellable=True).get("/", leave=at_wait(1))
    assert (visit.cause, visit.faults) == ("disconnect", [])


async def its_own_limit_within_its_own_limit() -> None:
    try:
        await anyio.sleep(LONG)
    finally:
        with anyio.move_on_after(SHORT, shield=True):
            try:
                await anyio.sleep(LONG)
            finally:
                await anyio.sleep(SHORT)


async def its_own_limit_without_a_shield() -> None:
    try:
        await anyio.sleep(LONG)
    finally:
        with anyio.move_on_after(LONG):
            await anyio.sleep(SHORT)


@on_trio
@pytest.mark.parametrize("work", [its_own_limit_within_its_own_limit, its_own_limit_without_a_shield])
async def test_a_limit_that_protects_no_cleanup(anyio_backend: str, work: Callable[[], Awaitable[None]]) -> None:
    """Trio tells it from one that does by the scope that interrupts."""
    visit = await served(work, cancellable=True).get("/", leave=at_wait(1))
    assert (kinds(visit), visit.faults[0].text.endswith(f" in {work.__name__}")) == (["cleanup killed"], True)


async def on_its_own_account() -> None:
    with anyio.move_on_after(SHORT):
        await anyio.sleep(LONG)
    with anyio.CancelScope(shield=True):
        await anyio.sleep(SHORT)


async def for_somebody_else() -> None:
    await anyio.sleep(LONG)


@pytest.mark.parametrize(("cleanup", "found"), [(on_its_own_account, []), (for_somebody_else, ["cleanup killed"])])
async def test_a_cleanup_after_a_news_that_was_read(
    anyio_backend: str, cleanup: Callable[[], Awaitable[None]], found: list[str]
) -> None:
    """Starlette's ``ClientDisconnect`` interrupts as a cancellation does, but once only."""
    app = FastAPI()

    async def read(request: Request) -> None:
        try:
            await request.body()
        except ClientDisconnect:
            await cleanup()

    @app.post("/")
    async def upload(request: Request) -> None:
        with anyio.move_on_after(0.05):
            await read(request)

    visit = await LeavingClient(app).post("/", content=slowly(), leave=before_body())
    assert kinds(visit) == found


@on_trio
async def test_who_is_cancelled_by_a_cleanup_cleans_up_for_the_first_time(anyio_backend: str) -> None:
    """A ``Cancelled`` of Trio brings along what its sender was handling."""

    async def work() -> None:
        inner = anyio.CancelScope()

        async def other() -> None:
            with inner:
                try:
                    await anyio.sleep(LONG)
                finally:
                    with anyio.move_on_after(LONG, shield=True):
                        await anyio.sleep(SHORT)

        async with anyio.create_task_group() as group:
            group.start_soon(other)
            await anyio.sleep(SHORT)
            with anyio.move_on_after(SHORT):
                try:
                    await anyio.sleep(LONG)
                finally:
                    inner.cancel()

    assert (await visited(work)).faults == []


@on_asyncio
async def test_a_cleanup_that_limits_itself_as_asyncio_does_is_not_killed(anyio_backend: str) -> None:
    async def work() -> None:
        try:
            await asyncio.sleep(LONG)
        finally:
            with suppress(TimeoutError):
                async with asyncio.timeout(SHORT):
                    await asyncio.sleep(LONG)
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.sleep(LONG), SHORT)
            async with asyncio.TaskGroup() as group:
                group.create_task(asyncio.sleep(SHORT))

    visit = await served(work, cancellable=True).get("/", leave=at_wait(1))
    assert (visit.cause, visit.faults) == ("disconnect", [])


@on_asyncio
async def test_a_limit_around_a_cleanup_kills_it(anyio_backend: str) -> None:
    async def work() -> None:
        async with asyncio.timeout(0.02):
            await cleaning(cleanup=LONG)

    visit = await served(work, cancellable=True).get("/", leave=at_wait(1))
    assert kinds(visit) == ["cleanup killed"]


async def test_an_interruption_that_is_over_is_no_first_one(anyio_backend: str) -> None:
    """A second try after a first one that took too long."""

    async def work() -> None:
        for _ in range(3):
            try:
                with anyio.fail_after(SHORT):
                    await anyio.sleep(LONG)
            except TimeoutError:
                with anyio.move_on_after(SHORT):
                    await anyio.sleep(LONG)

    assert (await visited(work)).faults == []


@on_asyncio
async def test_an_interruption_that_is_over_is_no_first_one_to_asyncio(anyio_backend: str) -> None:
    async def work() -> None:
        try:
            async with asyncio.timeout(SHORT):
                await asyncio.sleep(LONG)
        except TimeoutError:
            task = asyncio.current_task()
            assert task is not None
            asyncio.get_running_loop().call_later(SHORT, task.cancel)
            await asyncio.sleep(LONG)

    visit = await visited(work)
    assert isinstance(visit.error, asyncio.CancelledError)
    assert "cleanup killed" not in kinds(visit)


@on_asyncio
async def test_a_group_that_waits_for_its_children_loses_nothing(anyio_backend: str) -> None:
    """It is cancelled again and again meanwhile."""

    async def work() -> None:
        with anyio.move_on_after(SHORT):
            async with anyio.create_task_group() as group:
                group.start_soon(shielded)
                await anyio.sleep(LONG)

    async def shielded() -> None:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0.01)

    assert (await visited(work)).faults == []


@on_asyncio
async def test_a_task_that_was_cancelled_is_awaited(anyio_backend: str) -> None:
    """The most usual cleanup of all: its CancelledError is nobody's interruption."""

    async def work() -> None:
        task = asyncio.create_task(cleaning())
        await asyncio.sleep(SHORT)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await asyncio.sleep(SHORT)

    assert (await visited(work)).faults == []


def test_an_interruption_without_a_traceback() -> None:
    """Somebody has made a context by hand."""
    second = asyncio.CancelledError()
    interruption = Interruption(second, 1)
    second.__context__ = KeyError()
    second.__context__.__context__ = asyncio.CancelledError()
    assert interruption.has_killed(2, over=False) is None
    assert interruption.has_killed(1, over=False) is False
    assert interruption.has_killed(0, over=False) is True


def test_a_kill_in_nobodys_code() -> None:
    """There is no line of the user's to look at: a framework knows what it does."""
    record = Record(AsyncioBackend.__new__(AsyncioBackend))
    with pytest.raises(json.JSONDecodeError) as info:
        json.loads("x")
    assert info.value.__traceback__ is not None
    record.judged(info.value.with_traceback(info.value.__traceback__.tb_next), True)
    assert record.faults == []


def test_contexts_in_a_circle() -> None:
    second, error = asyncio.CancelledError(), KeyError()
    interruption = Interruption(second, 1)
    second.__context__ = error
    error.__context__ = second.__context__
    assert interruption.has_killed(0, over=True) is False


@on_asyncio
async def test_work_that_is_thrown_away_is_closed(anyio_backend: str) -> None:
    """As an event loop does that ends before its tasks."""

    async def work() -> None:
        try:
            await asyncio.sleep(LONG)
        finally:
            closed.append(True)

    closed: list[bool] = []
    stepping: Any = stepped(work(), Record(AsyncioBackend()))
    stepping.send(None)
    stepping.close()
    assert closed == [True]


# -- waits -------------------------------------------------------------------------------------


async def test_waits_of_all_tasks_are_counted(anyio_backend: str) -> None:
    async def child() -> None:
        waited.append(visit.waits)
        await anyio.sleep(0)
        waited.append(visit.waits)

    async def work() -> None:
        await anyio.sleep(0)
        async with anyio.create_task_group() as group:
            group.start_soon(child)

    waited: list[int] = []
    async with served(work).visit("GET", "/") as visit:
        pass
    assert visit.waits >= 3 and waited[0] < waited[1] and visit.faults == []


async def test_where_work_waits(anyio_backend: str) -> None:
    async def numbers() -> AsyncGenerator[int, None]:
        await anyio.sleep(LONG)
        yield 1

    async def work() -> None:
        async with aclosing(numbers()) as each:
            await anext(each)

    async with served(work, cancellable=True).visit("GET", "/", leave=at_wait(1)) as visit:
        await visit.until(at_wait(1))
        waits = [line.rpartition(" in ")[2] for line in visit.where.splitlines()]
    assert waits == [f"test_where_work_waits.<locals>.{name}" for name in ("work", "numbers")]


async def test_where_work_that_has_not_begun_waits(anyio_backend: str) -> None:
    async with served(cleaning).visit("GET", "/") as visit:
        assert visit.where == "    nowhere known"
        await visit.until(at_wait(1))
        visit.leave()


def test_where_work_that_runs_waits() -> None:
    """Nowhere, and Python 3.11 is not to be asked: test_routing and test_channel in one process crashed."""

    class Running:
        cr_running = True

        def __init__(self) -> None:
            self.cr_frame = sys._getframe()

        @property
        def cr_await(self) -> None:
            raise AssertionError("asked")

    assert [site.function.rpartition(".")[2] for site in stack_of_waiting(Running())] == ["__init__"]


# -- tasks -------------------------------------------------------------------------------------


@on_asyncio
async def test_a_task_that_is_left(anyio_backend: str) -> None:
    async def work() -> None:
        tasks.append(asyncio.create_task(cleaning()))

    tasks: list[asyncio.Task[None]] = []
    visit = await visited(work)
    text = lines(visit)
    assert text[0] == "task left: cleaning, created at"
    assert text[1].endswith(" in test_a_task_that_is_left.<locals>.work")
    assert text[2] == "  waits at" and text[3].endswith(" in cleaning")
    assert tasks[0].cancelled()  # it does not go on in the next test
    with pytest.raises(AssertionError, match="task left: cleaning, created at"):
        visit.assert_clean()


async def test_a_task_that_is_left_to_the_group_of_an_application(anyio_backend: str) -> None:
    async def work() -> None:
        groups[0].start_soon(cleaning)

    groups = []
    async with anyio.create_task_group() as group:
        groups.append(group)
        visit = await visited(work)
        assert lines(visit)[0] == "task left: tests.test_watching.cleaning, created at"
        group.cancel_scope.cancel()


@on_asyncio
async def test_a_task_that_is_left_may_clean_up(anyio_backend: str) -> None:
    async def work() -> None:
        tasks.append(asyncio.create_task(cleans()))

    async def cleans() -> None:
        try:
            await asyncio.sleep(LONG)
        finally:
            await asyncio.sleep(0.02)
            cleaned.append(True)

    cleaned: list[bool] = []
    tasks: list[asyncio.Task[None]] = []
    assert (kinds(await visited(work)), cleaned) == (["task left"], [True])


@on_asyncio
async def test_a_task_that_is_left_and_does_not_end(anyio_backend: str) -> None:
    async def stubborn() -> None:
        while True:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(LONG)

    async def work() -> None:
        tasks.append(asyncio.create_task(stubborn()))

    tasks: list[asyncio.Task[None]] = []
    visit = await visited(work, patience=Patience(cancelled=0.01))
    assert (kinds(visit), tasks[0].done()) == (["task left"], True)


@on_asyncio
async def test_a_task_that_is_about_to_end_is_not_left(anyio_backend: str) -> None:
    async def work() -> None:
        task = asyncio.create_task(asyncio.sleep(LONG))
        await asyncio.sleep(0)
        task.cancel()

    assert (await visited(work)).faults == []


@on_asyncio
async def test_a_task_that_is_cancelled_before_it_begins(anyio_backend: str, recwarn: pytest.WarningsRecorder) -> None:
    """Python must not say that its coroutine was never awaited."""

    async def work() -> None:
        asyncio.create_task(cleaning()).cancel()

    assert (await visited(work)).faults == []
    gc.collect()
    assert recwarn.list == []


@on_asyncio
async def test_tasks_look_as_if_nobody_watched(anyio_backend: str) -> None:
    async def work() -> None:
        async def named(number: int) -> int:
            await asyncio.sleep(0)
            return number

        context = Context()
        task = asyncio.create_task(named(1), name="its name")
        other = asyncio.get_running_loop().create_task(named(2), context=context)
        assert task.get_name() == "its name"
        assert task.get_coro().__qualname__.endswith("work.<locals>.named")  # type: ignore[union-attr]
        assert [await task, await other] == [1, 2]
        with pytest.raises(ValueError, match="broken"):
            await asyncio.create_task(fails())

    async def fails() -> None:
        raise ValueError("broken")

    assert (await visited(work)).faults == []


@on_asyncio
async def test_a_task_of_another_context_is_not_the_requests_own(anyio_backend: str) -> None:
    async def work() -> None:
        tasks.append(asyncio.get_running_loop().create_task(asyncio.sleep(LONG), context=Context()))

    tasks: list[asyncio.Task[None]] = []
    assert (await visited(work)).faults == []
    assert not tasks[0].done()
    tasks[0].cancel()


@on_asyncio
async def test_a_factory_of_the_applications_own_is_used(anyio_backend: str) -> None:
    def factory(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Future[Any]:
        made.append(work.__qualname__)
        return asyncio.Task(work, loop=loop, **options)

    async def work() -> None:
        await asyncio.create_task(asyncio.sleep(0))

    made: list[str] = []
    loop = asyncio.get_running_loop()
    loop.set_task_factory(factory)
    try:
        assert (await visited(work)).faults == []
        assert "sleep" in made
        assert loop.get_task_factory() is factory
    finally:
        loop.set_task_factory(None)


@on_asyncio
@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.12 has eager tasks")
async def test_eager_tasks(anyio_backend: str) -> None:
    async def work() -> None:
        await asyncio.create_task(asyncio.sleep(0))
        await asyncio.create_task(ready())
        tasks.append(asyncio.create_task(cleaning()))

    async def ready() -> None:
        pass

    tasks: list[asyncio.Task[None]] = []
    loop = asyncio.get_running_loop()
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]
    try:
        visit = await visited(work)
    finally:
        loop.set_task_factory(None)
    assert kinds(visit) == ["task left"]


class Own(Coroutine[Any, Any, Any]):
    """A coroutine that is not one of Python's own."""

    def __init__(self, work: Coroutine[Any, Any, Any]) -> None:
        self._work = work

    def close(self) -> None:
        self._work.close()

    def send(self, value: Any) -> Any:
        return self._work.send(value)

    def throw(self, *exc: Any) -> Any:
        return self._work.throw(*exc)

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._work.__await__()


@on_asyncio
async def test_other_coroutines_are_left_alone(anyio_backend: str) -> None:
    async def work() -> None:
        own = Own(asyncio.sleep(0, "result"))
        assert await asyncio.get_running_loop().create_task(own) == "result"

    assert (await visited(work)).faults == []


def test_an_error_that_nobody_has_retrieved() -> None:
    """It is told of the visit whose task it was, though others run. (AnyIO's own test runner raises it in the test.)"""

    async def broken() -> None:
        async def fails() -> None:
            raise ValueError("broken")

        task = asyncio.create_task(fails())
        await asyncio.sleep(SHORT)
        assert task.done()

    async def both() -> tuple[Visit, Visit]:
        return await asyncio.gather(visited(broken), visited(partial(cleaning, SHORT)))

    first, second = asyncio.run(both())
    assert lines(first)[0] == "logged: asyncio ERROR: Task exception was never retrieved"
    assert second.faults == []


# -- generators --------------------------------------------------------------------------------


async def numbers() -> AsyncGenerator[int, None]:
    for number in range(9):
        yield number


async def test_a_generator_that_nobody_closes(anyio_backend: str) -> None:
    async def work() -> None:
        async for _ in numbers():
            break

    text = lines(await visited(work))
    assert text[0] == "generator left open: numbers, first iterated at"
    assert text[1].endswith(" in test_a_generator_that_nobody_closes.<locals>.work")
    assert text[2] == "  was left to the garbage collector at" and text[3].endswith(" in numbers")


async def test_a_generator_that_somebody_holds_open(anyio_backend: str) -> None:
    async def work() -> None:
        held.append(numbers())
        await anext(held[0])

    held: list[Any] = []
    text = lines(await visited(work))
    assert text[0] == "generator left open: numbers, first iterated at"
    assert text[2] == "  waits at" and text[3].endswith(" in numbers")
    await held[0].aclose()


def letters() -> Generator[str, None, None]:
    yield from "abc"


async def test_a_synchronous_generator_that_nobody_closes(anyio_backend: str) -> None:
    async def work() -> None:
        async for _ in iterate_in_threadpool(letters()):
            break

    text = lines(await visited(work))
    assert text[0] == "generator left open: letters, first iterated at"


async def test_a_synchronous_generator_whose_driver_has_gone(anyio_backend: str) -> None:
    """Whoever has it still may be about to close it."""

    async def work() -> None:
        held = [letters()]
        async for _ in iterate_in_threadpool(held[0]):
            break
        gc.collect()
        await anyio.sleep(0)
        held[0].close()

    assert (await visited(work)).faults == []


async def test_a_generator_in_a_circle(anyio_backend: str) -> None:
    """The collector would find it some day."""

    async def work() -> None:
        circle: dict[str, Any] = {"numbers": numbers()}
        circle["itself"] = circle
        await anext(circle["numbers"])

    assert lines(await visited(work))[2] == "  was left to the garbage collector at"


async def test_generators_that_have_ended(anyio_backend: str) -> None:
    async def fails() -> AsyncIterator[int]:
        yield 1
        raise ValueError

    async def work() -> None:
        assert [number async for number in numbers()] == list(range(9))
        async with aclosing(numbers()) as each:
            await anext(each)
        never_begun = numbers()
        del never_begun
        with suppress(ValueError):
            async for _ in fails():
                pass
        with anyio.move_on_after(SHORT):
            async for _ in sleeps():
                pass

    async def sleeps() -> AsyncIterator[int]:
        await anyio.sleep(LONG)
        yield 1

    assert (await visited(work)).faults == []


async def test_generators_of_nobodys_request(anyio_backend: str) -> None:
    """What the test opens, meanwhile, is its own affair."""
    async with served(cleaning, cancellable=True).visit("GET", "/") as visit:
        await visit.until(at_wait(1))
        for _ in range(3):  # some at the address of one that is gone
            each = numbers()
            assert await anext(each) == 0
            await each.aclose()
        left = numbers()
        await anext(left)
        visit.leave()
    assert "generator left open" not in kinds(visit)
    await left.aclose()


@on_asyncio
async def test_generators_at_the_address_of_another_ones(anyio_backend: str) -> None:
    async def work() -> None:
        for _ in range(100):
            assert [number async for number in numbers()] == list(range(9))

    async with served(work).visit("GET", "/") as visit:
        while not visit.over:
            left = numbers()
            await anext(left)
            del left
            await anyio.sleep(0)
    assert visit.faults == []


@on_asyncio
async def test_a_generator_that_is_left_is_still_closed_by_the_event_loop(anyio_backend: str) -> None:
    async def cleans() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    async def work() -> None:
        async for _ in cleans():
            break
        await asyncio.sleep(SHORT)

    cleaned: list[bool] = []
    assert (kinds(await visited(work)), cleaned) == (["generator left open"], [True])


def lines_of_text() -> Iterator[bytes]:
    while True:
        yield b"line\n"


async def test_a_synchronous_generator_below_a_frameworks_own_one(anyio_backend: str) -> None:
    """Starlette drives it by one that nobody closes; it is the user's one that counts."""

    async def work() -> StreamingResponse:
        return StreamingResponse(lines_of_text())

    visit = await served(work, server="asgi").get("/", leave=after_chunks(2))
    assert "generator left open: lines_of_text, first iterated at" in [
        line for f in visit.faults for line in str(f).splitlines()
    ]


async def test_a_frameworks_generator_with_nothing_to_close(anyio_backend: str) -> None:
    """FastAPI's one stays open, but the user's was closed, by ``CancellableRoute``."""
    app = FastAPI()
    app.router.route_class = CancellableRoute

    @app.get("/", response_class=NativeEventSourceResponse)
    def work() -> Iterator[dict[str, int]]:
        while True:
            yield {"number": 1}

    visit = await LeavingClient(app).get("/", leave=after_chunks(2))
    assert (visit.cause, visit.faults) == ("disconnect", [])


# -- what is said ------------------------------------------------------------------------------

logger = logging.getLogger("shop")


async def test_a_line_in_the_log(anyio_backend: str) -> None:
    async def work() -> None:
        logger.info("sold")
        logger.warning("low on %s", "tea")

    assert lines(await visited(work)) == ["logged: shop WARNING: low on tea"]


async def test_what_is_a_fault_in_the_log(anyio_backend: str) -> None:
    async def work() -> None:
        logger.warning("low on tea")
        logger.error("out of tea")

    assert lines(await visited(work, log_level=logging.ERROR)) == ["logged: shop ERROR: out of tea"]
    assert (await visited(work, log_level=logging.CRITICAL)).faults == []


def in_a_thread() -> None:
    logger.warning("from a thread")


async def test_a_line_is_told_of_the_visit_that_said_it(anyio_backend: str) -> None:
    visits = {}

    async def visit(name: str, work: Callable[..., Any]) -> None:
        visits[name] = await visited(work)

    async with anyio.create_task_group() as group:
        group.start_soon(visit, "loud", in_a_thread)
        group.start_soon(visit, "quiet", partial(cleaning, 0.02))
    assert (kinds(visits["loud"]), kinds(visits["quiet"])) == (["logged"], [])


async def test_a_line_that_nobody_said_is_told_of_all(anyio_backend: str) -> None:
    async with served(cleaning).visit("GET", "/") as visit:
        await visit.until(at_wait(1))
        logger.warning("from outside")
        visit.leave()
    assert "logged" in kinds(visit)


async def test_lines_after_the_verdict(anyio_backend: str) -> None:
    async with served(cleaning, cancellable=True).visit("GET", "/") as visit:
        await visit.until(at_wait(1))
        visit.leave()
    before = list(visit.faults)
    logger.warning("from outside")
    assert visit.faults == before


class Broken:
    def __del__(self) -> None:
        raise ValueError("broken")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_what_python_can_only_print(anyio_backend: str) -> None:
    async def work() -> None:
        Broken()

    (line,) = lines(await visited(work))
    assert line.startswith("logged: Exception ignored in <function Broken.__del__ at ")
    assert line.endswith(": ValueError('broken')")


@on_asyncio
async def test_a_slow_step_in_debug_mode_is_no_fault(anyio_backend: str) -> None:
    async def work() -> None:
        gc.collect()
        await asyncio.sleep(0)

    loop = asyncio.get_running_loop()
    loop.set_debug(True)
    loop.slow_callback_duration = 1e-9
    try:
        visit = await visited(work)
    finally:
        loop.set_debug(False)
    assert visit.faults == []


# -- what was borrowed -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pool", "count"),
    [
        (lambda: 3, 3),
        (SimpleNamespace(_in_use_connections={1, 2}), 2),
        (SimpleNamespace(connection_pool=SimpleNamespace(_in_use_connections={1})), 1),
        (SimpleNamespace(checkedout=lambda: 4), 4),
        (SimpleNamespace(sync_engine=SimpleNamespace(pool=SimpleNamespace(checkedout=lambda: 5))), 5),
        (SimpleNamespace(get_size=lambda: 9, get_idle_size=lambda: 3), 6),
        (SimpleNamespace(get_stats=lambda: {"pool_size": 4, "pool_available": 1}), 3),
        (SimpleNamespace(borrowed_tokens=7), 7),
        (redis.Redis(), 0),
        (redis.ConnectionPool(), 0),
        (anyio.CapacityLimiter(1), 0),
    ],
    ids=lambda each: type(each).__name__,
)
async def test_pools_that_can_be_counted(anyio_backend: str, pool: Any, count: int) -> None:
    assert checked([pool]) == (pool,)
    assert in_use(pool) == count


def test_a_pool_that_cannot_be_counted() -> None:
    with pytest.raises(
        TypeError, match=r"pools: cannot tell what is in use of 3; give a function that returns the number"
    ):
        LeavingClient(FastAPI(), pools=[3])


def test_the_name_of_a_pool() -> None:
    assert name(redis.ConnectionPool()) == "ConnectionPool"
    assert name(served) == "served"


class Pool:
    """Counts what is out."""

    def __init__(self) -> None:
        self.borrowed_tokens = 0


async def test_what_is_not_returned(anyio_backend: str) -> None:
    pool = Pool()

    async def work() -> None:
        pool.borrowed_tokens += 2

    for _ in range(2):  # from what was out before
        assert lines(await visited(work, pools=[pool])) == ["not returned: 2 of Pool"]
    assert (await visited(partial(cleaning, SHORT), pools=[pool])).faults == []


async def test_what_visits_have_not_returned_is_told_when_the_last_one_ends(anyio_backend: str) -> None:
    """Before that nobody can say whether it is only in use."""
    pool = Pool()
    may_end = anyio.Event()

    async def borrows() -> None:
        pool.borrowed_tokens += 1
        await may_end.wait()
        pool.borrowed_tokens -= 1

    async def keeps() -> None:
        pool.borrowed_tokens += 1

    async with served(borrows, pools=[pool]).visit("GET", "/") as first:
        await first.until(at_wait(1))
        second = await visited(keeps, pools=[pool])
        may_end.set()
    assert second.faults == []
    assert lines(first) == ["not returned: 1 of Pool, by one of several visits at once"]


# -- background tasks --------------------------------------------------------------------------


async def test_a_background_task_that_is_cancelled(anyio_backend: str) -> None:
    async def work(background: BackgroundTasks) -> None:
        background.add_task(cleaning)

    visit = await served(work, server=Habits(cancels_after=0)).get("/", leave=Moment("its end", lambda v: v.completed))
    assert "background cancelled" in kinds(visit)
    assert any("in cleaning" in fault.text for fault in visit.faults)


async def test_a_background_task_that_limits_itself(anyio_backend: str) -> None:
    async def limited() -> None:
        with anyio.move_on_after(SHORT):
            await anyio.sleep(LONG)

    async def work(background: BackgroundTasks) -> None:
        background.add_task(limited)
        background.add_task(limited)

    assert (await visited(work)).faults == []


async def test_what_the_kit_itself_cancels_is_no_other_fault(anyio_backend: str) -> None:
    async def work(background: BackgroundTasks) -> None:
        background.add_task(cleaning, LONG, LONG)

    visit = await visited(work, patience=Patience(whole=0.01, cancelled=0.01))
    assert [*{*kinds(visit)}] == ["went on"]


async def test_what_the_kit_itself_abandons_is_no_other_fault(anyio_backend: str) -> None:
    async def work() -> None:
        async for _ in numbers():
            await anyio.sleep(LONG)

    visit = await visited(work, patience=Patience(whole=0.01))
    assert kinds(visit) == ["went on"]


# -- the body ----------------------------------------------------------------------------------


async def read(receive: Receive) -> None:
    while (await receive()).get("more_body", False):
        pass


def reading(*readers: Callable[[Receive], Coroutine[Any, Any, Any]]) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as group:
            for reader in readers:
                group.start_soon(reader, receive)
                await anyio.sleep(SHORT)
            await send({"type": "http.response.start", "status": 204})
            await send({"type": "http.response.body"})
            group.cancel_scope.cancel()

    return app


async def slowly() -> AsyncIterator[bytes]:
    for _ in range(3):
        yield b"piece"
        await anyio.sleep(0.01)


async def test_two_readers_of_a_body(anyio_backend: str) -> None:
    visit = await LeavingClient(reading(read, read)).post("/", content=slowly())
    text = lines(visit)
    assert text[0] == "body stolen: two readers at once, at"
    assert text[1].endswith(" in read") and text[2] == "  and at" and text[3].endswith(" in read")


async def test_two_readers_of_which_one_gets_it_all(anyio_backend: str) -> None:
    """The other one waits for what will never come."""

    async def waits(receive: Receive) -> None:
        await read(receive)
        await receive()

    visit = await LeavingClient(reading(waits, read), server="gunicorn").post("/", content=b"piece")
    text = lines(visit)
    assert text[0] == "body stolen: two readers at once, at"
    assert text[1].endswith(".waits") and text[-1].endswith(" in read")


async def test_a_look_beside_a_reader_after_the_body_takes_nothing(anyio_backend: str) -> None:
    """A ``StreamingResponse`` listens while its content asks. Both are told."""
    app = FastAPI()

    @app.post("/")
    async def upload(request: Request) -> StreamingResponse:
        async def rows() -> AsyncIterator[bytes]:
            while not await request.is_disconnected():
                yield b"row"
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(SHORT)

        await request.body()
        return StreamingResponse(rows())

    visit = await LeavingClient(app).post("/", content=b"piece", leave=after_chunks(2))
    assert "body stolen" not in kinds(visit)


async def test_one_reader_after_the_other(anyio_backend: str) -> None:
    async def looks(receive: Receive) -> None:
        with anyio.move_on_after(SHORT):
            await receive()

    visit = await LeavingClient(reading(looks, read)).post("/", content=slowly())
    assert visit.faults == []


async def test_a_look_that_takes_a_piece(anyio_backend: str) -> None:
    app = FastAPI()

    @app.post("/")
    async def upload(request: Request) -> None:
        await request.is_disconnected()

    visit = await LeavingClient(app).post("/", content=b"piece")
    assert lines(visit)[0] == "body stolen: is_disconnected() has taken a piece of it, at"


# -- the watch itself --------------------------------------------------------------------------


def state() -> list[Any]:
    """What the watch changes."""
    hooks = [sys.get_asyncgen_hooks(), sys.unraisablehook, logging.getLogger().handlers.copy(), gc.get_freeze_count()]
    loop = asyncio._get_running_loop()
    return hooks if loop is None else [*hooks, loop.get_task_factory()]


async def test_nothing_is_left_of_the_watch(anyio_backend: str) -> None:
    before = state()
    async with served(cleaning, cancellable=True).visit("GET", "/") as visit:
        await visit.until(at_wait(1))
        during = state()
        assert all(now != then for now, then in zip(during, before, strict=True))
        assert (await visited(cleaning, patience=Patience(whole=0.01))).over
        assert [*map(str, state()[:2])] == [*map(str, during[:2])]  # one watch for both
        visit.leave()
    assert state() == before


async def test_hooks_of_others_are_left_alone(anyio_backend: str) -> None:
    """Somebody has set his own meanwhile, on top of ours."""
    hooks, unraisable = sys.get_asyncgen_hooks(), sys.unraisablehook

    def firstiter(generator: Any) -> None:
        pass

    def print_it(unraisable: Any) -> None:
        pass

    def factory(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Future[Any]:
        return asyncio.Task(work, loop=loop, **options)

    loop = asyncio._get_running_loop()
    try:
        async with served(cleaning, cancellable=True).visit("GET", "/") as visit:
            await visit.until(at_wait(1))
            sys.set_asyncgen_hooks(firstiter=firstiter)
            sys.unraisablehook = print_it
            if loop is not None:
                loop.set_task_factory(factory)
            visit.leave()
        assert sys.get_asyncgen_hooks().firstiter is firstiter
        assert sys.unraisablehook is print_it
        assert loop is None or loop.get_task_factory() is factory
    finally:
        sys.set_asyncgen_hooks(*hooks)
        sys.unraisablehook = unraisable
        if loop is not None:
            loop.set_task_factory(None)


def test_each_event_loop_has_its_own_watch() -> None:
    """Though one was ended in the middle of a visit."""
    left: list[Any] = []

    async def enters() -> None:
        visit = served(cleaning, patience=Patience(whole=0.01)).visit("GET", "/")
        left.append(visit)
        await visit.__aenter__()

    async def works() -> None:
        await anext(numbers())

    loop = asyncio.new_event_loop()
    loop.run_until_complete(enters())
    assert kinds(asyncio.run(visited(works))) == ["generator left open"]
    assert kinds(anyio.run(visited, works, backend="trio")) == ["generator left open"]
    loop.run_until_complete(left[0].__aexit__(None, None, None))
    loop.close()


async def test_each_thread_has_its_own_watch(anyio_backend: str) -> None:
    def in_a_thread() -> None:
        kinds_there.extend(kinds(anyio.run(visited, partial(cleaning, SHORT), backend=anyio_backend)))

    kinds_there: list[str] = []
    async with served(cleaning, cancellable=True).visit("GET", "/") as visit:
        await visit.until(at_wait(1))
        await anyio.to_thread.run_sync(in_a_thread)
        visit.leave()
    assert kinds_there == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_two_threads_that_do_not_end_in_the_order_in_which_they_began() -> None:
    """The hook for what Python can only print is of them both."""
    before = sys.unraisablehook
    first_has_begun, second_has_begun, first_is_over = threading.Event(), threading.Event(), threading.Event()

    async def waits() -> None:
        first_has_begun.set()
        assert second_has_begun.wait(DEADLINE)

    async def breaks() -> None:
        second_has_begun.set()
        assert first_is_over.wait(DEADLINE)
        Broken()

    def first() -> None:
        assert anyio.run(visited, waits).faults == []
        first_is_over.set()

    thread = threading.Thread(target=first)
    thread.start()
    assert first_has_begun.wait(DEADLINE)
    assert kinds(anyio.run(visited, breaks)) == ["logged"]
    thread.join()
    assert sys.unraisablehook is before


def test_a_watch_keeps_no_event_loop() -> None:
    loop = asyncio.new_event_loop()
    loop.run_until_complete(visited(partial(cleaning, SHORT)))
    loop.close()
    reference = weakref.ref(loop)
    del loop
    gc.collect()
    assert reference() is None


def test_a_watch_without_hooks_of_others() -> None:
    """A bare coroutine runner has no hooks for generators."""
    watch = module.Watch.__new__(module.Watch)
    watch._owners, watch._hooks = {}, SimpleNamespace(firstiter=None, finalizer=None)
    generator = numbers()
    watch._iterated(generator)
    watch._abandoned(generator)


# -- places ------------------------------------------------------------------------------------


def test_a_place_is_told_from_the_working_directory() -> None:
    here = Site("tests", __file__, 7, "function")
    assert str(here) == "tests/test_watching.py:7 in function"
    assert str(Site("x", "/nowhere/x.py", 1, "f")) == "/nowhere/x.py:1 in f"
    assert here.own and not Site("anyio", "x", 1, "f").own and not Site("asyncio", "x", 1, "f").own


def test_a_module_that_is_run_keeps_its_name() -> None:
    """``python -m pytest`` calls it ``__main__``; its lines are not the user's for that."""
    module: dict[str, Any] = {"__name__": "__main__", "__spec__": SimpleNamespace(name="pytest.__main__")}
    exec("import sys\nframe = sys._getframe()", module)
    assert site_of(module["frame"], 1).package == "pytest"


def test_whose_place_it_is() -> None:
    """``python -m`` calls its module ``__main__``, and so does a script of the user's own."""
    code = "from fastapi_cancel.testing.sites import stack_here\ndef f(): return stack_here()\nprint(f()[-1].own)"
    for option in ("-c", "-"):
        process = subprocess.run(
            [sys.executable, option, *([code] if option == "-c" else [])],
            input=code,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert process.stdout == "True\n", process.stderr
