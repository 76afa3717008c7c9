"""``RSGI``: an ASGI application on Granian's own interface, where Granian itself says that a client has left.

Written to the RSGI specification 1.6 (``docs/spec/RSGI.md`` in emmett-framework/granian) and ASGI 3, whose HTTP part
it gives in version 2.4: ``send`` raises ``OSError`` once the client is gone. Granian is not imported.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from starlette.types import ASGIApp

from ..exceptions import is_quiet
from .backlog import address
from .http import Exchange
from .lifespan import Lifespan
from .types import Scope
from .websocket import Conversation

logger = logging.getLogger("fastapi_cancel")

HTTP_VERSIONS = {"1": "1.0"}  # what RSGI calls otherwise than ASGI does
SECURE = {"http": "ws", "https": "wss"}


class RSGI:
    """Serves an ASGI application through RSGI.

    ::

        application = RSGI(app)  # granian --interface rsgi module:application

    :param app: the ASGI application, with its lifespan and its WebSockets
    :param root_path: the path that a proxy strips before it passes requests on, e.g. ``"/api"``
    :param shutdown_timeout: seconds that cleanups and background tasks may still take when the server has stopped;
        Granian by itself would not wait for what has no connection any more
    :raises TypeError: ``app`` cannot be called
    :raises ValueError: ``root_path`` does not begin with a slash, or ends with one; ``shutdown_timeout`` is negative
    """

    def __init__(self, app: ASGIApp, root_path: str = "", *, shutdown_timeout: float = 30) -> None:
        if not callable(app):
            raise TypeError(f"app must be an ASGI application, not {app!r}")
        if root_path and (not root_path.startswith("/") or root_path.endswith("/")):
            raise ValueError(f'root_path must be empty or like "/api", not {root_path!r}')
        if not shutdown_timeout >= 0:
            raise ValueError(f"shutdown_timeout must be a number of seconds, 0 or more, not {shutdown_timeout!r}")
        self.app = app
        self.root_path = root_path
        self.shutdown_timeout = shutdown_timeout
        self._lifespans: dict[asyncio.AbstractEventLoop, Lifespan] = {}  # workers may be threads, each with a loop

    def __rsgi_init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """The worker starts; ``loop`` does not run yet.

        :raises Exception: what the application's start-up failed with: Granian stops
        """
        loop.run_until_complete(self._lifespan(loop).startup())

    def __rsgi_del__(self, loop: asyncio.AbstractEventLoop) -> None:
        """The worker has stopped; ``loop`` does not run any more."""
        loop.run_until_complete(self._lifespans.pop(loop).shutdown(self.shutdown_timeout))

    def _lifespan(self, loop: asyncio.AbstractEventLoop) -> Lifespan:
        if (lifespan := self._lifespans.get(loop)) is None:
            lifespan = self._lifespans[loop] = Lifespan(self.app)
        return lifespan

    async def __rsgi__(self, scope: Scope, protocol: Any) -> None:
        lifespan = self._lifespan(asyncio.get_running_loop())
        asgi = self._scope(scope, lifespan.state)
        connection: Exchange | Conversation
        if scope.proto == "http":
            asgi["type"] = "http"
            asgi["method"] = scope.method
            connection = Exchange(scope, protocol)
        else:
            asgi["type"] = "websocket"
            asgi["scheme"] = SECURE[scope.scheme]
            offered = scope.headers.get("sec-websocket-protocol") or ""
            asgi["subprotocols"] = [name.strip() for name in offered.split(",") if name.strip()]
            connection = Conversation(protocol)
        task = asyncio.current_task()
        assert task is not None
        lifespan.running.add(task)
        try:
            await self.app(asgi, connection.receive, connection.send)
        except Exception as exc:
            if not is_quiet(exc):
                logger.error("%s %s failed", asgi.get("method", "WebSocket"), scope.path, exc_info=exc)
        else:
            if (missing := connection.missing()) is not None:
                logger.error("%s %s returned without %s", asgi.get("method", "WebSocket"), scope.path, missing)
        finally:
            lifespan.running.discard(task)
            connection.close()

    def _scope(self, scope: Scope, state: dict[str, Any]) -> dict[str, Any]:
        """What HTTP and WebSocket have in common. There is no ``raw_path``: RSGI gives the path decoded."""
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in scope.headers.items()]
        if (authority := scope.authority) is not None:  # HTTP/2
            headers = [(b"host", authority.encode("latin-1")), *_without_crumbs(headers)]
        return {
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": HTTP_VERSIONS.get(scope.http_version, scope.http_version),
            "scheme": scope.scheme,
            "path": self.root_path + scope.path,
            "query_string": scope.query_string.encode("latin-1"),
            "root_path": self.root_path,
            "headers": headers,
            "client": address(scope.client),
            "server": address(scope.server),
            "state": state.copy(),
            "extensions": {},
        }


def _without_crumbs(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Without ``Host``, and with one ``Cookie``: HTTP/2 clients may send several (RFC 9113, section 8.2.3)."""
    crumbs = [value for name, value in headers if name == b"cookie"]
    headers = [header for header in headers if header[0] not in (b"host", b"cookie")]
    return [*headers, (b"cookie", b"; ".join(crumbs))] if crumbs else headers
