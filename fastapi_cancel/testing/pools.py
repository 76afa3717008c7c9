"""What is borrowed from a pool, and must be given back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def in_use(pool: Any) -> int:
    """How many of its connections, tokens or the like are in somebody's hands now.

    Knows redis-py's pools and clients, SQLAlchemy's pools and engines, asyncpg's and psycopg's pools, and AnyIO's
    capacity limiters.

    :param pool: one of these, or a function that returns the number
    :raises TypeError: it is nothing of the kind
    """
    return int(_counter(pool)())


def checked(pools: Any) -> tuple[Any, ...]:
    """``pools``, if each can be counted.

    :raises TypeError: one can't
    """
    chosen = tuple(pools)
    for pool in chosen:
        _counter(pool)
    return chosen


def name(pool: Any) -> str:
    """To tell pools apart."""
    return str(getattr(pool, "__qualname__", type(pool).__qualname__))


class Ledger:
    """Counts for several visits at once: of what is missing nobody can say which of them has it, until all are over."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[Any, int]] = {}
        self._visits = 0
        self._crowd = False

    @contextmanager
    def watched(self, pools: Sequence[Any]) -> Iterator[Callable[[], list[str]]]:
        """During a visit.

        :return: tells what has not been returned
        """
        if not self._visits:
            self._before.clear()
            self._crowd = False
        self._visits += 1
        self._crowd |= self._visits > 1
        for pool in pools:
            self._before.setdefault(id(pool), (pool, in_use(pool)))
        try:
            yield self._missing
        finally:
            self._visits -= 1

    def _missing(self) -> list[str]:
        if self._visits > 1:
            return []
        by = ", by one of several visits at once" if self._crowd else ""
        missing = [(in_use(pool) - before, name(pool)) for pool, before in self._before.values()]
        return [f"{more} of {what}{by}" for more, what in missing if more > 0]


def _counter(pool: Any) -> Callable[[], Any]:
    for holder in ("connection_pool", "pool", "sync_engine"):  # a client, an engine, an asynchronous one
        if (held := getattr(pool, holder, None)) is not None and not callable(held):
            return _counter(held)
    if hasattr(pool, "_in_use_connections"):  # redis-py offers no public way
        return lambda: len(pool._in_use_connections)
    if hasattr(pool, "checkedout"):  # SQLAlchemy
        return lambda: pool.checkedout()
    if hasattr(pool, "get_idle_size"):  # asyncpg
        return lambda: pool.get_size() - pool.get_idle_size()
    if hasattr(pool, "get_stats"):  # psycopg
        return lambda: pool.get_stats()["pool_size"] - pool.get_stats()["pool_available"]
    if hasattr(pool, "borrowed_tokens"):  # AnyIO
        return lambda: pool.borrowed_tokens
    if callable(pool):
        return pool  # type: ignore[no-any-return]
    raise TypeError(f"pools: cannot tell what is in use of {pool!r}; give a function that returns the number")
