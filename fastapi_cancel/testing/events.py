"""Server-sent events as a browser reads them: HTML standard, section 9.2.6, "Interpreting an event stream"."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass

_LINE_END = re.compile(r"\r\n|\n|\r")


@dataclass(frozen=True)
class Event:
    """What reaches an ``EventSource``'s listeners.

    :ivar id: the last event id, which stays until another one comes
    """

    data: str
    event: str = "message"
    id: str = ""


class EventReader:
    """Reads a stream in whatever pieces it comes. Written from the standard's own steps, beside the library's encoder.

    :ivar events: so far
    :ivar last_id: what a client that comes back would send as ``Last-Event-ID``
    :ivar retry: milliseconds that the stream asks it to wait first
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.last_id = ""
        self.retry: int | None = None
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("replace").decode
        self._text = ""
        self._after_cr = False
        self._data = self._event = self._id = ""

    def feed(self, piece: bytes) -> EventReader:
        """The next piece of the stream. An event that is never finished by a blank line is dropped."""
        text = self._decode(piece)
        if self._after_cr and text:
            text = text.removeprefix("\n")  # the other half of a line end that has been taken
            self._after_cr = False
        *lines, self._text = _LINE_END.split(self._text + text)
        self._after_cr = self._after_cr or text.endswith("\r")
        for line in lines:
            self._line(line)
        return self

    def _line(self, line: str) -> None:
        if not line:
            self._dispatch()
        elif not line.startswith(":"):
            name, _, value = line.partition(":")
            self._field(name, value.removeprefix(" "))

    def _field(self, name: str, value: str) -> None:
        if name == "event":
            self._event = value
        elif name == "data":
            self._data += value + "\n"
        elif name == "id" and "\0" not in value:
            self._id = value
        elif name == "retry" and re.fullmatch("[0-9]+", value):
            self.retry = int(value)

    def _dispatch(self) -> None:
        self.last_id = self._id
        if self._data:
            self.events.append(Event(self._data.removesuffix("\n"), self._event or "message", self.last_id))
        self._data = self._event = ""
