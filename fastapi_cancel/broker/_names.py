"""How keys and channels are called in Redis, and times written there."""

from __future__ import annotations


class Names:
    """Those of a broker.

    :param prefix: of all
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def log(self, channel: str) -> str:
        """The key of a channel's events."""
        return f"{self._prefix}log:{channel}"

    def topic(self, channel: str) -> str:
        """Where a channel's events are published."""
        return f"{self._prefix}channel:{channel}"

    def runs(self, key: str) -> str:
        """The key of what runs under a key."""
        return f"{self._prefix}runs:{key}"

    def worker(self, worker: str) -> str:
        """Where a worker is told what to stop."""
        return f"{self._prefix}worker:{worker}"

    def stream(self, key: str) -> str:
        """The key of a stream's record. The braces keep it on one node of a Redis Cluster with its events."""
        return f"{self._prefix}stream:{{{key}}}"

    def producer(self, worker: str) -> str:
        """Where a worker is told who reads what it produces."""
        return f"{self._prefix}producer:{worker}"


def milliseconds(seconds: float) -> int:
    """As Redis wants them."""
    return int(seconds * 1000)
