"""Measuring on a noisy machine: variants take turns, and only costs of the same round are compared."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

BASE = "plain"
"""The variant that the others are compared with: FastAPI and Starlette as they are."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    who: str
    measured: str
    budget: str = ""
    verdict: str = ""


@dataclass
class Section:
    """A table: what was measured, how, and what must be said beside it."""

    title: str
    how: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Ratio(NamedTuple):
    """``value`` with half of the middle 50 % of the rounds around it."""

    value: float
    spread: float

    def __str__(self) -> str:
        return f"{self.value:.2f} × ±{self.spread:.2f}"


def at_most(what: str, who: str, value: float | Ratio, limit: float, unit: str = " ×") -> Row:
    """A row whose value should not exceed ``limit``."""
    good = _number(value) <= limit
    return Row(what, who, _text(value, unit), f"≤ {_text(limit, unit)}", "PASS" if good else "over")


def at_least(what: str, who: str, value: float | Ratio, limit: float, unit: str = " ×") -> Row:
    """A row whose value should reach ``limit``."""
    good = _number(value) >= limit
    return Row(what, who, _text(value, unit), f"≥ {_text(limit, unit)}", "PASS" if good else "over")


def shown(what: str, who: str, value: float | Ratio, unit: str = " ×") -> Row:
    """A row without a budget: a peer, or for information."""
    return Row(what, who, _text(value, unit))


def _number(value: float | Ratio) -> float:
    """As printed: 1.204 is 1.20."""
    return round(value.value if isinstance(value, Ratio) else value, 2)


def _text(value: float | Ratio, unit: str) -> str:
    return str(value) if isinstance(value, Ratio) else f"{value:.2f}{unit}"


def interleave(variants: Mapping[str, Callable[[], float]], rounds: int, warm: int = 1) -> dict[str, list[float]]:
    """Measure the cost of each variant in turn, ``rounds`` times, each second round in reverse.

    :param warm: rounds before, whose costs are thrown away
    """
    for _ in range(warm):
        for measure in variants.values():
            measure()
    costs: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for _ in range(rounds):
        for name in names:
            costs[name].append(variants[name]())
        names.reverse()
    return costs


def ratios(costs: Mapping[str, list[float]], base: str = BASE) -> dict[str, Ratio]:
    """The median of cost / cost of ``base`` in the same round, for all but ``base``."""
    return {name: ratio(mine, costs[base]) for name, mine in costs.items() if name != base}


def ratio(costs: list[float], base: list[float]) -> Ratio:
    """The median over the rounds of ``costs`` / ``base``."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(costs, base, strict=True)], n=4)
    return Ratio(middle, (high - low) / 2)


@contextmanager
def on_one_core() -> Iterator[None]:
    """Keep this process where its caches are."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def typical(costs: list[float]) -> float:
    return statistics.median(costs)
