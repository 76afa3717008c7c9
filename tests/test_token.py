"""What a handler sees. In process."""

from __future__ import annotations

import threading
import time
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest
from anyio.to_thread import run_sync
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute

from fastapi_cancel import (
    CancellableRoute,
    CancelToken,
    NotCancellable,
    RequestCancelled,
    Token,
    cancel_policy,
    never_cancel,
)
from fastapi_cancel.testing import at_wait, when

from .visits import clean, client

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("surroundings")]


def serve(endpoint: Any, route_class: Any = CancellableRoute) -> FastAPI:
    app = FastAPI()
    router = APIRouter(route_class=route_class)
    router.add_api_route("/", endpoint)
    app.include_router(router)
    return app


async def test_wait_gives_the_cause() -> None:
    seen: list[Any] = []

    @cancel_policy(grace=4)
    async def endpoint(token: Token) -> None:
        seen.extend([token.is_set(), token.cause])
        token.raise_if_set()
        seen.append(await token.wait())
        seen.extend([token.is_set(), token.cause, await token.wait()])

    await clean(serve(endpoint), leave=at_wait(1))
    assert seen == [False, None, "disconnect", True, "disconnect", "disconnect"]


async def test_raise_if_set_ends_the_handler_silently() -> None:
    started, seen = threading.Event(), list[Any]()

    def endpoint(token: Token) -> None:
        started.set()
        assert token.wait_in_thread(5) == "disconnect"
        try:
            token.raise_if_set()
        except RequestCancelled as exc:
            seen.extend([exc.cause, str(exc)])
            raise

    await clean(serve(endpoint), leave=when(started))
    assert seen == ["disconnect", "the request was cancelled: disconnect"]


async def test_waiting_in_a_thread_may_time_out() -> None:
    async def endpoint(token: Token) -> str | None:
        return await run_sync(token.wait_in_thread, 0.01)

    assert (await clean(serve(endpoint))).body == b"null"


async def test_the_token_of_who_opted_out_is_never_set() -> None:
    seen: list[Any] = []

    @never_cancel
    async def endpoint(token: Token) -> None:
        with anyio.move_on_after(0.02):
            await token.wait()
        seen.extend([token.is_set(), token.cause, await run_sync(token.wait_in_thread, 0.01)])
        token.raise_if_set()

    await clean(serve(endpoint), leave=at_wait(1))
    assert seen == [False, None, None]


async def test_a_plain_route_has_no_token() -> None:
    async def endpoint(token: Token) -> None: ...

    error = (await client(serve(endpoint, APIRoute)).get("/")).error
    assert isinstance(error, NotCancellable)
    assert str(error).startswith("no cancel token for /: its router needs route_class=CancellableRoute")


def in_thread(started: threading.Event, token: CancelToken) -> None:
    started.set()
    token.wait_in_thread(5)
    token.raise_if_set()


@pytest.mark.parametrize(
    ("anyio_backend", "grace"), [("asyncio", 0), ("asyncio", 30), ("trio", 30)], indirect=["anyio_backend"]
)
async def test_raising_in_a_thread_is_the_one_interruption(grace: float, anyio_backend: str) -> None:
    """C7: what catches it may await. On Trio without a grace the level semantics hold."""
    started, caught, seen = threading.Event(), threading.Event(), list[str]()

    @cancel_policy(timeout=0.02, grace=grace)
    async def endpoint(token: Token) -> None:
        try:
            await run_sync(in_thread, started, token)
        except RequestCancelled:
            caught.set()
            assert token._ladder is not None
            while not token._ladder.left:  # which ends the grace
                await anyio.sleep(0.001)
            await anyio.sleep(0.01)
            seen.append("cleaned")

    await clean(serve(endpoint), leave=when(caught))
    assert seen == ["cleaned"]


@pytest.mark.parametrize("wait", ["turns", "event"])
async def test_raising_in_a_thread_that_another_task_waits_for(wait: str) -> None:
    """It interrupts that task; the handler has its cancellation still to come: with the client, who ends the grace."""
    started, bored, seen = threading.Event(), threading.Event(), list[str]()

    @cancel_policy(timeout=0.02, grace=30)
    async def endpoint(token: Token) -> None:
        raised = anyio.Event()

        async def other() -> None:
            try:
                await run_sync(in_thread, started, token)
            except RequestCancelled:
                await anyio.sleep(0.001)
                raised.set()

        try:
            async with anyio.create_task_group() as group:
                group.start_soon(other)
                while wait == "turns" and not raised.is_set():
                    time.sleep(0.0005)  # a loop that turns as fast as it can may keep a thread from its turn
                    await anyio.sleep(0)
                await raised.wait()
            seen.append("raised")
            bored.set()
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            seen.append("cancelled")
            raise

    await clean(serve(endpoint), leave=when(bored))
    assert seen == ["raised", "cancelled"]


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_raising_in_a_thread_that_nobody_waits_for() -> None:
    started, seen = threading.Event(), list[str]()

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
        started.set()
        await ended.wait()
        seen.append("ended")

    await clean(serve(endpoint), leave=when(started))
    assert seen == ["ended"]
