"""What can be configured, and what is refused at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import APIRouter

from fastapi_cancel import CancellableRoute, CancelPolicy, cancel_policy, never_cancel
from fastapi_cancel.policy import CAUSES, policy_of


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("grace", -1, ValueError),
        ("grace", math.nan, ValueError),
        ("grace", "1", TypeError),
        ("grace", None, TypeError),
        ("grace", True, TypeError),
        ("cleanup_timeout", 0, ValueError),
        ("cleanup_timeout", math.inf, ValueError),
        ("timeout", 0, ValueError),
        ("timeout", -2.5, ValueError),
        ("send_timeout", 0, ValueError),
        ("send_timeout", [], TypeError),
        ("background", "yes", TypeError),
        ("stop_status", 200, ValueError),
        ("stop_status", 600, ValueError),
        ("stop_status", "409", TypeError),
        ("stop_status", True, TypeError),
        ("causes", "disconnect", TypeError),
        ("causes", 5, TypeError),
        ("causes", ["disconnect", "boredom"], ValueError),
    ],
)
def test_a_wrong_value_is_named(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        CancelPolicy(**{name: value})


def test_defaults() -> None:
    policy = CancelPolicy()
    assert (policy.grace, policy.cleanup_timeout, policy.timeout, policy.send_timeout) == (0, 30, None, None)
    assert policy.background is True
    assert policy.causes == CAUSES == {"disconnect", "stop", "timeout", "stalled", "shutdown"}


def test_replace_names_the_fields_it_knows() -> None:
    assert CancelPolicy().replace(grace=2).grace == 2
    with pytest.raises(TypeError, match=r"no patience; it has grace, cleanup_timeout"):
        CancelPolicy().replace(patience=2)


async def endpoint() -> None: ...


@pytest.mark.parametrize(
    "decorate",
    [
        lambda: cancel_policy(),
        lambda: cancel_policy(CancelPolicy(), grace=1),
        lambda: cancel_policy({"grace": 1}),  # type: ignore[arg-type]
        lambda: cancel_policy(patience=1),
        lambda: cancel_policy(endpoint),  # type: ignore[arg-type]
    ],
)
def test_the_decorator_refuses_what_is_no_policy(decorate: Callable[[], object]) -> None:
    with pytest.raises(TypeError):
        decorate()


def test_the_decorator_refuses_a_wrong_value() -> None:
    with pytest.raises(ValueError, match="grace must be"):
        cancel_policy(grace=-1)


def test_changes_are_made_to_the_policy_of_the_router() -> None:
    @cancel_policy(grace=5)
    async def changed() -> None: ...

    @cancel_policy(CancelPolicy(timeout=1))
    async def replaced() -> None: ...

    @never_cancel
    async def opted_out() -> None: ...

    router = CancelPolicy(cleanup_timeout=7)
    assert policy_of(endpoint, router) is router
    assert policy_of(changed, router) == CancelPolicy(cleanup_timeout=7, grace=5)
    assert policy_of(replaced, router) == CancelPolicy(timeout=1)
    assert policy_of(opted_out, router) is None


def test_with_policy_refuses_what_is_none() -> None:
    with pytest.raises(TypeError, match="policy must be a CancelPolicy"):
        CancellableRoute.with_policy({"grace": 1})  # type: ignore[arg-type]


def test_a_router_has_its_policy() -> None:
    route_class = CancellableRoute.with_policy(CancelPolicy(grace=3))
    router = APIRouter(route_class=route_class)
    router.add_api_route("/", endpoint)
    (route,) = router.routes
    assert isinstance(route, CancellableRoute)
    assert route.policy.grace == 3
    assert CancellableRoute.policy.grace == 0


def test_only_fastapis_own_broken_stream_is_quiet() -> None:
    from anyio import BrokenResourceError

    from fastapi_cancel.exceptions import is_quiet

    with pytest.raises(BrokenResourceError) as info:
        raise BrokenResourceError
    assert not is_quiet(info.value)
