"""A pytest plugin for sse-starlette's own tests: ``SSEResponse`` where they import ``EventSourceResponse``.

Their distribution lacks the fixtures: these are ours, by the names and for the needs of the tests. What the tests
do to the insides of sse-starlette is translated where we have the same thing elsewhere: its signal to stop, the name
of its logger, a scope without a path. It counts the responses that were served, so that a run in which the class was
not in effect shows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import count

import anyio
import httpx
import pytest
import sse_starlette
import sse_starlette.sse
from sse_starlette.sse import AppStatus
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from fastapi_cancel import SSEResponse

logger = logging.getLogger(__name__)
served = 0

for module in (sse_starlette, sse_starlette.sse):
    setattr(module, "EventSourceResponse", SSEResponse)  # noqa: B010


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bursts", choices=["yes", "no"], required=True, help="whether ready events go out together")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("bursts") == "no":
        defaults = SSEResponse.__init__.__kwdefaults__
        assert defaults is not None
        defaults["batch"] = False
    count_and_translate()
    logging.getLogger("fastapi_cancel").addFilter(rename)


def count_and_translate() -> None:
    call = SSEResponse.__call__

    async def counted(self: SSEResponse, scope: Scope, receive: Receive, send: Send) -> None:
        global served
        served += 1
        listening = asyncio.ensure_future(shut_down(self))
        try:
            await call(self, {"path": "/", **scope}, receive, send)
        finally:
            listening.cancel()

    setattr(SSEResponse, "__call__", counted)  # noqa: B010


async def shut_down(response: SSEResponse) -> None:
    """The tests set ``AppStatus.should_exit``, or replace this method of one response."""
    await response._listen_for_exit_signal()
    response.shut_down()


def rename(record: logging.LogRecord) -> bool:
    record.name = "sse_starlette.sse"
    return True


@pytest.fixture(scope="session", autouse=True)
def report_served(record_testsuite_property: Callable[[str, object], None]) -> Iterator[None]:
    yield
    record_testsuite_property("served", served)


@pytest.fixture(autouse=True)
def forget_shutdown() -> Iterator[None]:
    """What sse-starlette knows of a shutdown belongs to the thread. Its watcher ends once it has heard of one."""
    for should_exit in (False, True):
        AppStatus.should_exit = should_exit
        AppStatus.enable_automatic_graceful_drain = True
        vars(sse_starlette.sse._thread_state).clear()
        if not should_exit:
            yield


@pytest.fixture
def anyio_backend() -> str:
    """The only one that sse-starlette supports."""
    return "asyncio"


@pytest.fixture
async def httpx_client() -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(Starlette(routes=[Route("/endless", endless)]))
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
        yield client


async def endless(request: Request) -> SSEResponse:
    return SSEResponse(count_up())


async def count_up() -> AsyncIterator[dict[str, int]]:
    try:
        for number in count(1):
            yield {"data": number}
            await anyio.sleep(0.1)
    except anyio.get_cancelled_exc_class():
        logger.info("Disconnected from client")
        raise
