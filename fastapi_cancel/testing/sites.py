"""Where something was created, or waits: a stack that names the user's own lines."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

from .._ahead import Ahead

PLUMBING = sys.stdlib_module_names | {
    *(
        "_pytest",
        "anyio",
        "coverage",
        "execnet",
        "fastapi",
        "fastapi_cancel",
        "outcome",
        "pluggy",
        "pytest",
        "sse_starlette",
        "starlette",
    ),
    *("pytest_asyncio", "pytest_timeout", "trio", "uvicorn", "uvloop", "xdist"),
}
"""Packages that end their own waits in order: a fault is looked for in the code around them."""

DEPTH = 40

BY_HAND = ("drive", "stepped")
"""The functions of this library that step a coroutine, which they call ``work``."""


AHEAD = Ahead.wait.__qualname__
"""This one steps an asynchronous generator."""


class Site(NamedTuple):
    """One line of somebody's code."""

    package: str
    file: str
    line: int
    function: str

    @property
    def own(self) -> bool:
        """Whether the line is the user's own, and no framework's."""
        return self.package not in PLUMBING

    @property
    def installed(self) -> bool:
        """Whether it is in a package that was installed."""
        return not {"site-packages", "dist-packages"}.isdisjoint(Path(self.file).parts)

    def __str__(self) -> str:
        path = Path(self.file)
        here = Path.cwd()
        return f"{path.relative_to(here) if path.is_relative_to(here) else path}:{self.line} in {self.function}"


Stack = tuple[Site, ...]
"""The innermost line last, as in a traceback."""


def stack_here() -> Stack:
    """The stack of the caller's caller, from where the request begins. Reads no source: every task can afford it."""
    frame: FrameType | None = sys._getframe(2)
    sites: list[Site] = []
    while frame is not None and len(sites) < DEPTH and frame.f_code.co_name != "stepped":
        sites.append(site_of(frame))
        frame = frame.f_back
    return tuple(reversed(sites))


def stack_of(exc: BaseException) -> Stack:
    """The lines that ``exc`` has passed."""
    sites: list[Site] = []
    traceback: TracebackType | None = exc.__traceback__
    while traceback is not None:
        sites.append(site_of(traceback.tb_frame, traceback.tb_lineno))
        traceback = traceback.tb_next
    return tuple(sites)


def stack_of_waiting(waiting: Any) -> Stack:
    """Where a suspended coroutine or asynchronous generator waits."""
    return tuple(site_of(frame) for frame in frames_of_waiting(waiting))


def frames_of_waiting(waiting: Any) -> Iterator[FrameType]:
    """The functions in which it waits, the innermost one last."""
    while waiting is not None:
        for kind, inner in (("cr", "cr_await"), ("ag", "ag_await"), ("gi", "gi_yieldfrom")):
            if (frame := getattr(waiting, f"{kind}_frame", None)) is not None:
                yield frame
                # Asked what it waits for while it runs, Python 3.11 may answer with an object that is gone. Of an
                # asynchronous generator nobody can tell; but what waits for one that runs, runs.
                runs = kind != "ag" and getattr(waiting, f"{kind}_running")
                waiting = None if runs else getattr(waiting, inner)
                if waiting is None and frame.f_code.co_name in BY_HAND:
                    waiting = frame.f_locals.get("work")
                elif waiting is None and frame.f_code.co_qualname == AHEAD and not runs:
                    waiting = frame.f_locals["steps"]
                break
        else:  # the awaitable of an `__anext__` keeps its generator to itself
            waiting = next((each for each in gc.get_referents(waiting) if hasattr(each, "ag_frame")), None)


def site_of(frame: FrameType, line: int | None = None) -> Site:
    """Where ``frame`` is.

    :param line: if not where it is now
    """
    module = str(frame.f_globals.get("__name__", "?"))
    if module == "__main__" and (spec := frame.f_globals.get("__spec__")) is not None:
        module = spec.name  # python -m pytest
    return Site(module.partition(".")[0], frame.f_code.co_filename, line or frame.f_lineno, frame.f_code.co_qualname)


def own(stack: Stack) -> Site | None:
    """The innermost line that is the user's own."""
    return next((site for site in reversed(stack) if site.own), None)


def told(stack: Stack, lines: int = 6) -> str:
    """The user's own lines of a stack, or its last ones where there are none, to be read by a person."""
    chosen = [site for site in stack if site.own] or list(stack)
    if len(chosen) > lines:  # a client library may have many of its own below the user's
        chosen = [*[site for site in chosen[:-1] if not site.installed][1 - lines :], chosen[-1]]
    return "\n".join(f"    {site}" for site in chosen[-lines:]) or "    nowhere known"
