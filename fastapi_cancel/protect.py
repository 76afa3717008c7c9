"""One request, from its channel to its last word: builds what it needs, runs it, ends it quietly."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from starlette._exception_handler import wrap_app_handling_exceptions
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from ._light import LightChannel
from ._native import NativeLadder, free_task
from ._parting import parting
from ._scoped import GroupLadder, ScopedLadder
from .channel import Channel
from .exceptions import is_quiet
from .ladder import Ladder, ending
from .policy import CancelPolicy, Cause

KEY = "fastapi_cancel"
"""Where the scope keeps its :class:`Channel`; ``None`` there: the endpoint opted out."""

SPEC = {"spec_version": "2.4"}
"""What the application is told of the server: that its ``send`` raises."""

STATUS: dict[Cause, int] = {"disconnect": 499, "stalled": 499, "timeout": 504, "shutdown": 503}
"""What a request that ended before its response began is answered with. Nobody but middleware and
access logs will see a 499 (nginx's number for it)."""


def channel_of(scope: Scope) -> Channel | None:
    """The channel of a request that is protected already."""
    return scope.get(KEY)


async def protect(
    app: Callable[[Scope, Receive, Send], Coroutine[Any, Any, None]],
    scope: Scope,
    receive: Receive,
    send: Send,
    policy: CancelPolicy,
    response: Response | None = None,
) -> None:
    """Run ``app`` so that it ends when its client does.

    To ``app`` this is an ASGI 2.4 server, whatever the real one says of itself. A request that is
    protected already goes on as it is, under the new policy.
    """
    if (around := scope.get(KEY)) is not None:
        before = around.ladder.policy
        around.ladder.adopt(policy)
        await app(scope, receive, send)
        if around.scope is not scope:  # a request within the request
            around.ladder.adopt(before)
        return
    if (host := free_task()) is not None and policy.timeout is None:
        channel: Channel = LightChannel(scope, receive, send, policy, response, host)
    else:
        channel = Channel(scope, receive, send, policy, response)
        channel.take(ladder_for(policy, scope))
    asgi = scope.get("asgi")  # Starlette's TestClient gives none
    scope["asgi"] = (asgi or {}) | SPEC
    scope[KEY] = channel
    try:
        await channel.drive(app(scope, channel.receive, channel.send))
    except (Exception, BaseExceptionGroup) as exc:
        if (channel.cause is None and not channel.gone) or not is_quiet(exc):
            raise
    finally:
        channel.close()
        del scope[KEY]
        if asgi is None:
            del scope["asgi"]
        else:
            scope["asgi"] = asgi
    if (ladder := channel.made) is None:
        return
    cause: Cause | None = ladder.cause or ("disconnect" if channel.gone else None)
    if cause is not None and (channel.interrupted or not channel.completed):
        ending[ladder] = threading.get_ident()
        try:
            await _conclude(channel, cause, receive, send)
        finally:
            del ending[ladder]


def ladder_for(policy: CancelPolicy, scope: Scope) -> Ladder:
    """The ladder that fits the calling task."""
    if (task := free_task()) is not None:
        return NativeLadder(policy, scope, task)
    try:
        task = asyncio.current_task()
    except RuntimeError:  # another backend than asyncio
        task = None
    return ScopedLadder(policy, scope, task) if task is not None else GroupLadder(policy, scope)


async def _conclude(channel: Channel, cause: Cause, receive: Receive, send: Send) -> None:
    background = channel.response.background if channel.response is not None else None
    try:
        if not channel.started:
            await _answer(cause, channel, receive, send)
        elif cause == "shutdown" and not channel.closing and not channel.gone:
            # An event stream, which may end anywhere.
            with parting(), suppress(OSError):
                await send({"type": "http.response.body"})
    finally:
        if background is not None and channel.ladder.policy.background:
            await background()


async def _answer(cause: Cause, channel: Channel, receive: Receive, send: Send) -> None:
    ladder, scope = channel.ladder, channel.scope
    status = ladder.policy.stop_status if cause == "stop" else STATUS[cause]
    if status == 499:
        with parting(), suppress(OSError):
            # Hypercorn: the last `send` on an HTTP/2 connection that is gone never returns.
            await PlainTextResponse(status_code=status)(scope, receive, send)
        return

    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        raise HTTPException(status, ladder.reason or None)

    # By the application's own exception handlers, and before any background task.
    await wrap_app_handling_exceptions(fail, Request(scope, receive, send))(scope, receive, send)
