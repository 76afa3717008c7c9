"""``CancellableRoute``: every handler of a router, unchanged, ends when its client does."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ._closing import close, in_threads
from ._endpoints import closing, current
from .policy import CancelPolicy, policy_of
from .protect import KEY, protect
from .responses import Cancellable
from .shutdown import draining, is_event_stream

if TYPE_CHECKING:
    from .remote import Stoppable


class CancellableRoute(APIRoute):
    """An ``APIRoute`` that cannot be told from one while the client stays.

    ::

        router = APIRouter(route_class=CancellableRoute)
        router = APIRouter(route_class=CancellableRoute.with_policy(CancelPolicy(grace=2)))
        app.router.route_class = CancellableRoute
    """

    policy: ClassVar[CancelPolicy] = CancelPolicy()
    stoppable: ClassVar[Stoppable | None] = None

    @classmethod
    def with_policy(cls, policy: CancelPolicy) -> type[CancellableRoute]:
        """This route class under another policy.

        :raises TypeError: ``policy`` is no :class:`CancelPolicy`
        """
        if not isinstance(policy, CancelPolicy):
            raise TypeError(f"policy must be a CancelPolicy, not {policy!r}")
        return type(cls.__name__, (cls,), {"policy": policy, "__module__": cls.__module__})

    @classmethod
    def under(cls, stoppable: Stoppable) -> type[CancellableRoute]:
        """This route class, whose requests can be stopped from anywhere; see :mod:`~fastapi_cancel.remote`.

        :raises TypeError: ``stoppable`` is no :class:`~fastapi_cancel.remote.Stoppable`
        :raises ValueError: when a route is made whose path has not the parameters that the key names
        """
        from .remote import Stoppable  # the core does not need a broker

        if not isinstance(stoppable, Stoppable):
            raise TypeError(f"stoppable must be a Stoppable, not {stoppable!r}")
        return type(cls.__name__, (cls,), {"stoppable": stoppable, "__module__": cls.__module__})

    def __init__(self, path: str, endpoint: Callable[..., Any], **kwargs: Any) -> None:
        self._declared = endpoint
        wrapped = closing(endpoint)
        self._yields = wrapped is not endpoint
        super().__init__(path, wrapped, **kwargs)
        if self.stoppable is not None:
            self.stoppable.check(path, self.param_convertors)

    @cached_property
    def _in_force(self) -> CancelPolicy | None:
        # At the first request, not before: decorators may come in any order.
        return policy_of(self._declared, self.policy)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (policy := self._in_force) is None:
            scope[KEY] = None
            await super().handle(scope, receive, send)
        else:
            app = super().handle if self.stoppable is None else self._run
            await protect(app, scope, receive, send, policy)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self.stoppable is not None
        async with self.stoppable.running(Request(scope)):
            await super().handle(scope, receive, send)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        if self._yields:
            handler = _as_current(handler)

        async def cancellable_handler(request: Request) -> Response:
            response = await handler(request)
            scope = request.scope
            if (channel := scope.get(KEY)) is None:  # opted out
                return response
            if channel.scope is scope:  # else it is a request within the request
                channel.response = response
            # To close before the dependencies do, in the task of the request, even if never called.
            if isinstance(response, Cancellable):
                response._ladder = channel.ladder
                scope["fastapi_inner_astack"].push_async_exit(response.close_on_exit)  # lighter than a callback
            elif isinstance(response, StreamingResponse):
                in_threads(response)
                scope["fastapi_inner_astack"].push_async_callback(close, response.body_iterator)
                if is_event_stream(response):
                    scope["fastapi_inner_astack"].enter_context(draining(channel.ladder))
            return response

        return cancellable_handler


def _as_current(
    handler: Callable[[Request], Coroutine[Any, Any, Response]],
) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    """Let the endpoint's wrapper find the request, to have its generator closed."""

    async def handle(request: Request) -> Response:
        if (channel := request.scope.get(KEY)) is None:
            return await handler(request)
        reset = current.set((request.scope, channel.ladder))
        try:
            return await handler(request)
        finally:
            current.reset(reset)

    return handle
