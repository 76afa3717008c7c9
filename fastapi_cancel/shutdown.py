"""Draining: when the server is told to stop, every event stream is told, and ends in its own way.

No server tells the application: each waits for the open responses, and only then sends lifespan.shutdown. So
there are two ways to learn of it, both in use while event streams are open:

- *signals*: we stand before the server's own handler of SIGTERM and SIGINT, and call it. That is immediate.
- *listening sockets*: a server that stops closes them first (:mod:`._listeners`). We look now and then.

Nothing is remembered of a server that has ended, so that one which starts later in the same process starts anew
(sysid/sse-starlette#211): what has been heard belongs to the signal handler that heard it, and a server takes its
handler with it. Event loops outside the main thread hear no signals, as their servers hear none.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from types import FrameType
from typing import Any, Protocol

from starlette.responses import Response

from ._heart import current_heart
from ._listeners import Address, Still, address_of, listening
from .ladder import Ladder

AT_ONCE = 50  # streams told in one turn of the event loop
LOOK = 0.2  # seconds between two looks at the listening sockets

Soon = Callable[[Callable[[], object]], object]
"""Has an event loop call a function soon. Identifies the loop; may be used in a signal handler."""


class Status:
    """What an application that uses sse-starlette may say: its ``AppStatus``.

    :ivar enable_automatic_graceful_drain: whether we are to act when we learn that the server stops
    :ivar should_exit: end the streams now; set by the application, or by sse-starlette at a signal for ever
    """

    enable_automatic_graceful_drain = True
    should_exit = False


status: Any = Status


class Stream(Protocol):
    """A response that does not end by itself."""

    def shut_down(self) -> None: ...


class Endless:
    """An event stream that has nothing to say at its end."""

    def __init__(self, ladder: Ladder) -> None:
        self._ladder = ladder

    def shut_down(self) -> None:
        self._ladder.signal("shutdown")


class _Streams(dict[Stream, Address | None]):
    """Those of one event loop, and where they came in.

    :param hears: whether the loop runs in the main thread, where signals arrive
    """

    def __init__(self, soon: Soon, hears: bool) -> None:
        self.hears = hears
        self._soon = soon
        self._pulse = current_heart().add(self._look, 0)
        self._still: dict[Address, Still] = {}
        self._closed: set[Address] = set()
        self._should_exit = status.should_exit

    def look_at(self, address: Address | None) -> None:
        """See to it that the end of listening at ``address`` is noticed."""
        if address is not None and address not in self._still:
            # If not found: closed already, or a server with sockets of its own (Granian).
            self._still[address] = listening().get(address, partial(bool, address not in self._closed))

    def stop(self) -> None:
        self._pulse.stop()

    def _look(self, now: float) -> float:
        for address in [address for address, still in self._still.items() if not still()]:
            del self._still[address]
            self._closed.add(address)
            if status.enable_automatic_graceful_drain:
                self.tell([stream for stream, came_in in self.items() if came_in == address])
        if status.should_exit and not self._should_exit:
            self.tell(list(self))
        self._should_exit = status.should_exit
        return now + LOOK

    def tell(self, streams: Iterable[Stream]) -> None:
        """Shut ``streams`` down, some at a time."""
        rest = iter(streams)
        for stream in (some := list(islice(rest, AT_ONCE))):
            stream.shut_down()
        if some:
            self._soon(lambda: self.tell(rest))


_open: dict[Soon, _Streams] = {}


def is_event_stream(response: Response) -> bool:
    """Whether ``response`` is expected to go on for ever. Others are given the time that they need."""
    return (response.media_type or "").startswith("text/event-stream")


@contextmanager
def draining(ladder: Ladder, stream: Stream | None = None) -> Iterator[None]:
    """Have ``stream`` told when its server is to stop, at once if it has been told so already."""
    stream = stream or Endless(ladder)
    soon = _soon()
    if (streams := _open.get(soon)) is None:
        streams = _open[soon] = _Streams(soon, hears=threading.current_thread() is threading.main_thread())
    streams[stream] = address_of(ladder.scope.get("server"))
    try:
        streams.look_at(streams[stream])
        if streams.hears and _listen():
            stream.shut_down()
        yield
    finally:
        del streams[stream]
        if not streams:
            streams.stop()
            del _open[soon]


def drain() -> int:
    """End the open event streams of the running event loop, as SIGTERM does: grace, farewell, cancellation.

    For when you know before the server does. From another thread: ``loop.call_soon_threadsafe(drain)``.

    :return: how many there were
    :raises RuntimeError: no event loop runs in the calling thread
    """
    if (streams := _open.get(_soon())) is None:
        return 0
    streams.tell(list(streams))
    return len(streams)


def _soon() -> Soon:
    with suppress(RuntimeError):
        return asyncio.get_running_loop().call_soon_threadsafe
    if (trio := sys.modules.get("trio")) is not None:
        with suppress(RuntimeError):
            soon: Soon = trio.lowlevel.current_trio_token().run_sync_soon
            return soon
    raise RuntimeError("no event loop runs in this thread: call drain() in the one whose streams are to end")


class _Listener:
    """Stands before the server's handler of a signal.

    :ivar heard: whether the signal has come
    """

    def __init__(self, handler: Callable[[int, FrameType | None], object]) -> None:
        self.heard = False
        self._handler = handler

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if status.enable_automatic_graceful_drain:
            self.heard = True
            for soon, streams in list(_open.items()):
                if streams.hears:
                    with suppress(RuntimeError):  # a loop that was closed with open streams
                        soon(drain)
        self._handler(signum, frame)

    def __getattr__(self, name: str) -> Any:
        # sse-starlette finds uvicorn's server by the handler's `__self__`.
        return getattr(self._handler, name)


def _listen() -> bool:
    """Stand before the server's handlers, if it has any. Whether a signal to stop has been heard."""
    heard = False
    for signum in (signal.SIGTERM, signal.SIGINT):
        handler = signal.getsignal(signum)
        if isinstance(handler, _Listener):
            heard = heard or handler.heard
        elif not callable(handler):
            break  # nobody takes SIGTERM: there is no server to wait for us (Hypercorn's workers)
        else:
            signal.signal(signum, _Listener(handler))
            signal.siginterrupt(signum, False)  # as asyncio has it
    return heard
