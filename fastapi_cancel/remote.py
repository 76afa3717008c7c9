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
from collections.abc import AsyncIterator, Callable, Container
from contextlib import asynccontextmanager
from typing import NamedTuple, TypeAlias

from fastapi import Request

from .broker import Broker
from .exceptions import NotCancellable, RequestCancelled
from .ladder import RUN
from .protect import KEY, channel_of

Name: TypeAlias = str | Callable[[Request], str | None]
_PARAMETER = re.compile(r"{(\w+)}")


class Run(NamedTuple):
    """One run of a key; ``broker.stop(run.key, run=run.id)`` ends it and no other."""

    key: str
    id: str


class Stoppable:
    """Has requests run under a key: as a dependency, or for a whole router with ``CancellableRoute.under``.

    It costs two short exchanges with Redis a request. While Redis is away, requests begin after a second at the
    latest, and nobody can stop them until it is back. One that is stopped before it has begun does not begin.

    :param broker: whose ``stop`` ends them
    :param key: with the parameters of the path in it, as in ``"chats/{chat}"``; or a function of the request, such
        as :func:`header`. Where it returns ``None``, the request runs under no key
    :param run: the id of the run, likewise, so that a client which chooses it can stop that run alone. Where it
        returns ``None``, and by default, one is made
    :raises TypeError: an argument is of the wrong type; the message names it
    """

    def __init__(self, broker: Broker, key: Name, run: Name | None = None) -> None:
        if not isinstance(broker, Broker):
            raise TypeError(f"broker must be a Broker, not {broker!r}")
        self._broker = broker
        self._templates = {name: value for name, value in {"key": key, "run": run}.items() if isinstance(value, str)}
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
        ladder = channel.ladder
        async with self._broker.runs.running(run.key, run.id, ladder.stop):
            if ladder.cause is not None and ladder.state != RUN:
                ladder.settle()
                raise RequestCancelled(ladder.cause)
            yield run

    def check(self, path: str, parameters: Container[str]) -> None:
        """See whether a route with these parameters in its path can be under it.

        :raises ValueError: the key, or the run, names another; the message says which
        """
        for argument, template in self._templates.items():
            if unknown := [name for name in _PARAMETER.findall(template) if name not in parameters]:
                raise ValueError(
                    f"{argument} {template!r}: the path {path!r} has no {', '.join(unknown)}. For parameters of an"
                    " outer prefix or a mount, give a function of the request"
                )


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
    return lambda request: _PARAMETER.sub(lambda match: _parameter(request, argument, match[1]), name)


def _parameter(request: Request, argument: str, name: str) -> str:
    try:
        return str(request.path_params[name])
    except KeyError:
        raise ValueError(f"{argument}: the path of {request.scope['path']} has no parameter {name}") from None
