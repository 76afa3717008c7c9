"""The watch over an event loop: what happens in it is noted, for the request that it happens for.

Theory of operation
===================

A context variable names the :class:`.records.Record` of a request; whatever the request starts inherits it. While
somebody watches, these are ours, and each hands on to what was there before:

- *how tasks are made* (asyncio's task factory, an instrument of Trio's): a task of a record's is noted with the
  stack that made it, and stepped by hand as the request itself is;
- *the hooks for asynchronous generators*: each is noted when it is first iterated, and again if nobody has closed it
  when the garbage collector gets it;
- *the root logger*, and what Python can only print (``sys.unraisablehook``).

There is one watch a thread, however many requests are watched in it. ``sys.unraisablehook`` is of the whole process:
the first watch sets it, and the last one takes it back.
"""

from __future__ import annotations

import gc
import logging
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .backends import current_backend
from .pools import Ledger
from .records import CURRENT, Record
from .sites import stack_here
from .stepping import told_of

_HERE = threading.local()
_LISTENING: list[Watch] = []
"""All that hear what Python can only print."""
_LOCK = threading.Lock()


def watch(logs: bool = True) -> Watch:
    """The watch over the running event loop.

    :param logs: whether to hear what is logged
    """
    here: Watch | None = getattr(_HERE, "watch", None)
    if here is None or not here.records or not here.backend.is_running():
        here = _HERE.watch = Watch(logs)
    return here


class Watch:
    """Over one event loop.

    :ivar records: of the requests that are watched now
    :ivar ledger: of what they have borrowed
    """

    def __init__(self, logs: bool) -> None:
        self.backend = current_backend()
        self.records: list[Record] = []
        self.ledger = Ledger()
        self._owners: dict[int, Record] = {}
        self._hooks: Any = None
        self._logs = logs
        self._handler = _Handler(self)

    @contextmanager
    def record(
        self, on_suspension: Callable[[], object] | None = None, log_level: int = logging.WARNING
    ) -> Iterator[Record]:
        """Watch one request.

        :param log_level: from which on what it logs is a fault
        """
        record = Record(self.backend, on_suspension, log_level)
        if not self.records:
            self._install()
        self.records.append(record)
        try:
            yield record
        finally:
            self.records.remove(record)
            if not self.records:
                self._remove()

    def _install(self) -> None:
        # Each look at what is left collects garbage, and only what is made from here on can be of interest. Freezing
        # takes no time; a collection of everything takes 20 to 100 ms.
        self._froze = gc.get_freeze_count() == 0  # else somebody has: another thread, or the application
        if self._froze:
            gc.freeze()
        self.backend.install()
        self._hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(self._iterated, self._abandoned)
        if self._logs:
            _listen(self)
            logging.getLogger().addHandler(self._handler)

    def _remove(self) -> None:
        if self._logs:
            logging.getLogger().removeHandler(self._handler)
            _listen_no_more(self)
        if sys.get_asyncgen_hooks().firstiter == self._iterated:
            sys.set_asyncgen_hooks(*self._hooks)
        self.backend.remove()
        if self._froze:
            gc.unfreeze()
        if getattr(_HERE, "watch", None) is self:
            del _HERE.watch  # which would keep an event loop that has been closed

    def _iterated(self, generator: Any) -> None:
        record = CURRENT.get()
        if record is not None:
            self._owners[id(generator)] = record
            record.iterated(generator, stack_here())
        else:
            self._owners.pop(id(generator), None)  # the id of one that is gone
        if self._hooks.firstiter is not None:
            self._hooks.firstiter(generator)

    def _abandoned(self, generator: Any) -> None:
        with warnings.catch_warnings():
            if (record := self._owners.pop(id(generator), None)) is not None:
                record.abandoned(generator)
                warnings.simplefilter("ignore", ResourceWarning)  # Trio's, which says the same
            if self._hooks.finalizer is not None:
                self._hooks.finalizer(generator)

    def logged(self, line: str, level: int, exc: BaseException | None) -> None:
        """Somebody has said something: for the request in whose context it was, or whose error it is, else for all."""
        record = CURRENT.get() or told_of(exc)
        for each in self.records.copy() if record is None else [record]:
            each.heard(line, level)


class _Hook:
    """In the place of ``sys.unraisablehook``."""

    def __init__(self, before: Callable[[Any], object]) -> None:
        self.before = before

    def __call__(self, unraisable: Any) -> None:
        line = f"{unraisable.err_msg or 'Exception ignored in'} {unraisable.object!r}: {unraisable.exc_value!r}"
        for watch in _LISTENING.copy():
            watch.logged(line, logging.ERROR, unraisable.exc_value)
        self.before(unraisable)


def _listen(watch: Watch) -> None:
    with _LOCK:
        if not _LISTENING:
            sys.unraisablehook = _Hook(sys.unraisablehook)
        _LISTENING.append(watch)


def _listen_no_more(watch: Watch) -> None:
    with _LOCK:
        _LISTENING.remove(watch)
        if not _LISTENING and isinstance(sys.unraisablehook, _Hook):  # else somebody builds on it
            sys.unraisablehook = sys.unraisablehook.before


class _Handler(logging.Handler):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = weakref.proxy(watch)
        self.setFormatter(logging.Formatter("%(name)s %(levelname)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "asyncio" and record.funcName == "_run_once":
            return  # in debug mode it tells of each slow step, and debugging is slow
        exc = record.exc_info[1] if record.exc_info else None
        self._watch.logged(self.format(record), record.levelno, exc)
