"""Pulling an iterator without waiting for it: is the next item there already?"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Generator
from types import coroutine
from typing import Any, Protocol


class _Steps(Protocol):
    def send(self, value: Any, /) -> Any: ...
    def throw(self, exc: BaseException, /) -> Any: ...


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
        self._iterator = iterator = iterable.__aiter__()
        self._next: Callable[[], _Steps] = (
            iterator.__anext__ if isinstance(iterator, AsyncGenerator) else lambda: _next(iterator)
        )
        self._steps: _Steps
        self._waiting_for: Any = None

    def fail(self, fault: Exception) -> None:
        """Raise ``fault`` where the last item came from: at a generator's ``yield``."""
        iterator, proceed = self._iterator, self._next
        if not isinstance(iterator, AsyncGenerator):
            raise fault

        def throw() -> _Steps:
            self._next = proceed
            return iterator.athrow(fault)

        self._next = throw

    def poll(self) -> bool:
        """Begin to pull. Whether that was all: there is an ``item``, or it has ``ended``."""
        self._steps = steps = self._next()
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
        value: Any = None
        try:
            while True:
                try:
                    value = yield self._waiting_for
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
            del value  # on Trio: a cancellation, which would hold this frame, which holds it


async def _next(iterator: AsyncIterator[Any]) -> Any:
    return await iterator.__anext__()
