"""A client that leaves early: the disconnect test that ``TestClient`` and ``httpx.ASGITransport`` cannot do.

It was asked for in Kludex/starlette#1247, RedRoserade/fastapi-disconnect-example#1 and
modelcontextprotocol/python-sdk#857.
"""

from __future__ import annotations

import json as jsons
import logging
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from urllib.parse import quote, unquote, urlencode

from starlette.types import ASGIApp

from .habits import Habits, habits_of
from .lifespan import lifespan
from .moments import Moment
from .pools import checked
from .visit import NeverCame, Patience, Visit
from .visiting import visiting

Headers = Mapping[str, str]
Content = bytes | str | Iterable[bytes] | AsyncIterable[bytes]


class LeavingClient:
    """Asks an ASGI application in process, and leaves when it is told to::

        async def test_the_export_stops_when_its_client_leaves():
            visit = await LeavingClient(app).get("/export", leave=after_chunks(3))
            visit.assert_clean()

    With ``async with`` the application's lifespan surrounds the visits, as a server's life does. Works on asyncio and
    on Trio.

    :param app: any ASGI application
    :param server: whose habits to imitate: a name of :data:`.habits.SERVERS`, or :class:`Habits`
    :param patience: how long to wait for the application; the default gives work that is not told that its client has
        left 0.1 seconds, and a cleanup 5
    :param pools: what is borrowed from these must be back after a visit: pools of redis-py, SQLAlchemy, asyncpg or
        psycopg, or functions that return how many are in use
    :param headers: of every request
    :param log_level: from this on, a line in the log is a fault
    :raises ValueError: there is no such server
    :raises TypeError: a pool is nothing that can be counted
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        server: str | Habits = "uvicorn",
        patience: Patience | None = None,
        pools: Sequence[Any] = (),
        headers: Headers | None = None,
        log_level: int = logging.WARNING,
    ) -> None:
        if not callable(app):
            raise TypeError(f"app: an ASGI application, not {app!r}")
        self.app = app
        self.habits = habits_of(server)
        self.patience = patience or Patience()
        self.pools = checked(pools)
        self.headers = dict(headers or {})
        self.log_level = log_level
        self._state: dict[str, Any] | None = None
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> LeavingClient:
        self._state = await self._stack.enter_async_context(lifespan(self.app))
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self._stack.__aexit__(*exc)
        self._state = None

    @asynccontextmanager
    async def visit(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | Sequence[tuple[str, Any]] | None = None,
        headers: Headers | None = None,
        content: Content | None = None,
        json: Any = None,
        leave: Moment | None = None,
        stall: Moment | None = None,
        resume: Moment | None = None,
    ) -> AsyncIterator[Visit]:
        """A request that runs beside the block, for a test that does something meanwhile::

            async with client.visit("GET", "/feed") as visit:
                await visit.until(after_event("hello"))
                visit.leave()
            visit.assert_clean()

        The block's end waits until the request is over.

        :param path: may have a query
        :param params: a query, to be encoded
        :param content: of the request's body: whole, in pieces, or as it comes
        :param json: likewise, encoded
        :param leave: when the client leaves
        :param stall: when it stops reading
        :param resume: when, after that, it reads on
        :raises ValueError: the path is relative, or both ``content`` and ``json`` are given
        :raises TypeError: ``content`` is nothing that can be sent
        """
        if not path.startswith("/"):
            raise ValueError(f"path: begins with a slash, unlike {path!r}")
        if json is not None and content is not None:
            raise ValueError("content, json: one of them")
        sent = {"host": "testserver"}
        for name, value in [*self.headers.items(), *(headers or {}).items()]:
            sent[name.lower()] = value
        if json is not None:
            content = jsons.dumps(json)
            sent.setdefault("content-type", "application/json")
        upload = content if isinstance(content, AsyncIterable) else None
        body = [] if isinstance(content, AsyncIterable) else _pieces(content)
        if upload is not None:
            sent.setdefault("transfer-encoding", "chunked")
        elif content is not None:
            sent.setdefault("content-length", str(sum(map(len, body))))
        visit = Visit(self._scope(method, path, params, sent), body, self.habits)
        visit.upload_complete = upload is None
        async with visiting(
            self.app,
            visit,
            upload=upload,
            leave=leave,
            stall=stall,
            resume=resume,
            patience=self.patience,
            watched=self.pools,
            log_level=self.log_level,
        ):
            yield visit

    async def request(self, method: str, path: str, **options: Any) -> Visit:
        """Make a request, leave at the moment given, and wait until all is over.

        :param options: as :meth:`visit` takes them
        :raises NeverCame: the visit was over before that moment
        """
        async with self.visit(method, path, **options) as visit:
            pass
        if (leave := options.get("leave")) is not None and visit.left is None:
            raise NeverCame("\n".join([f"{visit!r} was over before {leave!r}", *map(str, visit.faults)]))
        return visit

    async def get(self, path: str, **options: Any) -> Visit:
        """A GET request; see :meth:`request`."""
        return await self.request("GET", path, **options)

    async def post(self, path: str, **options: Any) -> Visit:
        """A POST request; see :meth:`request`."""
        return await self.request("POST", path, **options)

    def _scope(self, method: str, path: str, params: Any, headers: Headers) -> dict[str, Any]:
        path, _, query = path.partition("?")
        query = "&".join(filter(None, [query, urlencode(params or {}, doseq=True)]))
        asgi = {"version": "3.0"}
        if self.habits.spec_version is not None:
            asgi["spec_version"] = self.habits.spec_version
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": asgi,
            "http_version": "1.1",
            "method": method.upper(),
            "scheme": "http",
            "path": unquote(path),
            "raw_path": quote(path, safe="/%!$&'()*+,;=:@~").encode(),
            "query_string": quote(query, safe="/?%!$&'()*+,;=:@~").encode(),
            "root_path": "",
            "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()],
            "client": ("127.0.0.1", 50000),
            "server": ("testserver", 80),
        }
        if self.habits.extensions:
            scope["extensions"] = {name: {} for name in self.habits.extensions}
        if self._state is not None:
            scope["state"] = dict(self._state)
        return scope


def _pieces(content: Any) -> list[bytes]:
    if content is None:
        return []
    if isinstance(content, str):
        return [content.encode()]
    pieces = [content] if isinstance(content, bytes) else list(content)
    if wrong := [piece for piece in pieces if not isinstance(piece, bytes)]:
        raise TypeError(f"content: bytes, text, or an iterable of bytes, not of {wrong[0]!r}")
    return pieces
