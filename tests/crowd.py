"""Thousands of clients of one server: opened, left alone, dropped at once; and what the server spends on them."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastapi_cancel.testing.sockets import RawClient

SPARE = 500  # files, beside the sockets
AT_A_TIME = 500  # connections that wait for their answer; servers' backlogs hold some 2,000


@contextmanager
def many_files(sockets: int) -> Iterator[None]:
    """Let this process, and the servers that it starts in here, open so many sockets.

    :raises AssertionError: the machine does not allow it
    """
    before = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = sockets + SPARE
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise AssertionError(
            f"{sockets} sockets need {needed} open files, the hard limit here is {hard}: raise it (ulimit -Hn {needed})"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


class Crowd:
    """So many clients that wait for events.

    :param port: of the server
    :param path: of a stream that begins with ``marker``
    """

    def __init__(self, port: int, path: str, count: int, marker: bytes = b"first") -> None:
        self.clients: list[RawClient] = []
        for begin in range(0, count, AT_A_TIME):
            some = [_visitor(port, number) for number in range(begin, min(begin + AT_A_TIME, count))]
            self.clients += some
            for client in some:
                client.request(path)
            for client in some:
                client.until(marker)

    def hear(self, marker: bytes) -> None:
        """Wait until each client has received ``marker``."""
        for client in self.clients:
            client.until(marker)

    def drop(self) -> float:
        """All leave with a RST. When the first one did, on the clock of ``time.monotonic``."""
        began = time.monotonic()
        while self.clients:
            self.clients.pop().abort()
        return began

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *exc: object) -> None:
        self.drop()


def _visitor(port: int, number: int) -> RawClient:
    """They come from several addresses: one has ports for 28,000 connections, or for far fewer."""
    return RawClient(port, source=f"127.0.0.{1 + number % 8}")


class Process:
    """A server's process, looked at from outside, so that looking costs it nothing."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def cpu(self) -> float:
        """CPU seconds so far."""
        # The clock that clock_getcpuclockid(3) gives: in ns instead of ticks.
        return time.clock_gettime((~self._pid << 3) | 2)

    def memory(self) -> int:
        """Resident bytes."""
        with open(f"/proc/{self._pid}/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Figures:
    """What a crowd costs its server.

    :ivar opening: seconds from the first connection to the last client's first event
    :ivar memory: resident bytes a stream
    :ivar heartbeats: CPU seconds for one heartbeat to everybody; includes what else it does while idle
    :ivar cleaning: seconds from the first client's RST to the end of the last cleanup
    """

    opening: float
    memory: float
    heartbeats: float
    cleaning: float

    def __str__(self) -> str:
        return (
            f"open: {self.opening:.2f} s, memory: {self.memory / 1024:.1f} KiB a stream, "
            f"one heartbeat to all: {self.heartbeats:.3f} CPU s, drop to last cleanup: {self.cleaning:.2f} s"
        )


def measure(
    port: int, pid: int, path: str, count: int, heartbeat: float, rounds: int, cleaned: Callable[[], float]
) -> Figures:
    """Open ``count`` streams, leave them alone for some heartbeats, drop them all.

    :param path: of a stream that sends "first", then only heartbeats
    :param heartbeat: seconds between these
    :param rounds: how many of them to measure
    :param cleaned: waits until all cleanups have run; returns when the last one did, by ``time.monotonic``
    """
    process = Process(pid)
    empty = process.memory()
    began = time.monotonic()
    with Crowd(port, path, count) as crowd:
        opening = time.monotonic() - began
        memory = (process.memory() - empty) / count
        spent = process.cpu()
        time.sleep(heartbeat * rounds)  # what is measured, not a wait for something
        spent = process.cpu() - spent
        crowd.hear(b": ping - ")
        left = crowd.drop()
        return Figures(opening, memory, spent / rounds, cleaned() - left)
