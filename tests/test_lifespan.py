"""lifespan(): what it opens and closes, and what it waits for."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from fastapi import FastAPI
from starlette.background import BackgroundTask
from starlette.responses import Response

from fastapi_cancel import CancellableRoute, CancelPolicy, lifespan
from fastapi_cancel.ladder import ending
from fastapi_cancel.testing import LeavingClient, LiveServer, at_wait, when

pytestmark = pytest.mark.anyio


def part(name: str, notes: list[str]) -> Any:
    @asynccontextmanager
    async def opened(app: Any = None) -> AsyncIterator[dict[str, str]]:
        notes.append(f"{name} opens")
        try:
            yield {"name": name}
        finally:
            notes.append(f"{name} closes")

    return opened


async def test_the_parts_and_the_own_lifespan_inside_of_them() -> None:
    notes: list[str] = []
    run = lifespan(part("a", notes)(), part("b", notes)(), around=part("own", notes))
    async with run(FastAPI()) as state:
        notes.append("serves")
    assert state == {"name": "own"}
    assert notes == ["a opens", "b opens", "own opens", "serves", "own closes", "b closes", "a closes"]


async def test_a_part_that_does_not_open_closes_the_others() -> None:
    notes: list[str] = []

    @asynccontextmanager
    async def broken() -> AsyncIterator[None]:
        raise ConnectionError
        yield

    with pytest.raises(ConnectionError):
        async with lifespan(part("a", notes)(), broken())(FastAPI()):
            raise AssertionError
    assert notes == ["a opens", "a closes"]


async def test_it_waits_for_cleanups_and_background_tasks() -> None:
    notes: list[str] = []
    cleaning, go_on = anyio.Event(), anyio.Event()

    async def background() -> None:
        await anyio.sleep(0.01)
        notes.append("background")

    app = FastAPI()
    app.router.route_class = CancellableRoute.with_policy(CancelPolicy(grace=5))
    known: list[bool] = []

    @app.get("/")
    async def endpoint() -> Response:
        try:
            cleaning.set()
            await go_on.wait()  # within its grace
        finally:
            notes.append("cleaned")
        return Response(background=BackgroundTask(background))

    async def close() -> None:
        async with lifespan(part("a", notes)())(app):
            await cleaning.wait()
            await visit.until(when(lambda: bool(ending)))
            go_on.set()

    async def look() -> None:
        await go_on.wait()
        while "background" not in notes:  # in every turn of the event loop: `lifespan` may look in any
            known.append(bool(ending))
            await anyio.sleep(0)

    async with LeavingClient(app).visit("GET", "/", leave=at_wait(1)) as visit:
        async with anyio.create_task_group() as group:
            group.start_soon(look)
            await close()
    assert notes == ["a opens", "cleaned", "background", "a closes"]
    assert all(known)
    assert not ending


@pytest.mark.parametrize("server", ["uvicorn", "gunicorn", "gunicorn-uvicorn", "hypercorn", "granian", "granian-rsgi"])
def test_a_server_that_stops_waits_for_a_cleanup(server: str) -> None:
    """C14, also where the server does not wait for work whose client has gone (gunicorn, Granian)."""
    with LiveServer("tests.app:app", server, env={"LIFESPAN": "1"}) as live:
        client = live.open("/slow-cleanup")
        live.wait_for("/stats", started=1)
        client.abort()
        live.wait_for("/stats", seen=["cleaning"])
        assert live.stop() in (0, -signal.SIGTERM)  # uvicorn ends by the signal that it was sent
        assert "[INFO] cleaned" in live.log
        assert "Traceback" not in live.log


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parts": ["redis://"]}, "parts must be opened by async with, unlike 'redis://'"),
        ({"parts": [], "around": 5}, "around must be a lifespan, a function of the application, not 5"),
    ],
)
def test_what_cannot_be_opened_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError) as caught:
        lifespan(*arguments.pop("parts"), **arguments)
    assert str(caught.value) == message
