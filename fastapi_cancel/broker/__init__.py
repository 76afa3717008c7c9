"""Fan-out and replay: channels of events, in memory or in Redis."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from ..exceptions import Stalled
from ._urls import without_secrets
from .base import Broker, BrokerUnavailable
from .log import Event, Gap, Subscription
from .memory import MemoryBroker

__all__ = ["Broker", "BrokerUnavailable", "Event", "Gap", "MemoryBroker", "Stalled", "Subscription", "connect"]

SETTINGS = {"retain": int, "max_age": float, "prefix": str, "connections": int, "patience": float}

SCHEMES = ("memory://", "redis://", "rediss://", "unix://")
OF_REDIS = {"prefix", "connections", "patience"}


def connect(url: str = "memory://", **settings: Any) -> Broker:
    """The broker at a URL.

    ::

        connect()                                       # in the memory of this process
        connect("redis://localhost:6379/0?retain=500")
        connect("rediss://:secret@redis.example:6380", max_age=60)

    :param url: ``memory://``, ``redis://``, ``rediss://`` (TLS) or ``unix://``. Its query may name settings
        of ours, and any that redis-py takes
    :param settings: the arguments of :class:`~.redis.RedisBroker`; they go before the URL's. In memory, those that
        are about Redis say nothing
    :raises ImportError: redis-py is needed; the message names the extra
    :raises TypeError: a setting is of the wrong type, or unknown; the message names it
    :raises ValueError: the URL or a setting cannot be used; the message names it
    """
    if not isinstance(url, str):
        raise TypeError(f"url must be a str, not {url!r}")
    if not url.startswith(SCHEMES):
        raise ValueError(f"url must begin with {', '.join(SCHEMES)}")
    without_secrets(url)  # which complains if they cannot be told from the rest
    parts = urlsplit(url)
    theirs = []
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name not in SETTINGS:
            theirs.append((name, value))
        elif name not in settings:
            settings[name] = _read(name, value)
    if parts.scheme == "memory":
        if theirs:
            raise ValueError(f"memory:// has no {', '.join(name for name, _ in theirs)}")
        return MemoryBroker(**{name: value for name, value in settings.items() if name not in OF_REDIS})
    from .redis import RedisBroker

    return RedisBroker(parts._replace(query=urlencode(theirs)).geturl(), **settings)


def _read(name: str, value: str) -> object:
    if name == "patience" and value == "none":
        return None
    try:
        return SETTINGS[name](value)
    except ValueError:
        raise ValueError(f"{name} in the URL must be {SETTINGS[name].__name__}, not {value!r}") from None
