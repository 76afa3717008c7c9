"""What stands before the application in the server's process."""

from __future__ import annotations

from functools import reduce
from importlib import import_module

from starlette.types import ASGIApp, Receive, Scope, Send

APP = "FASTAPI_CANCEL_APP"
"""The variable of the environment that says which application: ``module:attribute``."""
TOKEN = "FASTAPI_CANCEL_TOKEN"
"""The one with what to answer on ``READY``, so that no other server is taken for this one."""
READY = "/.fastapi-cancel/ready"


class Probe:
    """Answers on ``READY`` itself, so that being asked costs the application nothing; passes on all else.

    :param app: the application
    :param token: the answer
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].endswith(READY):  # a root path may come before it
            headers = [(b"content-length", b"%d" % len(self._token))]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": self._token})
        else:
            await self.app(scope, receive, send)


def load(target: str) -> ASGIApp:
    """Import ``module:attribute``; the attribute may have dots."""
    module, _, attribute = target.partition(":")
    app: ASGIApp = reduce(getattr, attribute.split("."), import_module(module))  # type: ignore[assignment]
    return app
