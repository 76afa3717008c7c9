"""A pytest plugin for FastAPI's own suite: the route class and the backend where a test does not name one.

It counts the requests that the route class handled, so that a run in which the class was not in effect shows.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import sniffio
from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from fastapi_cancel import CancellableRoute

ROUTES: dict[str, type[APIRoute]] = {"APIRoute": APIRoute, "CancellableRoute": CancellableRoute}
requests: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--route", choices=list(ROUTES), required=True, help="the default route class")
    parser.addoption("--test-client-backend", required=True, help="the default backend of TestClient")


def pytest_configure(config: pytest.Config) -> None:
    route_class = ROUTES[str(config.getoption("route"))]
    set_default(APIRouter.__init__, "route_class", route_class)
    set_default(TestClient.__init__, "backend", config.getoption("test_client_backend"))
    count_requests(route_class)


def set_default(function: Any, name: str, value: object) -> None:
    """Change the default of one parameter: whatever is passed explicitly stays."""
    parameters = inspect.signature(function).parameters
    assert parameters[name].default is not inspect.Parameter.empty
    if parameters[name].kind is inspect.Parameter.KEYWORD_ONLY:
        function.__kwdefaults__[name] = value
    else:
        names = [each for each, parameter in parameters.items() if parameter.kind is not inspect.Parameter.KEYWORD_ONLY]
        defaults = list(function.__defaults__)
        defaults[names.index(name) - len(names)] = value
        function.__defaults__ = tuple(defaults)
    assert inspect.signature(function).parameters[name].default is value


def count_requests(route_class: type[APIRoute]) -> None:
    handle: Callable[..., Coroutine[Any, Any, None]] = route_class.handle

    def counted(self: APIRoute, *args: Any) -> Coroutine[Any, Any, None]:
        requests[sniffio.current_async_library()] += 1
        return handle(self, *args)

    setattr(route_class, "handle", counted)  # noqa: B010


@pytest.fixture(scope="session", autouse=True)
def report_requests(record_testsuite_property: Callable[[str, object], None]) -> Iterator[None]:
    yield
    for backend, count in requests.items():
        record_testsuite_property(f"requests on {backend}", count)
