"""URLs of brokers, as far as they may be told."""

from __future__ import annotations

from contextlib import suppress
from urllib.parse import urlsplit


def without_secrets(url: str) -> str:
    """``url`` as it may be logged: without user, password and options.

    :raises TypeError: it is no str
    :raises ValueError: it cannot be told where the password ends
    """
    if not isinstance(url, str):
        raise TypeError("url must be a str")
    with suppress(ValueError):
        parts = urlsplit(url)
        if "://" in url and "@" not in parts.path + parts.query + parts.fragment and parts.port != 0:
            return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    raise ValueError("url cannot be read: user, password and options in it must be percent-encoded") from None
