"""FastAPI work that ends the moment nobody wants its result, and always cleans up."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .broker import Broker, BrokerUnavailable, Gap, connect
    from .events import LastEventID, get_last_event_id
    from .exceptions import CancelError, ClientGone, InvalidEvent, NotCancellable, RequestCancelled
    from .lifespan import lifespan
    from .listening import limit_silence, listening_socket
    from .policy import CancelPolicy, Cause, cancel_policy, never_cancel
    from .remote import Run, Stoppable, header
    from .responses import CancellableFileResponse, CancellableStreamingResponse
    from .resumable import AlreadyRunning, Resumable
    from .routing import CancellableRoute
    from .rsgi import RSGI
    from .shutdown import drain
    from .sse import JSONServerSentEvent, ServerSentEvent, SSEResponse, StreamInfo
    from .token import CancelToken, Token, get_cancel_token

__version__ = "0.1.0"

__all__ = [
    "AlreadyRunning",
    "Broker",
    "BrokerUnavailable",
    "CancelError",
    "CancelPolicy",
    "CancelToken",
    "CancellableFileResponse",
    "CancellableRoute",
    "CancellableStreamingResponse",
    "Cause",
    "ClientGone",
    "Gap",
    "InvalidEvent",
    "JSONServerSentEvent",
    "LastEventID",
    "NotCancellable",
    "RSGI",
    "RequestCancelled",
    "Resumable",
    "Run",
    "SSEResponse",
    "ServerSentEvent",
    "Stoppable",
    "StreamInfo",
    "Token",
    "cancel_policy",
    "connect",
    "drain",
    "get_cancel_token",
    "get_last_event_id",
    "header",
    "lifespan",
    "limit_silence",
    "listening_socket",
    "never_cancel",
]

_WHERE = {
    "AlreadyRunning": "resumable",
    "Broker": "broker",
    "BrokerUnavailable": "broker",
    "CancelError": "exceptions",
    "CancelPolicy": "policy",
    "CancelToken": "token",
    "CancellableFileResponse": "responses",
    "CancellableRoute": "routing",
    "CancellableStreamingResponse": "responses",
    "Cause": "policy",
    "ClientGone": "exceptions",
    "Gap": "broker",
    "InvalidEvent": "exceptions",
    "JSONServerSentEvent": "sse",
    "LastEventID": "events",
    "NotCancellable": "exceptions",
    "RSGI": "rsgi",
    "RequestCancelled": "exceptions",
    "Resumable": "resumable",
    "Run": "remote",
    "SSEResponse": "sse",
    "ServerSentEvent": "sse",
    "Stoppable": "remote",
    "StreamInfo": "sse",
    "Token": "token",
    "cancel_policy": "policy",
    "connect": "broker",
    "drain": "shutdown",
    "get_cancel_token": "token",
    "get_last_event_id": "events",
    "header": "remote",
    "lifespan": "lifespan",
    "limit_silence": "listening",
    "listening_socket": "listening",
    "never_cancel": "policy",
}
"""Imported when asked for: pytest imports the package in every run for its plugin, and sse-starlette is an extra."""


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f".{_WHERE[name]}", __name__)
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.partition(".")[0] != "sse_starlette":
            raise
        raise ImportError(f"{name} needs sse-starlette: pip install 'fastapi-cancel[sse]'") from exc
    globals()[name] = found = getattr(module, name)
    return found
