"""Leaves at every wait in turn: finds the bug before the clients do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from inspect import isawaitable
from typing import Any

from .._looks import within
from .client import LeavingClient
from .faults import fail_on
from .moments import Moment, at_wait
from .sites import told
from .visit import Visit

Check = Callable[[Visit], Awaitable[object] | object]


@dataclass(frozen=True)
class Chaos:
    """What a search went through.

    :ivar waits: at so many different waits the client left
    :ivar complete: whether these were all, and not only the first ``most``, or those before a wait that lasted too long
    """

    waits: int
    complete: bool


async def chaos(
    client: LeavingClient,
    method: str,
    path: str,
    *,
    most: int = 200,
    longest: float = 1.0,
    check: Check | None = None,
    **options: Any,
) -> Chaos:
    """Make the same request again and again, each time leaving one wait later, until it is over before that.

    A wait is an ``await`` that does suspend, in the request's own task or in one that it started. After each visit
    nothing may be left, nothing logged, no cleanup killed; and ``check`` must hold. So it must after the last visit,
    whose client stays.

    :param client: of the application
    :param most: waits to try; a stream that never ends has no last one
    :param longest: seconds for which one wait may last; the client leaves from a longer one, and that was the last.
        Those in which the event loop, or the machine, stands still do not count
    :param check: is given each visit that is over, and raises if the application is in a bad state; may be async. A
        lock, a transaction, a file: what only it can know
    :param options: as :meth:`LeavingClient.visit` takes them
    :raises AssertionError: at the first visit that left anything, with the wait at which its client left
    :raises ValueError: ``most`` or ``longest`` is too small
    :raises TypeError: ``content`` is gone once it was sent
    """
    if most < 1:
        raise ValueError(f"most: a number (>= 1), not {most!r}")
    if not longest > 0:
        raise ValueError(f"longest: seconds (> 0), not {longest!r}")
    if isinstance(options.get("content"), (AsyncIterator, Iterator)):
        raise TypeError(f"content: bytes, text or a list of pieces, to be sent many times, not {options['content']!r}")
    for number in range(1, most + 1):
        async with client.visit(method, path, leave=at_wait(number), **options) as visit:
            stuck = await _stuck(visit, longest)
        stayed = visit.left is None
        when = "stayed" if stayed else f"left at wait {number}, at\n{told(visit.left_at)}"
        where = f"{visit!r}, whose client {when}"
        fail_on(visit.faults, where)
        if check is not None:
            await _check(check, visit, where)
        if stayed:
            return Chaos(number - 1, True)
        if stuck:
            return Chaos(number - 1, False)
    return Chaos(most, False)


async def _stuck(visit: Visit, longest: float) -> bool:
    """Wait for the client's leaving, or the end; have it leave from a wait that lasts too long."""
    while visit.left is None and not visit.over:
        if not await within(longest, partial(visit.until, _after(visit.waits))):
            visit.leave()
            return True
    return False


def _after(waits: int) -> Moment:
    return Moment("the next wait, or the end", lambda visit: visit.waits > waits or visit.over)


async def _check(check: Check, visit: Visit, where: str) -> None:
    try:
        verdict = check(visit)
        if isawaitable(verdict):
            await verdict
    except Exception as exc:
        raise AssertionError(f"{where}:\n{type(exc).__name__}: {exc}") from exc
