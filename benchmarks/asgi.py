"""Calling an application as a server does: a fresh scope, and a task, for each request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, MutableMapping
from typing import Any

from fastapi import FastAPI

from .apps import gate

BODY = b'{"name": "a thing", "price": 12.5, "tags": ["new", "blue", "round"]}'
LONG = 0.01  # seconds


class Call:
    """One request, made ready before the clock starts. Its client stays until the end.

    ``receive`` is what Hypercorn and Daphne give to an application.

    :param handed_on: ``receive`` is a middleware's, which awaits that of the server
    """

    __slots__ = ("receive", "scope")

    def __init__(self, path: str, handed_on: bool = False) -> None:
        path, _, query = path.partition("?")
        body = BODY if path == "/body" else b""
        headers = [
            (b"host", b"localhost:8000"),
            (b"user-agent", b"Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36"),
            (b"accept", b"application/json"),
            (b"accept-encoding", b"gzip, deflate, br"),
            (b"accept-language", b"en-GB,en;q=0.9"),
            (b"connection", b"keep-alive"),
            (b"cookie", b"session=5f3c6f0e7f3b4f6f8a1f"),
            (b"x-request-id", b"0b5f3a52-3d6c-4f6e"),
        ]
        if body:
            headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "server": ("127.0.0.1", 8000),
            "client": ("127.0.0.1", 50000),
            "scheme": "http",
            "method": "POST" if body else "GET",
            "root_path": "",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": headers,
            "state": {},
        }
        messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        messages.put_nowait({"type": "http.request", "body": body, "more_body": False})

        async def hand_on() -> dict[str, Any]:
            return await messages.get()

        self.receive = hand_on if handed_on else messages.get


async def discard(message: Any) -> None:
    """A ``send`` that never waits."""


def cpu_of(loop: asyncio.AbstractEventLoop, app: FastAPI, path: str, calls: int, handed_on: bool = False) -> float:
    """CPU seconds that so many requests take, from their tasks' start until nothing of them is left."""
    return loop.run_until_complete(_cpu_of(app, [Call(path, handed_on) for _ in range(calls)]))


async def _cpu_of(app: FastAPI, calls: list[Call]) -> float:
    loop = asyncio.get_running_loop()
    before = len(asyncio.all_tasks())  # sse-starlette leaves one in each event loop
    begin = time.process_time()
    tasks = [loop.create_task(app(call.scope, call.receive, discard)) for call in calls]
    if (path := calls[0].scope["path"]).startswith("/wait"):
        await _turn_until(lambda: len(gate) == len(calls))
        for _ in range(5):  # nobody may take this wait for a single turn
            await asyncio.sleep(0)
        if path == "/wait-long":
            await asyncio.sleep(LONG)
        for future in gate:
            future.set_result(None)
        gate.clear()
    for task in tasks:
        await task
    await _turn_until(lambda: len(asyncio.all_tasks()) <= before)  # watchers that were told to end
    return time.process_time() - begin


async def _turn_until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


def answer(loop: asyncio.AbstractEventLoop, app: FastAPI, path: str) -> list[MutableMapping[str, Any]]:
    """What the application sends to one request: it must be right before it is measured."""
    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def call() -> None:
        one = Call(path)
        task = asyncio.create_task(app(one.scope, one.receive, send))
        if path.startswith("/wait"):
            await _turn_until(lambda: len(gate) == 1)
            gate.pop().set_result(None)
        await task

    loop.run_until_complete(call())
    assert sent[0]["status"] == 200, sent
    assert not sent[-1].get("more_body"), sent
    return sent
