"""What was wrong with a visit, in words that name the line to look at."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

Kind = Literal[
    "went on",
    "cleanup killed",
    "background cancelled",
    "task left",
    "generator left open",
    "not returned",
    "body stolen",
    "logged",
    "error",
]


class Fault(NamedTuple):
    """One thing that the work behind a request should not have done.

    :ivar kind: a word or two to tell faults apart
    :ivar text: what exactly, and where
    """

    kind: Kind
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


def fail_on(faults: Iterable[Fault], of: str) -> None:
    """Fail with all of them, if there are any.

    :param of: what had them
    :raises AssertionError: there are some
    """
    if told := [str(fault) for fault in faults]:
        __tracebackhide__ = True
        raise AssertionError("\n".join([f"{of}:", *told]))
