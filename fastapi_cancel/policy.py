"""What can be configured: for a router, for one endpoint, for one response."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar, get_args

Cause = Literal["disconnect", "stop", "timeout", "stalled", "shutdown"]
CAUSES: frozenset[Cause] = frozenset(get_args(Cause))
HERE: frozenset[Cause] = frozenset({"stop", "timeout", "shutdown"})
"""The causes after which the client may still be there."""

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelPolicy:
    """How a request ends early.

    :param grace: seconds between the signal (the token is set) and the cancellation
    :param cleanup_timeout: seconds that a cleanup may take after the cancellation, before it is forced
    :param timeout: seconds that the request may take until its response is complete; ``None``: no limit.
        A client that still waits is answered with 504
    :param send_timeout: seconds that one ``send`` may wait for a client that does not read; ``None``: no limit
    :param background: whether the response's background tasks run after an early end, as after a finish
    :param stop_status: the HTTP status of a request that was stopped before its response began; 409, "Conflict"
    :param causes: the causes that this work listens to; others leave it alone
    :raises ValueError: a value is out of range; the message names the argument
    :raises TypeError: a value is of the wrong type; the message names the argument
    """

    grace: float = 0.0
    cleanup_timeout: float = 30.0
    timeout: float | None = None
    send_timeout: float | None = None
    background: bool = True
    stop_status: int = 409
    causes: Collection[Cause] = CAUSES

    def __post_init__(self) -> None:
        check_seconds("grace", self.grace, zero=True)
        check_seconds("cleanup_timeout", self.cleanup_timeout)
        check_seconds("timeout", self.timeout, none=True)
        check_seconds("send_timeout", self.send_timeout, none=True)
        if not isinstance(self.background, bool):
            raise TypeError(f"background must be True or False, not {self.background!r}")
        check_status("stop_status", self.stop_status)
        object.__setattr__(self, "causes", _check_causes(self.causes))

    def replace(self, **changes: Any) -> CancelPolicy:
        """A copy with some fields changed.

        :raises TypeError: a name is not a field of the policy; the message lists those that are
        """
        check_fields(changes)
        return replace(self, **changes)


def check_seconds(name: str, value: object, *, zero: bool = False, none: bool = False) -> None:
    """Refuse what is not a number of seconds, naming the argument."""
    if value is None and none:
        return
    allowed = f"a finite number of seconds, {'0 or more' if zero else 'more than 0'}{', or None' if none else ''}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {allowed}, not {value!r}")
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name} must be {allowed}, not {value!r}")


def check_status(name: str, value: object) -> None:
    """Refuse what is no HTTP status of an error, naming the argument."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an HTTP status from 400 to 599, not {value!r}")
    if not 400 <= value <= 599:
        raise ValueError(f"{name} must be an HTTP status from 400 to 599, not {value!r}")


def check_fields(changes: Iterable[str]) -> None:
    """Refuse names that are no field of :class:`CancelPolicy`."""
    known = [field.name for field in fields(CancelPolicy)]
    if unknown := [name for name in changes if name not in known]:
        raise TypeError(f"CancelPolicy has no {', '.join(unknown)}; it has {', '.join(known)}")


def _check_causes(causes: Collection[Cause]) -> frozenset[Cause]:
    allowed = ", ".join(sorted(CAUSES))
    if isinstance(causes, str) or not isinstance(causes, Iterable):
        raise TypeError(f"causes must be a collection of {allowed}, not {causes!r}")
    chosen = frozenset(causes)
    if unknown := chosen - CAUSES:
        raise ValueError(f"causes must be among {allowed}, not {', '.join(map(repr, unknown))}")
    return chosen


_DECLARED = "__cancel_policy__"
_NEVER = object()


def cancel_policy(policy: CancelPolicy | None = None, /, **changes: Any) -> Callable[[Endpoint], Endpoint]:
    """Set the policy of one endpoint: a whole one, or changes to that of its router.

    ::

        @router.post("/reports")
        @cancel_policy(grace=5)
        async def report() -> Report: ...

    The order of the two decorators does not matter.

    :raises TypeError: neither or both were given, or a name is no field of the policy
    :raises ValueError: a value is out of range
    """
    if (policy is None) == (not changes):
        raise TypeError("cancel_policy takes either a CancelPolicy or some of its fields by name")
    if policy is not None and not isinstance(policy, CancelPolicy):
        raise TypeError(f"cancel_policy takes a CancelPolicy, not {policy!r}")
    check_fields(changes)
    CancelPolicy(**changes)

    def decorate(endpoint: Endpoint) -> Endpoint:
        setattr(endpoint, _DECLARED, policy or changes)
        return endpoint

    return decorate


def never_cancel(endpoint: Endpoint) -> Endpoint:
    """Opt one endpoint out altogether: nobody watches its client, nothing interrupts it.

    ::

        @router.post("/payments")
        @never_cancel
        async def pay(order: Order) -> Receipt: ...

    The order of the two decorators does not matter.
    """
    setattr(endpoint, _DECLARED, _NEVER)
    return endpoint


def policy_of(endpoint: Callable[..., Any], default: CancelPolicy) -> CancelPolicy | None:
    """The policy in force for ``endpoint``; ``None`` if it opted out."""
    declared = getattr(endpoint, _DECLARED, None)
    if declared is None:
        return default
    if declared is _NEVER:
        return None
    return declared if isinstance(declared, CancelPolicy) else default.replace(**declared)
