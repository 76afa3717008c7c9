"""A client that speaks HTTP/2 in the clear, with prior knowledge (RFC 9113, section 3.3), and leaves stream by stream.

That is how browsers leave: they reset the one stream; its connection stays, and what else goes on there. Hypercorn and
Granian answer it, and nginx and HAProxy where they are told to.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress

from ._connection import SHOWN, Connection, Inbox

try:
    from h2.config import H2Configuration
    from h2.connection import H2Connection
    from h2.errors import ErrorCodes
    from h2.events import (
        DataReceived,
        Event,
        RemoteSettingsChanged,
        ResponseReceived,
        StreamEnded,
        StreamReset,
    )
    from h2.exceptions import ProtocolError, StreamClosedError
except ModuleNotFoundError as exc:
    raise ImportError("Http2Client needs h2: pip install 'fastapi-cancel[testing]'") from exc


HEAD = 9  # bytes, of each frame
GOAWAY = 7


class Http2Client(Connection):
    """A client on one connection, for any number of requests at once.

    Nothing is read but by the methods that wait for something; these read for all streams, and give the server new
    credit for what has come (flow control), unless a stream is stalled.

    :ivar farewell: why the server wants no more requests, once it has said so (GOAWAY), e.g. ``"NO_ERROR"``
    :raises ConnectionError: the server does not speak HTTP/2 in the clear
    :raises TimeoutError: it says nothing
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
        super().__init__(port, host, receive_buffer=receive_buffer, timeout=timeout, source=source)
        self._h2 = H2Connection(H2Configuration(header_encoding="utf-8"))
        self._streams: dict[int, Http2Stream] = {}
        self._settled = False
        self._raw = bytearray()
        self.farewell: str | None = None
        try:
            self._h2.initiate_connection()
            self._flush()
            end = self._end(None)
            while not self._settled:
                self._pump("the server's HTTP/2 settings", end, self._inbox)
        except BaseException:
            self.socket.close()
            raise

    def request(
        self,
        path: str,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        end: bool = True,
    ) -> Http2Stream:
        """Send a request.

        :param headers: beside those that HTTP/2 asks for
        :param end: ``False`` for an upload that goes on with :meth:`Http2Stream.send`, or is cut
        :raises ConnectionError: the server has said that it wants no more
        """
        if self.farewell is not None:
            raise ConnectionError(f"the server wants no more requests on this connection (GOAWAY, {self.farewell})")
        number = self._h2.get_next_available_stream_id()
        head = {":method": method, ":scheme": "http", ":authority": self._host, ":path": path}
        stream = self._streams[number] = Http2Stream(self, number)
        self._h2.send_headers(number, list({**head, **(headers or {})}.items()), end_stream=end and not body)
        self._flush()
        if body:
            stream.send(body, end)
        return stream

    def close(self) -> float:
        """Say goodbye (GOAWAY), and leave with a FIN."""
        with suppress(OSError, ProtocolError):  # the server has left first
            self._h2.close_connection()
            self._flush()
        return super().close()

    def _pump(self, awaited: str, end: float, inbox: Inbox) -> None:
        """Read what comes next, for whichever stream."""
        data = self._receive(awaited, end, inbox)
        self._raw += data
        try:
            for frame in self._frames():
                for event in self._h2.receive_data(frame):
                    self._take(event)
        except ProtocolError as exc:
            raise ConnectionError(f"this is no HTTP/2 ({exc}): {data[:SHOWN]!r}") from None
        self._flush()

    def _frames(self) -> Iterator[bytes]:
        """Those that are complete, but for a GOAWAY.

        h2 takes nothing after one, while servers that shut down in an orderly way say it first, and then end what is
        open (RFC 9113, section 6.8).
        """
        while len(self._raw) >= HEAD:
            size = HEAD + int.from_bytes(self._raw[:3])
            if size > HEAD + self._h2.max_inbound_frame_size:
                raise ProtocolError("a frame that is too large")
            if len(self._raw) < size:
                return
            frame = bytes(self._raw[:size])
            del self._raw[:size]
            if frame[3] == GOAWAY:
                self.farewell = _named(int.from_bytes(frame[HEAD + 4 : HEAD + 8]))
            else:
                yield frame

    def _take(self, event: Event) -> None:
        if isinstance(event, RemoteSettingsChanged):
            self._settled = True
        elif isinstance(event, (ResponseReceived, DataReceived, StreamEnded, StreamReset)):
            self._streams[event.stream_id]._take(event)

    def _flush(self) -> None:
        self.send(self._h2.data_to_send())


class Http2Stream:
    """One request on an :class:`Http2Client`, and its response. Made by :meth:`Http2Client.request`.

    Its methods that read raise ``TimeoutError`` when the server does not send what was asked for in time,
    ``ConnectionResetError`` when it resets the stream, ``ConnectionError`` when it ends the stream, or closes the
    connection, instead. The message says what had been received.

    :ivar number: of the stream
    :ivar status: of the response, once that has begun
    :ivar headers: of the response
    :ivar ended: whether the response is complete
    :ivar error: why the server has reset the stream, e.g. ``"CANCEL"``; else ``None``
    """

    def __init__(self, client: Http2Client, number: int) -> None:
        self.number = number
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.ended = False
        self.error: str | None = None
        self._client = client
        self._inbox = Inbox()
        self._stalled = False
        self._left = False
        self._owed = 0

    def send(self, data: bytes, end: bool = False) -> None:
        """Send a piece of the request's body, as far as the server allows for it.

        :param end: whether it is the last one
        :raises TimeoutError: the server does not take it
        :raises ConnectionResetError: it wants no more of it
        """
        h2, until = self._client._h2, self._client._end(None)
        while data or end:
            while self.error is not None or (data and h2.local_flow_control_window(self.number) <= 0):
                self._wait("room for more of the body", until)
            room = min(h2.local_flow_control_window(self.number), h2.max_outbound_frame_size)
            piece, data = data[:room], data[room:]
            h2.send_data(self.number, piece, end_stream=end and not data)
            self._client._flush()
            end = end and bool(data)

    def head(self) -> tuple[int, dict[str, str]]:
        """Wait for the head of the response: its status, and its headers by their names in lower case."""
        until = self._client._end(None)
        while self.status is None:
            self._wait("the head of the response", until)
        return self.status, self.headers

    def until(self, marker: bytes, *, timeout: float | None = None) -> bytes:
        """Read the body up to and including ``marker``.

        :param timeout: seconds, instead of the client's
        """
        until = self._client._end(timeout)
        while (read := self._inbox.until(marker)) is None:
            self._wait(repr(marker), until)
        return read

    def rest(self) -> bytes:
        """Read what is left of the body; it has ended as it should, not been cut off."""
        until = self._client._end(None)
        while not self.ended:
            self._wait("the end of the response", until)
        return self._inbox.take()

    def response(self) -> tuple[int, bytes]:
        """Read the whole response: its status, and its body."""
        status, _ = self.head()
        return status, self.rest()

    def stall(self) -> None:
        """Give the server no more credit for this stream. Others go on."""
        self._stalled = True

    def resume(self) -> None:
        """Give it what it is owed, and go on."""
        self._stalled = False
        if self._owed and not self.ended:
            with suppress(StreamClosedError):  # the server has reset it
                self._client._h2.increment_flow_control_window(self._owed, self.number)
                self._client._flush()
        self._owed = 0

    def reset(self, code: int = ErrorCodes.CANCEL) -> float:
        """Leave this stream, as browsers do; the connection stays.

        :param code: of the error (RFC 9113, section 7)
        :return: when, by ``time.monotonic``
        :raises RuntimeError: there is nothing left to leave
        """
        if self.ended or self.error or self._left:
            raise RuntimeError(f"stream {self.number} has ended already: there is nothing to reset")
        self._left = True
        left = time.monotonic()
        self._client._h2.reset_stream(self.number, code)
        self._client._flush()
        return left

    def _wait(self, awaited: str, end: float) -> None:
        if self._left:
            raise RuntimeError(f"stream {self.number} was reset by the test: there is nothing to wait for")
        if self.error is not None:
            raise ConnectionResetError(
                f"the server reset the stream ({self.error}) before {awaited} came; {self._inbox}"
            )
        if self.ended:
            raise ConnectionError(f"the server ended the stream before {awaited} came; {self._inbox}")
        self._client._pump(awaited, end, self._inbox)

    def _take(self, event: ResponseReceived | DataReceived | StreamEnded | StreamReset) -> None:
        if isinstance(event, ResponseReceived):
            headers = {str(name): str(value) for name, value in event.headers}
            self.status, self.headers = int(headers.pop(":status")), headers
        elif isinstance(event, DataReceived):
            self._inbox.add(event.data)
            self._acknowledge(event.flow_controlled_length)
        elif isinstance(event, StreamEnded):
            self.ended = True
        else:
            self.error = _named(event.error_code or ErrorCodes.NO_ERROR)

    def _acknowledge(self, length: int) -> None:
        if not self._stalled:
            self._client._h2.acknowledge_received_data(length, self.number)
        elif length:
            self._owed += length
            self._client._h2.increment_flow_control_window(length)  # the connection's, for the other streams


def _named(code: int) -> str:
    try:
        return ErrorCodes(code).name
    except ValueError:
        return str(code)
