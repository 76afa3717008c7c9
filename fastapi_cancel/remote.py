"""Stop anywhere: requests run under a key, and ``broker.stop(key)`` ends them, whatever process they run in.

::

    broker = connect("redis://localhost")
    router = APIRouter(route_class=CancellableRoute.under(Stoppable(broker, "chats/{chat}")))

    @router.post("/chats/{chat}/answers")
    async def answer(chat: str, question: Question) -> Answer: ...

    @app.post("/chats/{chat}/stop")
    async def stop(chat: str) -> int:
        return await broker.stop(f"chats/{chat}", reason="the user has stopped it")
"""

from __future__ import annotations

import re
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple, TypeAlias

from fastapi import Request

from .broker import Broker
from .exceptions import NotCancellable
from .protect import KEY, channel_of

Name: TypeAlias = str | Callable[[Request], str | None]


class Run(NamedTuple):
    """One run of a key; ``broker.stop(run.key, run=run.id)`` ends it and no other."""

    key: str
    id: str


class Stoppable:
    """Has requests run under a key: as a dependency, or for a whole router with ``CancellableRoute.under``.

    It costs two short exchanges with Redis a request. While Redis is away, requests begin after a second at the
    latest, and nobody can stop them until it is back.

    :param broker: whose ``stop`` ends them
    :param key: with the parameters of the path in it, as in ``"chats/{chat}"``; or a function of the request, such
        as :func:`header`. Where it returns ``None``, the request runs under no key
    :param run: the id of the run, likewise, so that a client which chooses it can stop that run alone; by default
        one is made
    :raises TypeError: an argument is of the wrong type; the message names it
    """

    def __init__(self, broker: Broker, key: Name, run: Name | None = None) -> None:
        if not isinstance(broker, Broker):
            raise TypeError(f"broker must be a Broker, not {broker!r}")
        self._broker = broker
        self._key = _function("key", key)
        self._run = _function("run", run) if run is not None else _new

    async def __call__(self, request: Request) -> AsyncIterator[Run | None]:
        """The dependency. Its value is the :class:`Run`, if there is one.

        :raises NotCancellable: the route is no ``CancellableRoute``
        """
        if KEY not in request.scope:
            raise NotCancellable(f"{request.scope['path']} cannot be stopped: its router needs a CancellableRoute")
        async with self.running(request) as run:
            yield run

    @asynccontextmanager
    async def running(self, request: Request) -> AsyncIterator[Run | None]:
        """While it is open, the request can be stopped."""
        channel = channel_of(request.scope)
        key = self._key(request)
        if channel is None or not key:
            yield None
            return
        run = Run(key, self._run(request) or _new(request))
        async with self._broker.runs.running(run.key, run.id, channel.ladder.stop):
            yield run


def header(name: str) -> Callable[[Request], str | None]:
    """The value of a header, as a key or a run: ``Stoppable(broker, key=header("X-Request-Key"))``.

    :raises TypeError: ``name`` is no str
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, not {name!r}")
    return lambda request: request.headers.get(name)


def _new(request: Request) -> str:
    return secrets.token_hex(8)


def _function(argument: str, name: Name) -> Callable[[Request], str | None]:
    if callable(name):
        return name
    if not isinstance(name, str) or not name:
        raise TypeError(f"{argument} must be a str that is not empty, or a function of the request, not {name!r}")
    parameters = re.findall(r"{(\w+)}", name)

    def fill_in(request: Request) -> str:
        values = request.path_params
        if unknown := [each for each in parameters if each not in values]:
            raise ValueError(f"{argument} {name!r}: the path has no {', '.join(unknown)}; it has {', '.join(values)}")
        return re.sub(r"{(\w+)}", lambda match: str(values[match[1]]), name)

    return fill_in
