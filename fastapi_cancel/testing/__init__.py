"""A testing kit: clients that leave, and what the work behind them leaves behind."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import LeavingClient
    from .events import Event, EventReader
    from .every_wait import Chaos, chaos
    from .faults import Fault
    from .habits import Habits
    from .http2 import Http2Client
    from .leftovers import nothing_left
    from .live import LiveServer, LiveServerError
    from .moments import (
        Moment,
        after_body,
        after_chunks,
        after_event,
        after_start,
        at_wait,
        before_body,
        during_send,
        when,
    )
    from .recorder import ServedVisit
    from .sockets import RawClient
    from .visit import NeverCame, Patience, Visit

__all__ = [
    "Chaos",
    "Event",
    "EventReader",
    "Fault",
    "Habits",
    "Http2Client",
    "LeavingClient",
    "LiveServer",
    "LiveServerError",
    "Moment",
    "NeverCame",
    "Patience",
    "RawClient",
    "ServedVisit",
    "Visit",
    "after_body",
    "after_chunks",
    "after_event",
    "after_start",
    "at_wait",
    "before_body",
    "chaos",
    "during_send",
    "nothing_left",
    "when",
]

_WHERE = {
    "Chaos": "every_wait",
    "Event": "events",
    "EventReader": "events",
    "Fault": "faults",
    "Habits": "habits",
    "Http2Client": "http2",
    "LeavingClient": "client",
    "LiveServer": "live",
    "LiveServerError": "live",
    "Moment": "moments",
    "NeverCame": "visit",
    "Patience": "visit",
    "RawClient": "sockets",
    "ServedVisit": "recorder",
    "Visit": "visit",
    "after_body": "moments",
    "after_chunks": "moments",
    "after_event": "moments",
    "after_start": "moments",
    "at_wait": "moments",
    "before_body": "moments",
    "chaos": "every_wait",
    "during_send": "moments",
    "nothing_left": "leftovers",
    "when": "moments",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)
