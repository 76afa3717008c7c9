"""The loss of a connection, overheard: on uvicorn nobody has to wait inside ``receive`` for it.

``receive`` is where a server says that the client has left, and whoever waits there for that costs a request two calls
of it and a coroutine to close. uvicorn's says so from when the event loop has told its protocol that the connection is
lost, and no sooner. So a listener stands between the two, and ``receive`` is read when there is something to hear.

The event loop's transport lets itself be given another protocol (``set_protocol``); of uvicorn this takes that it says
``disconnected`` in one place only, which is looked at, and that it goes on reading from the connection. Where either
is not so, or not known, ``receive`` is read all the time, as it is for other servers.
"""

from __future__ import annotations

import asyncio
from contextvars import Context, copy_context
from functools import cache
from typing import Any, Protocol, cast

from starlette.types import Receive

from ._stepper import is_uvicorns


class Listener(Protocol):
    """Whoever wants to know."""

    def connection_lost(self) -> None: ...


class Overheard:
    """Stands between a connection's transport and its protocol; all but the end goes past it."""

    __slots__ = ("_listeners", "_protocol", "data_received", "eof_received", "pause_writing", "resume_writing")

    def __init__(self, protocol: asyncio.Protocol) -> None:
        self._protocol = protocol
        self.data_received = protocol.data_received
        self.eof_received = protocol.eof_received
        self.pause_writing = protocol.pause_writing
        self.resume_writing = protocol.resume_writing
        self._listeners: dict[Listener, Context] = {}

    def add(self, listener: Listener) -> None:
        """Have it told, in the present context, once the connection is lost and the protocol knows."""
        self._listeners[listener] = copy_context()

    def remove(self, listener: Listener) -> None:
        """It need not know any more."""
        self._listeners.pop(listener, None)

    def connection_lost(self, exc: Exception | None) -> None:
        try:
            self._protocol.connection_lost(exc)
        finally:
            while self._listeners:
                listener, context = self._listeners.popitem()
                context.run(listener.connection_lost)


def overhear(receive: Receive) -> Overheard | None:
    """Where to listen for the loss of the connection whose ``receive`` this is; ``None``: read it."""
    if not is_uvicorns(receive):
        return None
    request: Any = receive.__self__  # type: ignore[attr-defined]
    transport, flow = request.transport, request.flow
    try:
        if transport.is_closing() or flow.read_paused:
            return None
        protocol = transport.get_protocol()
        kind: Any = type(protocol)
        if kind is Overheard:
            return cast(Overheard, protocol)
        if not issubclass(kind, asyncio.Protocol) or not _says_it_once(kind):
            return None
        overheard = Overheard(protocol)
        transport.set_protocol(overheard)
    except (AttributeError, NotImplementedError):  # a transport that cannot, or another release of uvicorn's
        return None
    return overheard


@cache
def _says_it_once(protocol: type[Any]) -> bool:
    """Whether what it says of clients that leave is said when the connection is lost, as far as can be told."""
    saying = [
        name
        for name, method in vars(protocol).items()
        if "disconnected" in getattr(getattr(method, "__code__", None), "co_names", ())
    ]
    return saying == ["connection_lost"]
