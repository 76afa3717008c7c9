"""Events on the wire: what a stream may yield, as bytes; and the id that a client comes back with.

The format is that of the WHATWG HTML standard, section 9.2.6, "Interpreting an event stream"
(https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation).
A line ends at CR LF, LF or CR and nowhere else: U+2028 and the like are text.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from fastapi import Depends, Header
from fastapi.encoders import jsonable_encoder
from fastapi.sse import ServerSentEvent as FastAPIEvent
from pydantic import BaseModel
from pydantic_core import to_json

from .exceptions import InvalidEvent

if TYPE_CHECKING:
    from sse_starlette.event import ServerSentEvent

__all__ = ["LastEventID", "encode", "get_last_event_id"]

Encoded: TypeAlias = tuple[bytes, str | None]
"""The bytes of an event, and its id if it has one."""
Encoder: TypeAlias = Callable[[Any, str], Encoded]

FIELDS = ("data", "event", "id", "retry", "comment")
_SURROGATE = re.compile("[\ud800-\udfff]")
_LINE_END = re.compile(r"\r\n|\r|\n")


def encode(item: Any, sep: str = "\r\n") -> Encoded:
    """One event as bytes, and its id.

    ======================================= ===========================================================
    item                                    what goes out
    ======================================= ===========================================================
    bytes, bytearray, memoryview            the bytes as they are: you wrote the wire format
    str, and whatever is not named here     ``data: …``, each line on its own; ``str()`` of it
    dict                                    the fields ``data``, ``event``, ``id``, ``retry``, ``comment``
    ``ServerSentEvent`` of sse-starlette    its fields; ``data`` by ``str()``
    ``ServerSentEvent`` of FastAPI          its fields; ``data`` as JSON, ``raw_data`` as it is
    Pydantic model, dataclass               ``data: …`` as JSON
    what has a method ``to_wire(sep)``      what that returns: bytes and an id, or ``None`` for the id
    ======================================= ===========================================================

    :param sep: the line ending, for events that do not bring their own
    :raises InvalidEvent: a field cannot be sent; the message names it
    """
    try:
        return _encoder(type(item))(item, sep)
    except InvalidEvent:
        raise
    except (TypeError, ValueError) as exc:  # half a character (a lone surrogate); not serialisable as JSON
        raise InvalidEvent(f"cannot be sent as an event: {item!r}: {exc}") from exc


def _choose(kind: Any) -> Encoder:
    if issubclass(kind, (bytes, bytearray, memoryview)):
        return lambda item, sep: (bytes(item), None)
    if issubclass(kind, str):
        return _text
    theirs = getattr(
        sys.modules.get("sse_starlette.event"), "ServerSentEvent", None
    )  # an extra: not for a broker's sake
    if theirs is not None and issubclass(kind, theirs):
        return _event if kind.encode is theirs.encode else _own_encoding
    if issubclass(kind, dict):
        return _fields
    if hasattr(kind, "to_wire"):  # the events of a broker
        return lambda item, sep: item.to_wire(sep)
    if issubclass(kind, FastAPIEvent):
        return _fastapi_event
    if issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind):
        return lambda item, sep: _format(sep, _json(item))
    return lambda item, sep: _text(str(item), sep)


_encoder: Callable[[type], Encoder] = lru_cache(maxsize=256)(_choose)


def _text(item: str, sep: str) -> Encoded:
    if "\n" in item or "\r" in item:
        return _format(sep, item)
    return f"data: {item}{sep}{sep}".encode(), None


def _event(item: ServerSentEvent, sep: str) -> Encoded:
    data, event, id, sep = item.data, item.event, item.id, item._sep
    if item.retry is None and item.comment is None and type(data) is type(event) is type(id) is str:
        # The usual event, in few steps: with no more line ends in it than ours, all is well.
        text = f"id: {id}{sep}event: {event}{sep}data: {data}{sep}{sep}"
        if text.count("\n") + text.count("\r") == 4 * len(sep) and "\0" not in text:
            try:
                return text.encode(), id
            except UnicodeEncodeError:
                return _format(sep, data, event, id)  # which says where
    return _format(sep, data, event, id, item.retry, item.comment)


def _own_encoding(item: ServerSentEvent, sep: str) -> Encoded:
    return item.encode(), _identifier(item.id)


def _fields(item: dict[str, Any], sep: str) -> Encoded:
    if not item.keys() <= _KNOWN:
        unknown = ", ".join(repr(name) for name in item if name not in _KNOWN)
        raise InvalidEvent(f"an event has no {unknown}; it has {', '.join(FIELDS)}")
    return _format(sep, *map(item.get, FIELDS))


_KNOWN = {*FIELDS, "sep"}  # sse-starlette takes `sep` too, and ignores it


def _fastapi_event(item: FastAPIEvent, sep: str) -> Encoded:
    data = item.raw_data
    if data is None and item.data is not None:
        data = _json(item.data)
    return _format(sep, data, item.event, item.id, item.retry, item.comment)


def _json(value: Any) -> str:
    return to_json(value, inf_nan_mode="null", fallback=jsonable_encoder).decode()


def _format(
    sep: str, data: Any = None, event: str | None = None, id: Any = None, retry: Any = None, comment: Any = None
) -> Encoded:
    text = "" if comment is None else _lines(": ", str(comment), sep)
    if id is not None:
        id = _identifier(id)
        text += f"id: {id}{sep}"
    if event is not None:
        if not isinstance(event, str) or "\n" in event or "\r" in event:
            raise InvalidEvent(f"event must be a str without line breaks, not {event!r}")
        text += f"event: {event}{sep}"
    if data is not None:
        text += _lines("data: ", data if type(data) is str else str(data), sep)
    if retry is not None:
        check_retry(retry)
        text += f"retry: {retry}{sep}"
    try:
        return (text + sep).encode(), id
    except UnicodeEncodeError as exc:  # half a character, as JSON can hold it
        fields = {"data": data, "event": event, "id": id, "comment": comment}
        name = next(name for name, value in fields.items() if _SURROGATE.search(str(value)))
        raise InvalidEvent(f"{name} must not hold lone surrogates: {fields[name]!r}") from exc


def _lines(field: str, value: str, sep: str) -> str:
    if "\n" in value or "\r" in value:
        return "".join(f"{field}{line}{sep}" for line in _LINE_END.split(value))
    return f"{field}{value}{sep}"


def _identifier(id: Any) -> str | None:
    """A client ignores an id with NUL in it, and a line break would end it."""
    if isinstance(id, int) and not isinstance(id, bool):
        return str(id)
    if id is not None and (not isinstance(id, str) or "\n" in id or "\r" in id or "\0" in id):
        raise InvalidEvent(f"id must be a str without NUL or line breaks, or an int, not {id!r}")
    return id


def check_retry(retry: Any) -> None:
    """Refuse what a client would ignore: ``retry`` is digits only, milliseconds."""
    if not isinstance(retry, int) or isinstance(retry, bool) or retry < 0:
        raise InvalidEvent(f"retry must be a whole number of milliseconds, 0 or more, not {retry!r}")


def is_whole(tail: bytes) -> bool:
    """Whether a stream that ends with ``tail`` ends where an event does: with an empty line."""
    line = tail[:-2] if tail.endswith(b"\r\n") else tail[:-1] if tail.endswith((b"\r", b"\n")) else b""
    return line.endswith((b"\r", b"\n"))


async def get_last_event_id(last_event_id: Annotated[str | None, Header()] = None) -> str | None:
    """The id of the last event that this client saw, when it comes back; ``None`` when it is new.

    Browsers send it as UTF-8 (HTML standard, section 9.2.3); ASGI and Starlette read headers as Latin-1.
    """
    if last_event_id is None:
        return None
    return last_event_id.encode("latin-1").decode(errors="replace")


LastEventID = Annotated[str | None, Depends(get_last_event_id)]
"""``async def events(last: LastEventID)``: where a client that comes back left off."""
