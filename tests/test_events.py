"""The wire format, in process: what each kind of event becomes, and what a client by the standard makes of it.

The judge is :class:`EventReader`, written from the standard's own steps. httpx-sse is asked as well, where it follows
them: it also reports events without data, and reads more as ``retry`` than digits.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from itertools import product
from typing import Any
from uuid import UUID

import anyio
import httpx
import pytest
from fastapi import FastAPI
from fastapi.sse import ServerSentEvent as FastAPIEvent
from httpx_sse import EventSource
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field
from sse_starlette.event import ensure_bytes

from fastapi_cancel import InvalidEvent, JSONServerSentEvent, LastEventID, ServerSentEvent, SSEResponse
from fastapi_cancel.events import encode, is_whole
from fastapi_cancel.testing import Event, EventReader, LeavingClient

from .conftest import named

SEPARATORS = ["\r\n", "\n", "\r"]
NO_LINE_ENDS = ["\u2028", "\u2029", "\u0085", "\v", "\f", "\x1c", "\x1d", "\x1e", "\0"]
LINE_ENDS = ["\n", "\r", "\r\n"]


def parsed(*pieces: bytes) -> EventReader:
    """What a client makes of it."""
    reader = EventReader()
    for piece in pieces:
        reader.feed(piece)
    return reader


# -- the kinds of events -----------------------------------------------------------------------


class Reading(BaseModel):
    sensor_name: str = Field(alias="sensorName")
    taken: datetime
    value: float


@dataclass
class Point:
    x: int
    day: date


@dataclass
class Path:
    points: list[Point]
    reading: Reading


class Own(ServerSentEvent):
    """As applications write them that were there before ``JSONServerSentEvent``."""

    def encode(self) -> bytes:
        return f"id: {self.id}\ndata: own {self.data}\n\n".encode()


class Renamed(ServerSentEvent):
    def __init__(self, name: str) -> None:
        super().__init__(data="d", event=name)


class Shouted(str):
    __slots__ = ()

    def __str__(self) -> str:
        return self.upper()


TAKEN = datetime(2026, 11, 20, 12, 30, tzinfo=UTC)
READING = Reading(sensorName="roof", taken=TAKEN, value=1.5)


@pytest.mark.parametrize(
    ("item", "wire", "id"),
    [
        (b"data: as it is\n\n", b"data: as it is\n\n", None),
        (bytearray(b"id: 1\n\n"), b"id: 1\n\n", None),
        (memoryview(b"data: x\n\n"), b"data: x\n\n", None),
        (b"", b"", None),
        ("text", b"data: text\r\n\r\n", None),
        ("", b"data: \r\n\r\n", None),
        (" indented", b"data:  indented\r\n\r\n", None),
        ("grüße 🎉", "data: grüße 🎉\r\n\r\n".encode(), None),
        (7, b"data: 7\r\n\r\n", None),
        (1.5, b"data: 1.5\r\n\r\n", None),
        (["a", 1], b"data: ['a', 1]\r\n\r\n", None),
        (Decimal("1.10"), b"data: 1.10\r\n\r\n", None),
        (UUID(int=0), b"data: 00000000-0000-0000-0000-000000000000\r\n\r\n", None),
        ({}, b"\r\n", None),
        ({"data": "x"}, b"data: x\r\n\r\n", None),
        ({"data": None, "id": "7"}, b"id: 7\r\n\r\n", "7"),
        ({"data": {"a": 1}}, b"data: {'a': 1}\r\n\r\n", None),
        ({"data": 0, "event": "", "id": ""}, b"id: \r\nevent: \r\ndata: 0\r\n\r\n", ""),
        ({"data": "x", "sep": "\n"}, b"data: x\r\n\r\n", None),
        ({"id": 12, "retry": 0}, b"id: 12\r\nretry: 0\r\n\r\n", "12"),
        (
            {"retry": 3000, "data": "d", "id": "i", "event": "e", "comment": "c"},
            b": c\r\nid: i\r\nevent: e\r\ndata: d\r\nretry: 3000\r\n\r\n",
            "i",
        ),
        (
            ServerSentEvent("d", event="e", id="i", retry=5, comment="c"),
            b": c\r\nid: i\r\nevent: e\r\ndata: d\r\nretry: 5\r\n\r\n",
            "i",
        ),
        (ServerSentEvent(7, sep="\n"), b"data: 7\n\n", None),
        (ServerSentEvent(), b"\r\n", None),
        (JSONServerSentEvent({"a": "ü"}, id="1"), 'id: 1\r\ndata: {"a":"ü"}\r\n\r\n'.encode(), "1"),
        (Own("x", id="9"), b"id: 9\ndata: own x\n\n", "9"),
        (Renamed("r"), b"event: r\r\ndata: d\r\n\r\n", None),
        (FastAPIEvent(data="x"), b'data: "x"\r\n\r\n', None),
        (FastAPIEvent(data={"a": [1, None]}, id="3"), b'id: 3\r\ndata: {"a":[1,null]}\r\n\r\n', "3"),
        (FastAPIEvent(data=READING, event="e"), None, None),
        (FastAPIEvent(raw_data="x\ny", retry=5), b"data: x\r\ndata: y\r\nretry: 5\r\n\r\n", None),
        (FastAPIEvent(comment="c"), b": c\r\n\r\n", None),
        (READING, None, None),
        (Path([Point(1, date(2026, 11, 20))], READING), None, None),
    ],
    ids=named,
)
def test_every_kind_of_event(item: Any, wire: bytes | None, id: str | None) -> None:
    """C19: the table of `encode`."""
    encoded, found = encode(item)
    assert found == id
    if wire is not None:
        assert encoded == wire
    assert parsed(encoded).last_id == (id or "") or isinstance(item, (bytes, bytearray))


AS_JSON = {"sensorName": "roof", "taken": "2026-11-20T12:30:00Z", "value": 1.5}


@pytest.mark.parametrize(
    ("item", "data"),
    [
        (READING, AS_JSON),
        (READING.model_copy(update={"value": float("nan")}), {**AS_JSON, "value": None}),
        (FastAPIEvent(data=READING), AS_JSON),
        (FastAPIEvent(data=float("inf")), None),
        (FastAPIEvent(data=[READING, {"day": date(2026, 11, 20)}]), [AS_JSON, {"day": "2026-11-20"}]),
        (FastAPIEvent(data="two\nlines"), "two\nlines"),
        (Point(1, date(2026, 11, 20)), {"x": 1, "day": "2026-11-20"}),
        (
            Path([Point(1, date(2026, 11, 20))], READING),
            {"points": [{"x": 1, "day": "2026-11-20"}], "reading": AS_JSON},
        ),
    ],
    ids=repr,
)
def test_data_as_json(item: Any, data: Any) -> None:
    """C19: what a browser's ``JSON.parse`` makes of it, so there is no NaN."""
    (event,) = parsed(encode(item)[0]).events
    assert json.loads(event.data, parse_constant=pytest.fail) == data


class Colour(str, enum.Enum):  # noqa: UP042
    RED = "red"


class Tone(enum.StrEnum):
    LOW = "low"


@pytest.mark.parametrize("sep", SEPARATORS, ids=repr)
@pytest.mark.parametrize(
    "item",
    [
        "text",
        "",
        "a\nb\rc\r\nd\n",
        "\n",
        "\u2028\u0085",
        b"raw",
        5,
        None,
        True,
        ["list"],
        Colour.RED,
        Tone.LOW,
        Shouted("loud"),
        Shouted("two\nlines"),
        {"data": Shouted("loud")},
        {"data": "a\r\nb", "event": "e", "id": "i", "retry": 1, "comment": "c\nd"},
        {"data": 1, "sep": "ignored"},
        {"comment": ""},
        {"event": "no data"},
        {},
        ServerSentEvent("a\nb", event="e", id="i", retry=1, comment="c"),
        ServerSentEvent("own separator", sep="\r"),
        ServerSentEvent(b"bytes"),
        JSONServerSentEvent({"a": [1, "ü"]}, event="e"),
        Own("x", id="1"),
    ],
    ids=named,
)
def test_the_bytes_are_those_of_sse_starlette(item: Any, sep: str) -> None:
    """C19: changing the import changes nothing on the wire."""
    assert encode(item, sep)[0] == ensure_bytes(item, sep)


def test_encoding_leaves_a_dict_as_it_is() -> None:
    item = {"data": "x", "sep": "\n"}
    encode(item, "\r")
    assert item == {"data": "x", "sep": "\n"}


# -- lines -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sep", SEPARATORS, ids=repr)
@pytest.mark.parametrize("end", LINE_ENDS, ids=repr)
@pytest.mark.parametrize(
    "make",
    [
        str,
        lambda text: {"data": text},
        ServerSentEvent,
        lambda text: FastAPIEvent(raw_data=text),
    ],
)
def test_each_line_of_data_is_a_line_of_its_own(make: Callable[[str], Any], end: str, sep: str) -> None:
    item = make(f"a{end}{end}b{end}")
    own = "\r\n" if isinstance(item, ServerSentEvent) else sep
    assert encode(item, sep)[0] == f"data: a{own}data: {own}data: b{own}data: {own}{own}".encode()


@pytest.mark.parametrize("end", LINE_ENDS, ids=repr)
def test_each_line_of_a_comment_is_a_comment(end: str) -> None:
    """What came from a user does not become a field."""
    wire = encode({"comment": f"a{end}data: b{end}{end}c"})[0]
    assert wire == b": a\r\n: data: b\r\n: \r\n: c\r\n\r\n"
    assert parsed(wire).events == []


@pytest.mark.parametrize("char", NO_LINE_ENDS, ids=ascii)
def test_only_cr_and_lf_end_a_line(char: str) -> None:
    """`str.splitlines` knows more line ends than the standard does."""
    wire = encode({"data": f"a{char}b", "event": f"e{char}f", "comment": f"c{char}d"})[0]
    assert wire == f": c{char}d\r\nevent: e{char}f\r\ndata: a{char}b\r\n\r\n".encode()
    assert parsed(wire).events == [Event(f"a{char}b", f"e{char}f")]


# -- what is refused ---------------------------------------------------------------------------


@dataclass
class Holder:
    content: object


class Model(BaseModel):
    content: Any


BAD_FIELDS: list[tuple[str, Any]] = [
    *(("id", bad) for bad in ["\0", "a\0b", "a\nb", "a\rb", "a\r\n", True, False, 1.0, b"1", ["1"]]),
    *(("event", bad) for bad in ["a\nb", "a\rb", "\r\n", 1, True, b"e"]),
    *(("retry", bad) for bad in [-1, True, False, 1.0, "1", "1000", float("nan"), b"1"]),
    *((name, "half \ud83d a character") for name in ["data", "event", "id", "comment"]),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS, ids=ascii)
def test_a_bad_field_of_a_dict_is_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidEvent, match=rf"\b{name}\b"):
        encode({"data": "x", name: value})


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS, ids=ascii)
def test_a_bad_field_of_an_event_is_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidEvent, match=rf"\b{name}\b"):
        encode(ServerSentEvent(**{"data": "x", name: value}))


@pytest.mark.parametrize("bad", ["a\nb", "a\rb"])
@pytest.mark.parametrize("name", ["id", "event"])
def test_a_bad_field_of_fastapis_event_is_named(name: str, bad: str) -> None:
    """FastAPI checks its own events when they are made, not when they are copied."""
    with pytest.raises(InvalidEvent, match=rf"\b{name}\b"):
        encode(FastAPIEvent(data="x").model_copy(update={name: bad}))


@pytest.mark.parametrize("name", ["Data", "datum", "type", 1])
def test_an_unknown_field_is_named(name: Any) -> None:
    with pytest.raises(InvalidEvent, match=rf"no {name!r}; it has data, event, id, retry, comment"):
        encode({"data": "x", name: "y"})


@pytest.mark.parametrize(
    "item",
    [
        Model(content=object()),
        Model(content="\ud800"),
        Holder(object()),
        Holder("\ud800"),
        FastAPIEvent(data={"content": object()}),
    ],
    ids=lambda item: type(item).__name__,
)
def test_data_that_is_no_json_is_named(item: Any) -> None:
    with pytest.raises(InvalidEvent, match="content"):
        encode(item)


def test_half_a_character_is_refused() -> None:
    """A lone surrogate has no UTF-8."""
    with pytest.raises(InvalidEvent, match="surrogates not allowed"):
        encode("\ud83d")


def test_an_event_that_is_refused_tells_why() -> None:
    with pytest.raises(InvalidEvent) as info:
        encode(Model(content=object()))
    assert isinstance(info.value, ValueError)
    assert info.value.__cause__ is not None


# -- where an event ends -----------------------------------------------------------------------


@pytest.mark.parametrize("first", LINE_ENDS, ids=repr)
@pytest.mark.parametrize("second", LINE_ENDS, ids=repr)
def test_an_event_is_whole_after_a_blank_line(first: str, second: str) -> None:
    assert is_whole(f"data: x{first}{second}".encode()) is (first + second != "\r\n")


@pytest.mark.parametrize("chunk", [b"data: x", b"data: x\n", b"data: x\r", b"data: x\r\n", b"data: x\n\nid: 1\n"])
def test_an_event_is_not_whole_before(chunk: bytes) -> None:
    assert not is_whole(chunk)


@pytest.mark.parametrize("sep", SEPARATORS, ids=repr)
@pytest.mark.parametrize("item", ["x", {"id": "1", "data": "a\nb", "comment": "c"}, {}, {"comment": "c"}], ids=repr)
def test_what_we_encode_is_whole(item: Any, sep: str) -> None:
    assert is_whole(b"data: x" + sep.encode() + encode(item, sep)[0])


@pytest.mark.anyio
@pytest.mark.parametrize("pieces", [[b"data: a\n\n"], [b"data: a\n", b"\n"], [b"data: a\r", b"\r\n"]], ids=repr)
async def test_an_event_in_pieces_is_followed_by_heartbeats(pieces: list[bytes]) -> None:
    """C20: bytes go out as they are, and may be split anywhere."""

    async def feed() -> AsyncIterator[Any]:
        for piece in pieces:
            yield piece
            while piece not in visit.body:
                await anyio.sleep(0.001)
        while b"ping" not in visit.body:
            await anyio.sleep(0.001)

    async with LeavingClient(SSEResponse(feed(), heartbeat=0.01)).visit("GET", "/") as visit:
        pass
    visit.assert_clean()
    assert visit.body.startswith(b"".join(pieces) + b": ping")


# -- any events at all -------------------------------------------------------------------------


@dataclass
class Sent:
    """An event, and what a client is to make of it.

    :ivar data: ``None``: it has none, so there is nothing to dispatch
    :ivar type: its name
    :ivar id: its id, ``None``: it has none, and that of an earlier one holds
    """

    item: Any
    data: str | None
    type: str = ""
    id: str | None = None
    retry: int | None = None

    @classmethod
    def of(cls, make: Callable[..., Any], fields: dict[str, Any]) -> Sent:
        data, id = fields.get("data"), fields.get("id")
        return cls(
            make(**fields),
            None if data is None else str(data),
            fields.get("event") or "",
            None if id is None else str(id),
            fields.get("retry"),
        )


texts = st.text() | st.text(st.sampled_from("a: \r\n\ufeff\u2028\u0085\v\0é🎉"))
names = texts.map(lambda text: re.sub(r"[\r\n]", "", text))
identifiers = names.map(lambda name: name.replace("\0", ""))
retries = st.integers(0, 10**12)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def fields_of(
    data: st.SearchStrategy[Any], ids: st.SearchStrategy[Any] = identifiers
) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {}, optional={"data": data, "event": names, "id": ids, "retry": retries, "comment": texts}
    )


class Anything(BaseModel):
    value: Any


@dataclass
class Something:
    value: Any


def as_bytes(sent: Sent) -> Sent:
    return Sent(encode(sent.item)[0], sent.data, sent.type, sent.id, sent.retry)


def as_json(fields: dict[str, Any], make: Callable[..., Any]) -> Sent:
    sent = Sent.of(make, {**fields, "data": None})
    if fields.get("data") is not None:
        sent.item = make(**fields)
        sent.data = json.dumps(fields["data"])
    return sent


def fields_of_events(separators: st.SearchStrategy[str]) -> st.SearchStrategy[Sent]:
    """sse-starlette's events bring their own separator."""
    return st.builds(
        lambda fields, sep: Sent.of(lambda **given: ServerSentEvent(**given, sep=sep), fields),
        fields_of(texts | st.integers(), identifiers | st.integers()),
        separators,
    )


events = st.one_of(
    texts.map(lambda text: Sent(text, text)),
    st.integers().map(lambda number: Sent(number, str(number))),
    fields_of(texts | st.integers(), identifiers | st.integers()).map(lambda fields: Sent.of(dict, fields)),
    fields_of_events(st.sampled_from(SEPARATORS)),
    fields_of(values).map(lambda fields: as_json(fields, JSONServerSentEvent)),
    fields_of(values).map(lambda fields: as_json(fields, FastAPIEvent)),
    fields_of(texts).map(lambda fields: Sent.of(lambda data=None, **rest: FastAPIEvent(raw_data=data, **rest), fields)),
    values.map(lambda value: Sent(Anything(value=value), json.dumps({"value": value}))),
    values.map(lambda value: Sent(Something(value), json.dumps({"value": value}))),
    fields_of(texts).map(lambda fields: as_bytes(Sent.of(dict, fields))),
)


def same_data(found: str, sent: Sent) -> bool:
    """Whether it is the data, but for the line ends: every kind of them arrives as LF. JSON by its meaning."""
    assert sent.data is not None
    if isinstance(sent.item, (JSONServerSentEvent, Anything, Something)) or (
        isinstance(sent.item, FastAPIEvent) and sent.item.raw_data is None
    ):
        return bool(json.loads(found) == json.loads(sent.data))
    return found == re.sub(r"\r\n|\r", "\n", sent.data)


def cut(stream: bytes, data: st.DataObject) -> list[bytes]:
    places = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8), label="cut at"))
    return [stream[start:end] for start, end in zip([0, *places], [*places, len(stream)], strict=True)]


@settings(deadline=None, max_examples=300)
@given(st.lists(events, max_size=6), st.sampled_from(SEPARATORS), st.data())
def test_a_client_gets_what_was_sent(sent: list[Sent], sep: str, data: st.DataObject) -> None:
    """HTML standard, section 9.2.6: any events, any separators, cut anywhere."""
    encoded = [encode(each.item, sep) for each in sent]
    pieces = cut(b"".join(wire for wire, _ in encoded), data)
    client = parsed(*pieces)

    last_id, retry = "", None
    expected: list[tuple[Sent, str]] = []
    for each, (_, id) in zip(sent, encoded, strict=True):
        if each.id is not None:
            last_id = each.id
        assert id == (None if isinstance(each.item, bytes) else each.id)
        retry = retry if each.retry is None else each.retry
        if each.data is not None:
            expected.append((each, last_id))
    assert (client.last_id, client.retry) == (last_id, retry)
    assert len(client.events) == len(expected)
    for event, (each, id) in zip(client.events, expected, strict=True):
        assert same_data(event.data, each)
        assert (event.event, event.id) == (each.type or "message", id)

    headers = {"content-type": "text/event-stream; charset=utf-8"}
    theirs = EventSource(httpx.Response(200, headers=headers, content=iter(pieces))).iter_sse()
    assert [(each.data, each.event or "message", each.id) for each in theirs if each.data] == [
        (event.data, event.event, event.id) for event in client.events if event.data
    ]


@settings(deadline=None, max_examples=50)
@given(st.lists(events, max_size=8), st.sampled_from(SEPARATORS))
@example([Sent("x" * 40_000, "x" * 40_000)] * 4, "\n")
def test_a_response_sends_the_events_and_nothing_else(sent: list[Sent], sep: str) -> None:
    """However they are gathered; ``None`` is skipped."""
    items = [item for each in sent for item in (each.item, None)]
    visit = anyio.run(LeavingClient(SSEResponse(items, sep=sep, heartbeat=None)).get, "/")
    assert visit.body == b"".join(encode(each.item, sep)[0] for each in sent)


# -- the way back ------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("headers", "last_id"),
    [
        ({}, None),
        ({"last-event-id": ""}, ""),
        ({"last-event-id": "17"}, "17"),
        ({"last-event-id": "grüße-🎉".encode().decode("latin-1")}, "grüße-🎉"),
        ({"last-event-id": "caf\xe9"}, "caf\ufffd"),
    ],
)
async def test_the_id_that_a_client_comes_back_with(headers: dict[str, str], last_id: str | None) -> None:
    """HTML standard, section 9.2.3: browsers send it as UTF-8."""
    app = FastAPI()

    @app.get("/")
    async def events(last: LastEventID) -> dict[str, str | None]:
        return {"last": last}

    visit = await LeavingClient(app).get("/", headers=headers)
    assert json.loads(visit.body) == {"last": last_id}


def test_the_id_is_documented_as_a_header() -> None:
    app = FastAPI()

    @app.get("/")
    async def events(last: LastEventID) -> None: ...

    (parameter,) = app.openapi()["paths"]["/"]["get"]["parameters"]
    assert (parameter["name"], parameter["in"], parameter["required"]) == ("last-event-id", "header", False)


TRICKY = ["x", "", "a\nb", "a\rb", "a\r\nb", "\0", "\ud83d", "\u2028", "ö" * 100]


@pytest.mark.parametrize("sep", ["\n", "\r", "\r\n"])
def test_the_usual_event_is_written_as_any_other(sep: str) -> None:
    """Data, name and id in one object have a way of their own, for speed; a dict has not."""

    def outcome(item: Any) -> Any:
        try:
            return encode(item, sep)
        except InvalidEvent as exc:
            return str(exc)

    for data, event, id in product(TRICKY, repeat=3):
        item = ServerSentEvent(data, event=event, id=id, sep=sep)
        assert outcome(item) == outcome({"data": data, "event": event, "id": id})
