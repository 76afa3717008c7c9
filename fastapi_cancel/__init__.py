"""FastAPI work that ends the moment nobody wants its result, and always cleans up."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .exceptions import CancelError, ClientGone, InvalidEvent, NotCancellable, RequestCancelled
from .policy import CancelPolicy, Cause, cancel_policy, never_cancel
from .responses import CancellableFileResponse, CancellableStreamingResponse
from .routing import CancellableRoute
from .shutdown import drain
from .token import CancelToken, Token, get_cancel_token

if TYPE_CHECKING:
    from .events import JSONServerSentEvent, LastEventID, ServerSentEvent, get_last_event_id
    from .sse import SSEResponse, StreamInfo

__version__ = "0.1.0"

__all__ = [
    "CancelError",
    "CancelPolicy",
    "CancelToken",
    "CancellableFileResponse",
    "CancellableRoute",
    "CancellableStreamingResponse",
    "Cause",
    "ClientGone",
    "InvalidEvent",
    "JSONServerSentEvent",
    "LastEventID",
    "NotCancellable",
    "RequestCancelled",
    "SSEResponse",
    "ServerSentEvent",
    "StreamInfo",
    "Token",
    "cancel_policy",
    "drain",
    "get_cancel_token",
    "get_last_event_id",
    "never_cancel",
]

_SSE = {
    "JSONServerSentEvent": "events",
    "LastEventID": "events",
    "SSEResponse": "sse",
    "ServerSentEvent": "events",
    "StreamInfo": "sse",
    "get_last_event_id": "events",
}
"""What needs sse-starlette, an extra: imported when asked for."""


def __getattr__(name: str) -> Any:
    if name not in _SSE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f".{_SSE[name]}", __name__)
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.partition(".")[0] != "sse_starlette":
            raise
        raise ImportError(f"{name} needs sse-starlette: pip install 'fastapi-cancel[sse]'") from exc
    return getattr(module, name)
