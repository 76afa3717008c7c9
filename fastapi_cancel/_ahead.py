"""Pulling an iterator without waiting for it: is the next item there already?"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Generator
from types import coroutine
from typing import Any, Protocol, cast


class _Steps(Protocol):
    def send(self, value: Any, /) -> Any: ...
    def throw(self, exc: BaseException, /) -> Any: ...
    def close(self) -> Any: ...


class Ahead:
    """An asynchronous iterator, stepped by hand.

    ``poll`` begins to pull the next item. If that is not there yet, ``wait`` must follow at once: a task
    may not wait for anything else in between (Trio).

    :ivar item: the item that was pulled
    :ivar ended: there are no more items
    """

    item: Any = None
    ended = False

    def __init__(self, iterable: AsyncIterable[Any]) -> None:
        self._iterator = iterable.__aiter__()
        self._fault: Exception | None = None
        self._steps: _Steps
        self._waiting_for: Any = None

    def fail(self, fault: Exception) -> None:
        """Raise ``fault`` where the last item came from: at a generator's ``yield``."""
        if not isinstance(self._iterator, AsyncGenerator):
            raise fault
        self._fault = fault

    def poll(self) -> bool:
        """Begin to pull. Whether that was all: there is an ``item``, or it has ``ended``."""
        awaitable: Awaitable[Any]
        if self._fault is None:
            awaitable = self._iterator.__anext__()
        else:
            awaitable, self._fault = cast("AsyncGenerator[Any]", self._iterator).athrow(self._fault), None
        self._steps = steps = cast("_Steps", awaitable) if hasattr(awaitable, "send") else _await(awaitable)
        try:
            self._waiting_for = steps.send(None)
        except StopIteration as stop:
            self.item = stop.value
            return True
        except StopAsyncIteration:
            self.ended = True
            return True
        return False

    @coroutine
    def wait(self) -> Generator[Any, Any, None]:
        """Finish what ``poll`` has begun."""
        steps = self._steps
        try:
            while True:
                try:
                    value = yield self._waiting_for
                except GeneratorExit:
                    steps.close()
                    raise
                except BaseException as exc:
                    self._waiting_for = steps.throw(exc)
                else:
                    self._waiting_for = steps.send(value)
        except StopIteration as stop:
            self.item = stop.value
        except StopAsyncIteration:
            self.ended = True
        finally:
            self._waiting_for = None


async def _await(awaitable: Awaitable[Any]) -> Any:
    return await awaitable
