"""Server-sent events as a browser reads them: HTML standard, section 9.2.6."""

from __future__ import annotations

import pytest

from fastapi_cancel.testing import Event, EventReader


def read(*pieces: bytes) -> EventReader:
    reader = EventReader()
    for piece in pieces:
        assert reader.feed(piece) is reader
    return reader


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: a\n\n", [Event("a")]),
        (b"data:a\rdata:  b\r\r", [Event("a\n b")]),
        (b"data: a\r\n\r\ndata: b\r\r\n", [Event("a"), Event("b")]),
        (b"\xef\xbb\xbfdata\r\n\r\n: comment\r\n\r\n", [Event("")]),
        (b"id: 1\n\nevent: x\n\nid\ndata: b\n\n", [Event("b")]),
        (b"id: 1\nid: \x00\nevent: x\ndata: a\nother: b\n\ndata: b", [Event("a", "x", "1")]),
        (b"id: 1\ndata: a\n\ndata: b\n\n", [Event("a", id="1"), Event("b", id="1")]),
        ("data: a\u2028b\x85\n\n".encode(), [Event("a\u2028b\x85")]),
        (b"data: caf\xe9\n\n", [Event("caf\ufffd")]),
    ],
)
def test_it_follows_the_standard(stream: bytes, events: list[Event]) -> None:
    """The standard's own examples and more, in one piece and in bytes."""
    assert read(stream).events == events
    assert read(*(bytes([byte]) for byte in stream)).events == events
    assert read(b"", *(piece for byte in stream for piece in (bytes([byte]), b""))).events == events


def test_an_event_is_there_with_its_blank_line() -> None:
    """A CR ends a line at once; should a LF follow, it belongs to it."""
    reader = read(b"data: a\r\r")
    assert reader.events == [Event("a")]
    assert reader.feed(b"\ndata: b\n").events == [Event("a")]
    assert reader.feed(b"\n").events == [Event("a"), Event("b")]


def test_what_a_client_would_come_back_with() -> None:
    reader = read(b"id: 7\nretry: 150\ndata: a\n\n", b"id: 8\nretry: soon\ndata: b\n")
    assert (reader.last_id, reader.retry) == ("7", 150)
