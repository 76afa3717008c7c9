"""What a handler sees. In process."""

from __future__ import annotations

import threading
from typing import Any

import anyio
import pytest
from anyio.to_thread import run_sync
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute

from fastapi_cancel import (
    CancellableRoute,
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
