"""Visits in process, to an application in a bare task or under somebody's AnyIO scope: each has a ladder of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import anyio
import pytest
from starlette.types import Receive, Scope, Send

from fastapi_cancel.testing import LeavingClient, Patience, Visit


class Surroundings:
    scope = False

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with anyio.CancelScope() if self.scope else nullcontext():
            await self.app(scope, receive, send)


@pytest.fixture(params=["bare", "in a scope"])
def surroundings(request: pytest.FixtureRequest) -> Iterator[None]:
    """Have the test twice."""
    Surroundings.scope = request.param == "in a scope"
    yield
    Surroundings.scope = False


def client(app: Any, **options: Any) -> LeavingClient:
    """One whose work has time to end if it is not told that its client has left."""
    return LeavingClient(Surroundings(app), patience=Patience(untold=5), **options)


async def clean(app: Any, server: Any = "uvicorn", **options: Any) -> Visit:
    """A visit that leaves nothing behind."""
    visit = await client(app, server=server).get("/", **options)
    visit.assert_clean()
    return visit


async def failed(app: Any, **options: Any) -> tuple[str, list[str]]:
    """The error of an application that leaves nothing behind, and what is logged."""
    visit = await client(app).get("/", **options)
    *logged, last = visit.faults
    assert ({fault.kind for fault in logged} | {"logged"}, last.kind) == ({"logged"}, "error")
    return repr(visit.error), [fault.text for fault in logged]
