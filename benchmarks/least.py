"""The least code that keeps the core of the contract, to see how much room a budget leaves for the rest.

On asyncio and behind a server whose ``receive`` only waits: one reader that takes nothing from the application's body,
watching from the first wait on, one cancellation, after which awaits work, silence, a 499 where nothing was sent, and
background tasks (C1 to C5, C7, C12, C13). Nothing else: no other cause than a client that leaves, no policy, no grace,
no deadline for a cleanup, no shields, no threads, no token, no streams, no uploads in pieces, no
``BaseHTTPMiddleware``, no other server and no other backend. Not for use; the fastest of five sketches.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from types import coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from fastapi_cancel.protect import SPEC

KEY = "benchmarks.least"


class Least:
    """One request."""

    __slots__ = (
        *("scope", "server_receive", "server_send", "task", "reader", "future", "ahead", "response"),
        *("asked", "ended", "completed", "gone", "started", "cancelled"),
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send, task: asyncio.Task[Any]) -> None:
        self.scope, self.server_receive, self.server_send, self.task = scope, receive, send, task
        self.reader: Any = None
        self.future: Any = None
        self.ahead: Message | None = None
        self.response: Response | None = None
        self.asked = self.ended = self.completed = self.gone = self.started = self.cancelled = False

    async def receive(self) -> Message:
        self.asked = True
        if self.ahead is not None:
            message, self.ahead = self.ahead, None
            return message
        return {"type": "http.disconnect"} if self.ended else await self.server_receive()

    async def send(self, message: Message) -> None:
        if self.gone:
            raise OSError
        kind = message["type"]
        last = False
        if kind == "http.response.start":
            self.started = True
        elif kind == "http.response.body" and not message.get("more_body", False):
            last = True
            if self.reader is not None:
                self.stop()
        try:
            await self.server_send(message)
        except OSError:
            self.gone = True
            raise
        if last:
            self.completed = True

    def watch(self) -> None:
        if not self.asked:
            for name, _ in self.scope["headers"]:
                if name == b"expect":
                    return
        if not self.completed:
            self.reader = self.server_receive()
            self.step()

    def step(self, _: object = None) -> None:
        while self.reader is not None:
            try:
                self.future = future = self.reader.send(None)
            except StopIteration as came:
                message = came.value
                if message["type"] == "http.disconnect":
                    self.reader, self.ended = None, True
                    if not self.completed:
                        self.gone = self.cancelled = True
                        self.task.cancel()
                    return
                if message.get("body"):
                    self.ahead = message
                self.reader = None if message.get("more_body", False) else self.server_receive()
            else:
                future._asyncio_future_blocking = False
                future.add_done_callback(self.step)
                return

    def stop(self) -> None:
        self.future.remove_done_callback(self.step)
        self.reader.close()
        self.reader = None

    @coroutine
    def drive(self, work: Coroutine[Any, Any, None]) -> Generator[Any, Any, None]:
        step: Any
        try:
            for waits_for in work.__await__():
                if self.reader is None and waits_for is not None:
                    self.watch()
                yield waits_for
            return
        except GeneratorExit:
            work.close()
            raise
        except BaseException as exc:
            step, value = work.throw, exc
        while True:
            try:
                waits_for = step(value)
            except StopIteration:
                return
            try:
                value = yield waits_for
            except BaseException as exc:
                step, value = work.throw, exc
            else:
                step = work.send


class LeastRoute(APIRoute):
    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if KEY in scope:
            await super().handle(scope, receive, send)
            return
        task = asyncio.current_task()
        assert task is not None
        least = Least(scope, receive, send, task)
        asgi = scope["asgi"]
        scope["asgi"], scope[KEY] = asgi | SPEC, least
        try:
            await least.drive(super().handle(scope, least.receive, least.send))
        except (asyncio.CancelledError, OSError):
            if not least.gone:
                raise
            if least.cancelled:
                task.uncancel()
        finally:
            if least.reader is not None:
                least.stop()
            del scope[KEY]
            scope["asgi"] = asgi
        if least.gone:
            if not least.started:
                await PlainTextResponse(status_code=499)(scope, receive, send)
            if least.response is not None and least.response.background is not None:
                await least.response.background()

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def noted(request: Request) -> Response:
            response = await handler(request)
            if (least := request.scope.get(KEY)) is not None:
                least.response = response
            return response

        return noted
