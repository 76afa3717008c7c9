"""An application's lifespan, around a block."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
from starlette.types import ASGIApp, Message

from .backends import current_backend

SHUTDOWN = 20.0
"""Seconds that it may take, whatever else wants to end."""


@asynccontextmanager
async def lifespan(app: ASGIApp) -> AsyncIterator[dict[str, Any]]:
    """Start ``app`` up, and shut it down after the block. An application that knows no lifespan is left alone.

    :return: the state that it keeps for its requests
    :raises RuntimeError: it could not start, or not shut down, or has ended in between
    """
    life = _Life()
    async with current_backend().running(life.run(app)) as running:
        await life.phase("startup")
        try:
            yield life.state
        finally:
            await life.shut_down()
    if isinstance(running.error, Exception) and "lifespan.startup.complete" in life.answers:
        raise RuntimeError("the application's lifespan failed") from running.error


class _Life:
    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        self.answers: dict[str, Message] = {}
        self._asked: list[str] = []
        self._news = anyio.Event()
        self._over = False

    async def phase(self, name: str) -> None:
        """Ask for it, and wait until it is done."""
        self._asked.append(f"lifespan.{name}")
        self._tell()
        complete, failed = f"lifespan.{name}.complete", f"lifespan.{name}.failed"
        while not self._over and not {complete, failed} & set(self.answers):
            await self._news.wait()
        if failed in self.answers:
            raise RuntimeError(f"the application's {name} failed:\n{self.answers[failed].get('message', '')}")

    async def shut_down(self) -> None:
        """Whatever else wants to end."""
        with anyio.move_on_after(SHUTDOWN, shield=True) as limit:
            await self.phase("shutdown")
        if limit.cancelled_caught:
            raise RuntimeError(f"the application's shutdown was not over after {SHUTDOWN:g} s")

    async def run(self, app: ASGIApp) -> None:
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self.state}
        try:
            await app(scope, self._receive, self._send)
        finally:
            self._over = True
            self._tell()

    async def _receive(self) -> Message:
        while not self._asked:
            await self._news.wait()
        return {"type": self._asked.pop(0)}

    async def _send(self, message: Message) -> None:
        self.answers[message["type"]] = message
        self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, anyio.Event()
        news.set()
