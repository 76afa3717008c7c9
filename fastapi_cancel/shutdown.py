"""Draining: when the server is told to stop, every event stream is told, and ends in its own way.

No server tells the application: each takes the signal, then waits for the open responses, and only then sends
lifespan.shutdown. So, from the first event stream on, we stand before the server's own signal handler.

What has been heard belongs to the handler that heard it, not to the process: a server that ends takes its
handler with it, and one that starts later in the same process starts anew (sysid/sse-starlette#211). Event
loops outside the main thread hear no signals, as their servers hear none; there :func:`drain` is for you to call.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from types import FrameType
from typing import Protocol

AT_ONCE = 50  # streams told in one turn of the event loop

Soon = Callable[[Callable[[], object]], object]
"""Has an event loop call a function soon. Identifies the loop; may be used in a signal handler."""


class Stream(Protocol):
    """A response that does not end by itself."""

    def shut_down(self) -> None: ...


class _Streams(set[Stream]):
    """Those of one event loop.

    :param hears: whether the loop runs in the main thread, where the signals arrive
    """

    def __init__(self, hears: bool) -> None:
        self.hears = hears


_open: dict[Soon, _Streams] = {}


def enter(stream: Stream) -> None:
    """Have ``stream`` told when the server is to stop, or now if it has been told so already."""
    soon = _soon()
    if (streams := _open.get(soon)) is None:
        streams = _open[soon] = _Streams(threading.current_thread() is threading.main_thread())
    streams.add(stream)
    if streams.hears and _listen():
        stream.shut_down()


def leave(stream: Stream) -> None:
    """``stream`` has ended. Harmless to call again."""
    soon = _soon()
    if (streams := _open.get(soon)) is not None:
        streams.discard(stream)
        if not streams:
            del _open[soon]


def drain() -> int:
    """End the open event streams of the running event loop, as SIGTERM does: farewell, grace, cancellation.

    For servers that are stopped in another way, such as one that was started in a thread.

    :return: how many there were
    """
    soon = _soon()
    streams = list(_open.get(soon, ()))
    _tell(iter(streams), soon)
    return len(streams)


def _tell(streams: Iterator[Stream], soon: Soon) -> None:
    some = list(islice(streams, AT_ONCE))
    for stream in some:
        stream.shut_down()
    if some:
        soon(lambda: _tell(streams, soon))


def _soon() -> Soon:
    try:
        return asyncio.get_running_loop().call_soon_threadsafe
    except RuntimeError:
        import trio

        return trio.lowlevel.current_trio_token().run_sync_soon


class _Listener:
    """Stands before the server's handler of a signal.

    :ivar heard: whether the signal has come
    """

    def __init__(self, handler: Callable[[int, FrameType | None], object]) -> None:
        self.heard = False
        self._handler = handler

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self.heard = True
        for soon, streams in list(_open.items()):
            if streams.hears:
                soon(drain)
        self._handler(signum, frame)


def _listen() -> bool:
    """Stand before the server's handlers, if it has any. Whether a signal to stop has been heard."""
    heard = False
    for signum in (signal.SIGTERM, signal.SIGINT):
        handler = signal.getsignal(signum)
        if isinstance(handler, _Listener):
            heard = heard or handler.heard
        elif not callable(handler):
            break  # nobody takes SIGTERM: there is no server to wait for us
        else:
            signal.signal(signum, _Listener(handler))
            signal.siginterrupt(signum, False)  # as asyncio has it
    return heard
