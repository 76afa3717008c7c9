"""What stands before the application in the server's process."""

from __future__ import annotations

import json
from functools import reduce
from importlib import import_module

from starlette.types import ASGIApp, Receive, Scope, Send

from .recorder import Recorder

APP = "FASTAPI_CANCEL_APP"
"""The variable of the environment that says which application: ``module:attribute``."""
TOKEN = "FASTAPI_CANCEL_TOKEN"
"""The one with what to answer on ``READY``, so that no other server is taken for this one."""
VISITS = "FASTAPI_CANCEL_VISITS"
"""And the one with the file in which to record the requests."""
READY = "/.fastapi-cancel/ready"
RUNNING = "/.fastapi-cancel/running"


class Probe:
    """Answers on ``READY`` and ``RUNNING`` itself, so that being asked costs the application nothing.

    :param app: the application, recorded
    :param token: the answer on ``READY``
    """

    def __init__(self, app: Recorder, token: str) -> None:
        self.app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["type"] == "http" else ""
        if path.endswith(READY):  # a root path may come before it
            await _answer(self._token, send)
        elif path.endswith(RUNNING):
            await _answer(json.dumps(self.app.running()).encode(), send)
        else:
            await self.app(scope, receive, send)


async def _answer(body: bytes, send: Send) -> None:
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def load(target: str) -> ASGIApp:
    """Import ``module:attribute``; the attribute may have dots."""
    module, _, attribute = target.partition(":")
    app: ASGIApp = reduce(getattr, attribute.split("."), import_module(module))  # type: ignore[assignment]
    return app
