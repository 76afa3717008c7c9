"""FastAPI work that ends the moment nobody wants its result, and always cleans up."""

from .exceptions import CancelError, ClientGone, NotCancellable, RequestCancelled
from .policy import CancelPolicy, Cause, cancel_policy, never_cancel
from .responses import CancellableFileResponse, CancellableStreamingResponse
from .routing import CancellableRoute
from .token import CancelToken, Token, get_cancel_token

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
    "NotCancellable",
    "RequestCancelled",
    "Token",
    "cancel_policy",
    "get_cancel_token",
    "never_cancel",
]
