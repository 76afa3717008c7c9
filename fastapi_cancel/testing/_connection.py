"""A blocking socket: what came in on it, and the ways to leave."""

from __future__ import annotations

import socket
import struct
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

SHOWN = 1000  # bytes of what came last, in the message of an error
AT_ONCE = 65536  # bytes
DROPPED = 16 << 20  # bytes, at most, that are read so that a FIN is a FIN: some servers send without end


class Inbox:
    """What has come in, and is not read yet."""

    def __init__(self) -> None:
        self._unread = bytearray()
        self._last = b""
        self._count = 0
        self._searched = (b"", 0)  # for what, and how far: in vain

    def add(self, data: bytes) -> None:
        self._unread += data
        self._last = (self._last + data)[-SHOWN:]
        self._count += len(data)

    def until(self, marker: bytes) -> bytes | None:
        """What comes up to and including ``marker``; ``None`` if that is not there yet."""
        before, searched = self._searched
        found = self._unread.find(marker, max(0, searched - len(marker)) if marker == before else 0)
        if found < 0:
            self._searched = marker, len(self._unread)
            return None
        return self.take(found + len(marker))

    def exactly(self, size: int) -> bytes | None:
        return self.take(size) if len(self._unread) >= size else None

    def take(self, size: int | None = None) -> bytes:
        """The first ``size`` bytes of what is unread, or all."""
        taken = bytes(self._unread[:size])
        del self._unread[:size]
        self._searched = b"", 0
        return taken

    def startswith(self, marker: bytes) -> bool:
        return self._unread.startswith(marker)

    def __str__(self) -> str:
        """For the message of an error."""
        which = f", the last of them: {self._last!r}" if self._count > len(self._last) else f": {self._last!r}"
        return f"received so far: {self._count} bytes{which if self._count else ''}"


class Connection:
    """A client's connection.

    :param port: of the server
    :param host: its name or address
    :param receive_buffer: bytes that the system holds for a client that does not read (it rounds them up); as it
        comes, that is some megabytes
    :param timeout: seconds that each call may take, at most
    :param source: the local address to come from, since one address has ports for some 28,000 connections only
    :ivar socket: for what is not offered here
    :raises ValueError: a size or time that is not positive
    :raises OSError: there is no connection to be had
    """

    def __init__(
        self,
        port: int,
        host: str = "127.0.0.1",
        *,
        receive_buffer: int | None = None,
        timeout: float = 20.0,
        source: str | None = None,
    ) -> None:
        if receive_buffer is not None and receive_buffer <= 0:
            raise ValueError(f"receive_buffer: a number of bytes above 0, or None, not {receive_buffer!r}")
        if timeout <= 0:
            raise ValueError(f"timeout: seconds, above 0, not {timeout!r}")
        self.timeout = timeout
        self._host = f"{host}:{port}"
        self._inbox = Inbox()
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self.socket = socket.socket(family, kind, protocol)
        try:
            if receive_buffer is not None:  # before connecting: the window is agreed on there
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            if source is not None:
                self.socket.bind((source, 0))
            self.socket.settimeout(timeout)
            self.socket.connect(address)
        except BaseException:
            self.socket.close()
            raise

    def send(self, data: bytes) -> None:
        """Send ``data`` as it is, all of it.

        :raises TimeoutError: the server does not take it
        """
        self.socket.settimeout(self.timeout)
        try:
            self.socket.sendall(data)
        except TimeoutError:
            raise TimeoutError(
                f"the server did not take {len(data)} bytes within {self.timeout} s; {self._inbox}"
            ) from None

    def _receive(self, awaited: str, end: float, inbox: Inbox | None = None) -> bytes:
        """What comes next: at least one byte.

        :param awaited: for the message of an error
        :param end: until when to wait, by ``time.monotonic``
        :param inbox: what to say has been received
        """
        if data := self._read(awaited, end, inbox or self._inbox):
            return data
        raise ConnectionError(f"the server closed the connection before {awaited} came; {inbox or self._inbox}")

    def _read(self, awaited: str, end: float, inbox: Inbox) -> bytes:
        """What comes next; nothing if that is the server's FIN."""
        left = end - time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError
            self.socket.settimeout(left)
            return self.socket.recv(AT_ONCE)
        except TimeoutError:
            raise TimeoutError(f"{awaited} did not come in time; {inbox}") from None
        except ConnectionResetError:
            raise ConnectionResetError(f"the server reset the connection before {awaited} came; {inbox}") from None

    def _end(self, timeout: float | None) -> float:
        return time.monotonic() + (self.timeout if timeout is None else timeout)

    def abort(self) -> float:
        """Leave with a RST, as a process that crashes or a browser in a hurry.

        :return: when, by ``time.monotonic``, a clock that all processes of the machine share
        """
        left = time.monotonic()
        if self.socket.fileno() >= 0:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.socket.close()
        return left

    def close(self) -> float:
        """Leave with a FIN.

        What has arrived is read first: else the system sends a RST (RFC 1122, section 4.2.2.13). It does so too, after
        the FIN, for what the server sends from then on.

        :return: when, by ``time.monotonic``
        """
        left = time.monotonic()
        if self.socket.fileno() >= 0:
            with suppress(OSError):  # the server has left first
                self.socket.shutdown(socket.SHUT_WR)
                self.socket.setblocking(False)
                self._drop_what_has_arrived()
            self.socket.close()
        return left

    def _drop_what_has_arrived(self) -> None:
        dropped = 0
        while dropped < DROPPED and (data := self.socket.recv(AT_ONCE)):
            dropped += len(data)

    def half_close(self) -> float:
        """Send a FIN, and go on reading. To some servers that client has gone, to others it has not.

        :return: when, by ``time.monotonic``
        """
        left = time.monotonic()
        self.socket.shutdown(socket.SHUT_WR)
        return left

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
