"""How much of a response Granian holds because the client does not read: RSGI does not say.

``response_stream`` takes whatever it is given, so one client that does not read would fill the memory. On Linux
anybody may ask the kernel what has been written to a connection (``sock_diag(7)``, as ``ss`` does), and the rest is
what Granian holds. Elsewhere, and on Unix sockets, there is no bound.

Over HTTP/2 other responses of the same connection are counted as if they were this one: it is bounded while it is
alone.
"""

from __future__ import annotations

import socket
import struct
import sys
from contextlib import suppress
from functools import lru_cache

from .types import Scope

STEP = 256 << 10
"""Bytes that Granian may hold, and bytes between two looks."""

MANY_LOOKS = 10  # that is 0.2 s or more, with the pauses that are made

NETLINK_SOCK_DIAG = 4  # linux/netlink.h
SOCK_DIAG_BY_FAMILY = 20  # linux/sock_diag.h
INET_DIAG_INFO = 2  # linux/inet_diag.h
TCP_LISTEN = 10  # linux/tcp_states.h
# struct tcp_info (linux/tcp.h): bytes acknowledged, not sent yet, sent, and sent again. All are of one moment.
TCP_INFO = struct.Struct("=120xQ16xI52xQQ")
NLMSG, DIAG_MSG = 16, 72  # lengths of the headers before the attributes


class Backlog:
    """That of one response."""

    _handed = 0  # bytes since the last look
    _counted = 0  # bytes until then, and since ...
    _before: int | None = None  # ... so many had been written to the connection
    _last = 0  # so many had been at the last look
    _still = 0  # looks in a row that saw all of that arrived, and nothing new

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    def add(self, size: int, chunked: bool) -> bool:
        """Count what is about to be handed over.

        :param chunked: whether HTTP/1.1 puts its size and two line ends around it
        :return: whether it is time to look, once it was
        """
        if chunked and self._scope.http_version == "1.1":
            size += (size.bit_length() + 3) // 4 + 4
        self._handed += size
        if self._handed < STEP:
            return False
        if self._before is None and (seen := self._look()) is not None:
            self._before = self._last = seen[0]
            self._handed = size
        return True

    def full(self) -> bool:
        """Whether Granian holds more than it should."""
        self._counted += self._handed
        self._handed = 0
        seen = self._look()
        if self._before is None or seen is None:
            return False
        written, arrived = seen
        self._still = self._still + 1 if written == arrived == self._last else 0
        self._last = written
        if written - self._before > self._counted or self._miscounted():
            self._before = written
            self._counted = 0
        return self._counted - (written - self._before) > STEP

    def _miscounted(self) -> bool:
        """Whether Granian cannot hold anything. Not to be known over HTTP/2, where a stream has a window of its own."""
        return self._still >= MANY_LOOKS and self._scope.http_version != "2"

    def _look(self) -> tuple[int, int] | None:
        return look(self._scope.client, self._scope.server)


@lru_cache(maxsize=1024)
def address(text: str) -> tuple[str, int | None] | None:
    """As ASGI has it. A Unix socket's path has no port, and its client no path."""
    if text.startswith("/") or not text:
        return (text, None) if text else None
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def look(client: str, server: str) -> tuple[int, int] | None:
    """Bytes that were written to the connection, and those that have arrived. ``None``: nobody knows, or it is gone."""
    with suppress(OSError, struct.error):
        here, there = address(server), address(client)
        if sys.platform == "linux" and here is not None and there is not None:
            return _ask(here[0], here[1] or 0, there[0], there[1] or 0)
    return None


def _ask(here: str, port: int, there: str, their_port: int) -> tuple[int, int] | None:
    family = socket.AF_INET6 if ":" in there else socket.AF_INET
    if here in ("0.0.0.0", "::"):
        here = _own_address(family, there)
    ends = struct.pack("!HH16s16s", port, their_port, socket.inet_pton(family, here), socket.inet_pton(family, there))
    # Any interface, no cookie; TCP, with its information, in any state.
    question = struct.pack("=BBBxI", family, socket.IPPROTO_TCP, 1 << (INET_DIAG_INFO - 1), 0xFFFFFFFF)
    question += ends + struct.pack("=III", 0, 0xFFFFFFFF, 0xFFFFFFFF)
    header = struct.pack("=IHHII", NLMSG + len(question), SOCK_DIAG_BY_FAMILY, 1, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as kernel:
        kernel.send(header + question)
        answer = kernel.recv(4096)
    return _parse(answer)


def _parse(answer: bytes) -> tuple[int, int] | None:
    kind, state = struct.unpack_from("=4xH11xB", answer)
    if kind != SOCK_DIAG_BY_FAMILY or state == TCP_LISTEN:  # there is no such connection (any more)
        return None
    attribute = NLMSG + DIAG_MSG
    while attribute < len(answer):
        length, kind = struct.unpack_from("=HH", answer, attribute)
        if kind == INET_DIAG_INFO:
            acknowledged, unsent, sent, again = TCP_INFO.unpack_from(answer, attribute + 4)
            return sent - again + unsent, acknowledged
        attribute += max(4, (length + 3) & ~3)
    return None


def _own_address(family: int, there: str) -> str:
    """The one that is used to reach ``there``."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((there, 9))  # sends nothing
        host: str = probe.getsockname()[0]
        return host
