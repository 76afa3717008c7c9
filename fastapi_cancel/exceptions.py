"""What can go wrong, under one base class; and which endings are not worth a line in the log."""

from __future__ import annotations

import traceback

from anyio import BrokenResourceError
from starlette.requests import ClientDisconnect


class CancelError(Exception):
    """Base class of every exception that this library raises itself."""


class ClientGone(CancelError, OSError):
    """Raised by ``send`` once the client has left or stopped reading.

    It is an ``OSError`` because ASGI 2.4 says so (HTTP spec, "Disconnected Client"), so
    Starlette's own responses recognise it.
    """


class RequestCancelled(CancelError):
    """Raised by :meth:`CancelToken.raise_if_set` and at the chunk boundary of a stream.

    :ivar cause: why the request ends early, e.g. ``"disconnect"``
    """

    def __init__(self, cause: str) -> None:
        super().__init__(f"the request was cancelled: {cause}")
        self.cause = cause


class InvalidEvent(CancelError, ValueError):
    """An event of a stream cannot be sent: the message names the field, and what is allowed."""


class Stalled(CancelError):
    """A subscriber reads too slowly: more events wait for it than may. Ends an ``SSEResponse`` as ``stalled``."""


class NotCancellable(CancelError, RuntimeError):
    """A token was asked for on a route that nobody watches."""


def is_quiet(exc: BaseException) -> bool:
    """Whether ``exc`` says nothing but "the client left", however it is wrapped."""
    if isinstance(exc, BaseExceptionGroup):
        return all(is_quiet(each) for each in exc.exceptions)
    if isinstance(exc, (ClientGone, RequestCancelled, ClientDisconnect)):
        return True
    if isinstance(exc, BrokenResourceError):
        return _raised_by_fastapi(exc)
    # Starlette: "Caught handled exception, but response already started." from the real one.
    return type(exc) is RuntimeError and exc.__cause__ is not None and is_quiet(exc.__cause__)


def _raised_by_fastapi(exc: BaseException) -> bool:
    """FastAPI's SSE closes its stream first and cancels the task that writes to it second."""
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(exc.__traceback__)]
    return [name for name in modules if not name.startswith("anyio.")][-1:] == ["fastapi.routing"]
