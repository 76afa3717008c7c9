"""What a handler sees. In process."""

from __future__ import annotations

import threading
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest
from anyio.to_thread import run_sync
from fastapi import APIRouter, FastAPI

from fastapi_cancel import (
    CancellableRoute,
    CancelToken,
    NotCancellable,
    RequestCancelled,
    Token,
    cancel_policy,
    never_cancel,
)

from .asgi import Connection, run_until_left

pytestmark = pytest.mark.anyio


class Served:
    """An application with one endpoint, and what that saw."""

    def __init__(self, route_class: Any = CancellableRoute) -> None:
        self.app = FastAPI()
        self.router = APIRouter(route_class=route_class)
        self.seen: list[Any] = []
        self.started = anyio.Event()

    async def leave(self, endpoint: Any) -> None:
        self.router.add_api_route("/", endpoint)
        self.app.include_router(self.router)
        await run_until_left(Connection(), self.app, self.started)


async def test_wait_gives_the_cause() -> None:
    served = Served()

    @cancel_policy(grace=4)
    async def endpoint(token: Token) -> None:
        served.seen.extend([token.is_set(), token.cause])
        token.raise_if_set()
        served.started.set()
        served.seen.append(await token.wait())
        served.seen.extend([token.is_set(), token.cause, await token.wait()])

    await served.leave(endpoint)
    assert served.seen == [False, None, "disconnect", True, "disconnect", "disconnect"]


async def test_raise_if_set_ends_the_handler_silently() -> None:
    served = Served()

    def endpoint(token: Token) -> None:
        anyio.from_thread.run_sync(served.started.set)
        assert token.wait_in_thread(5) == "disconnect"
        try:
            token.raise_if_set()
        except RequestCancelled as exc:
            served.seen.extend([exc.cause, str(exc)])
            raise

    await served.leave(endpoint)
    assert served.seen == ["disconnect", "the request was cancelled: disconnect"]


async def test_waiting_in_a_thread_may_time_out() -> None:
    served = Served()

    async def endpoint(token: Token) -> None:
        served.seen.append(await run_sync(token.wait_in_thread, 0.01))
        served.started.set()

    await served.leave(endpoint)
    assert served.seen == [None]


async def test_the_token_of_who_opted_out_is_never_set() -> None:
    served = Served()

    @never_cancel
    async def endpoint(token: Token) -> None:
        served.started.set()
        with anyio.move_on_after(0.02):
            await token.wait()
        served.seen.extend([token.is_set(), token.cause, await run_sync(token.wait_in_thread, 0.01)])
        token.raise_if_set()

    await served.leave(endpoint)
    assert served.seen == [False, None, None]


async def test_a_plain_route_has_no_token() -> None:
    app = FastAPI()

    @app.get("/")
    async def endpoint(token: Token) -> None: ...

    with pytest.raises(NotCancellable, match="no cancel token for /: its router needs route_class=CancellableRoute"):
        await Connection().run(app)


def in_thread(served: Served, token: CancelToken) -> None:
    anyio.from_thread.run_sync(served.started.set)
    token.wait_in_thread(5)
    token.raise_if_set()


@pytest.mark.parametrize(
    ("anyio_backend", "grace"), [("asyncio", 0), ("asyncio", 0.02), ("trio", 0.02)], indirect=["anyio_backend"]
)
async def test_raising_in_a_thread_is_the_one_interruption(grace: float, anyio_backend: str) -> None:
    """C7: what catches it may await. On Trio without a grace the level semantics hold."""
    served = Served()

    @cancel_policy(grace=grace)
    async def endpoint(token: Token) -> None:
        try:
            await run_sync(in_thread, served, token)
        except RequestCancelled:
            await anyio.sleep(2 * grace)
            await anyio.sleep(0.001)
            served.seen.append("cleaned")

    await served.leave(endpoint)
    assert served.seen == ["cleaned"]


@pytest.mark.parametrize("wait", ["turns", "event"])
async def test_raising_in_a_thread_that_another_task_waits_for(wait: str) -> None:
    """It interrupts that task; the handler has its cancellation still to come."""
    served = Served()

    @cancel_policy(grace=0.05)
    async def endpoint(token: Token) -> None:
        raised = anyio.Event()

        async def other() -> None:
            try:
                await run_sync(in_thread, served, token)
            except RequestCancelled:
                await anyio.sleep(0.001)
                raised.set()

        async with anyio.create_task_group() as group:
            group.start_soon(other)
            while wait == "turns" and not raised.is_set():
                await anyio.sleep(0)
            await raised.wait()
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            served.seen.append("cancelled")
            raise

    await served.leave(endpoint)
    assert served.seen == ["cancelled"]


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_raising_in_a_thread_that_nobody_waits_for() -> None:
    served = Served()

    @cancel_policy(grace=0.05)
    async def endpoint(token: Token) -> None:
        ended = anyio.Event()
        back = anyio.lowlevel.current_token()

        def thread() -> None:
            token.wait_in_thread(5)
            with pytest.raises(RequestCancelled):
                token.raise_if_set()
            anyio.from_thread.run_sync(ended.set, token=back)

        threading.Thread(target=thread).start()
        served.started.set()
        await ended.wait()
        served.seen.append("ended")

    await served.leave(endpoint)
    assert served.seen == ["ended"]
