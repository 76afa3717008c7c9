"""An application's lifespan, around a block."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
from starlette.types import ASGIApp, Message


@asynccontextmanager
async def lifespan(app: ASGIApp) -> AsyncIterator[dict[str, Any]]:
    """Start ``app`` up, and shut it down after the block. An application that knows no lifespan is left alone.

    :return: the state that it keeps for its requests
    :raises RuntimeError: it could not start, or not shut down
    """
    life = _Life()
    async with anyio.create_task_group() as group:
        group.start_soon(life.run, app)
        await life.phase("startup")
        try:
            yield life.state
        finally:
            with anyio.CancelScope(shield=True):
                await life.phase("shutdown")


class _Life:
    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        self._asked: list[str] = []
        self._news = anyio.Event()
        self._answer: Message | None = None
        self._started = self._over = False

    async def phase(self, name: str) -> None:
        """Ask for it, and wait until it is done."""
        self._answer = None
        self._asked.append(f"lifespan.{name}")
        self._tell()
        while self._answer is None and not self._over:
            await self._news.wait()
        self._started = True
        if self._answer is not None and self._answer["type"] == f"lifespan.{name}.failed":
            raise RuntimeError(f"the application's {name} failed:\n{self._answer.get('message', '')}")

    async def run(self, app: ASGIApp) -> None:
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self.state}
        try:
            await app(scope, self._receive, self._send)
        except Exception:
            if self._started and self._answer is None:  # else it knows no lifespan, or has said what is wrong
                raise
        finally:
            self._over = True
            self._tell()

    async def _receive(self) -> Message:
        while not self._asked:
            await self._news.wait()
        return {"type": self._asked.pop(0)}

    async def _send(self, message: Message) -> None:
        self._answer = message
        self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, anyio.Event()
        news.set()
