"""ASGI's lifespan, in one task from start-up to shutdown."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from starlette.types import ASGIApp, Message

logger = logging.getLogger("fastapi_cancel")


class Lifespan:
    """The lifespan of an application in one event loop.

    :ivar state: what the application left there for its requests
    :ivar running: the tasks of these requests
    """

    _known = _last = False
    _answer: Message | None = None

    def __init__(self, app: ASGIApp) -> None:
        self.state: dict[str, Any] = {}
        self.running: set[asyncio.Task[Any]] = set()
        self._app = app
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._answered = asyncio.Event()
        self._task: asyncio.Task[None]

    async def startup(self) -> None:
        """Start the application up; one that knows no lifespan is left alone.

        :raises Exception: what the application's start-up failed with
        :raises RuntimeError: it failed, and said no more than that
        """
        self._task = asyncio.create_task(self._run())
        await self._ask("lifespan.startup")
        if self._answer is None:
            logger.info("the application has no lifespan", exc_info=_error(self._task))
        elif self._last:
            await asyncio.wait([self._task])
            raise _error(self._task) or RuntimeError(self._answer.get("message") or "the start-up failed")
        else:
            self._known = True

    async def shutdown(self, timeout: float) -> None:
        """Shut the application down. What goes wrong there is logged: there is nobody left to tell.

        :param timeout: seconds that requests may take until then
        """
        if self.running:
            await asyncio.wait(self.running, timeout=timeout)
        if self.running:
            logger.warning("%s requests have not ended within %s s", len(self.running), timeout)
        if not self._known:
            return
        if not self._task.done():
            await self._ask("lifespan.shutdown")
            await asyncio.wait([self._task])
        error = _error(self._task)
        if error is not None or (self._answer is not None and self._answer["type"] == "lifespan.shutdown.failed"):
            logger.error("the shutdown failed: %s", (self._answer or {}).get("message", ""), exc_info=error)

    async def _ask(self, message: str) -> None:
        """Wait until the application has answered, or has ended."""
        self._answer = None
        self._answered.clear()
        self._inbox.put_nowait({"type": message})
        await self._answered.wait()

    async def _run(self) -> None:
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self.state}
        try:
            await self._app(scope, self._receive, self._send)
        finally:
            self._answered.set()

    async def _receive(self) -> Message:
        if self._last:  # it would wait for ever
            self._task.cancel()
        return await self._inbox.get()

    async def _send(self, message: Message) -> None:
        self._answer = message
        self._last = message["type"] != "lifespan.startup.complete"
        self._answered.set()


def _error(task: asyncio.Task[None]) -> BaseException | None:
    return None if task.cancelled() else task.exception()
