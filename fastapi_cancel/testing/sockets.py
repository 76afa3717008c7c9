"""An HTTP/1.1 client that leaves when and how the test says.

What libraries for HTTP hide is what the test is about: they read ahead, pool their connections and say goodbye in an
orderly way. This one is a socket. It reads only when it is asked to, so a client that stalls is one whose methods
nobody calls; ``receive_buffer`` makes it show sooner.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ._connection import Connection

Headers = Mapping[str, str] | str
"""A mapping, or the lines as they are sent, each with its CR LF."""

LAST_CHUNK = b"0\r\n\r\n"
STATUS = re.compile(r"HTTP/1\.[01] (\d{3})\b")


class RawClient(Connection):
    """A client on one connection, for one request after the other.

    ::

        with RawClient(8000) as client:
            client.request("/events")
            client.until(b"data: first")
            client.abort()

    Each method that reads raises ``TimeoutError`` when the server does not send what was asked for within ``timeout``,
    ``ConnectionResetError`` when it answers with a RST, ``ConnectionError`` when it closes instead. The message says
    what had been received.
    """

    _method = "GET"

    def request(self, path: str, method: str = "GET", headers: Headers = "", body: bytes = b"") -> None:
        """Send a request.

        :param headers: beside ``Host``, and ``Content-Length`` if there is a body; a ``Content-Length`` above the
            body's makes it the beginning of an upload, that goes on with :meth:`send` or is cut
        """
        if not isinstance(headers, str):
            headers = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        names = {line.partition(":")[0].lower() for line in headers.splitlines()}
        if body and names.isdisjoint({"content-length", "transfer-encoding"}):
            headers += f"Content-Length: {len(body)}\r\n"
        self._method = method
        self.send(f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\n{headers}\r\n".encode() + body)

    def until(self, marker: bytes, *, timeout: float | None = None) -> bytes:
        """Read up to and including ``marker``.

        :param timeout: seconds, instead of the client's
        """
        end = self._end(timeout)
        while (read := self._inbox.until(marker)) is None:
            self._inbox.add(self._receive(repr(marker), end))
        return read

    def exactly(self, size: int) -> bytes:
        """Read so many bytes."""
        end = self._end(None)
        while (read := self._inbox.exactly(size)) is None:
            self._inbox.add(self._receive(f"{size} bytes", end))
        return read

    def head(self) -> tuple[int, dict[str, str]]:
        """Read the head of a response: its status, and its headers by their names in lower case.

        :raises ValueError: this is no HTTP/1.1
        """
        status, *lines = self.until(b"\r\n\r\n").decode("latin-1").rstrip().split("\r\n")
        found = STATUS.match(status)
        if found is None:
            raise ValueError(f"{status!r} is not the status line of a response; {self._inbox}")
        headers: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(":")
            name, value = name.lower(), value.strip()
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        return int(found[1]), headers

    def response(self) -> tuple[int, bytes]:
        """Read one whole response: its status, and its body without the framing.

        :raises ValueError: this is no HTTP/1.1
        """
        status, headers = self.head()
        if self._method == "HEAD" or status in (204, 304):
            return status, b""
        if headers.get("transfer-encoding") == "chunked":
            return status, self._chunked()
        if "content-length" in headers:
            return status, self.exactly(int(headers["content-length"]))
        return status, self.until_closed()

    def _chunked(self) -> bytes:
        body = bytearray()
        while size := int(self.until(b"\r\n").partition(b";")[0], 16):
            body += self.exactly(size)
            self.until(b"\r\n")
        while self.until(b"\r\n") != b"\r\n":
            pass  # a trailer
        return bytes(body)

    def rest(self) -> bytes:
        """Read what is left of a chunked response, framing included; it has ended as it should, not been cut off."""
        end = self._end(None)
        while not self._inbox.startswith(LAST_CHUNK):
            if (read := self._inbox.until(b"\r\n" + LAST_CHUNK)) is not None:
                return read
            self._inbox.add(self._receive("the last chunk", end))
        return self._inbox.take(len(LAST_CHUNK))

    def until_closed(self) -> bytes:
        """Read all that comes before the server closes the connection. A RST is an error here too."""
        end = self._end(None)
        while data := self._read("the end", end, self._inbox):
            self._inbox.add(data)
        return self._inbox.take()
