"""The ladder: what happens to the work from a cause on.

Theory of operation
===================

The *work* is one coroutine: the route, its dependencies and its response. It runs in the
server's own task (the *host*), stepped by ``drive``, which sees every future the work waits for. On asyncio
most requests never have a ladder: :mod:`._light` steps them, and hands over.

====== ================================================== =================================
state  meaning                                            who moves it on
====== ================================================== =================================
RUN    nobody wants the work to end. With a cause and a   ``signal``; the grace timer;
       grace the token is set, the timer runs             ``settle``; ``complete``
DUE    the cancellation must be delivered, but the work   ``_attempt``, tried at once and
       cannot take it yet                                 after every step of the work;
                                                          ``settle``; ``complete``
CLEAN  the work was interrupted, once: by our             the overdue timer;
       cancellation, or by what its own ``send`` or       the end of the work
       ``receive`` raised. Nothing interrupts its cleanup
FORCE  the cleanup took too long: cancelled at each await the end of the work
DONE   the response is complete, or the work has ended    nobody
====== ================================================== =================================

The work cannot take a cancellation while it

- is inside an AnyIO shield, which includes waiting for a worker thread;
- unwinds from somebody else's cancellation: its own timeout, or the server's;
- has just been handed the result of its wait: cancelling now would lose that result
  (a connection from a pool, say), so it is cancelled at its next wait;
- is the very task that makes the signal.

Each of these ends by a step of the work, so trying again after each step is enough; nothing polls.

Races, and why each is harmless:

- *a second cause*: ``signal`` takes the first. The rest can only end its grace.
- *the client leaves while the work unwinds from our own OSError*: whoever raises calls
  ``settle`` first, so DUE never survives a raise.
- *the last byte goes out while a cause arrives*: ``complete`` wins over DUE. The client has its answer.
- *the server cancels natively during CLEAN*: it goes through to the work and out to the server,
  untouched. We only take back (``uncancel``) what we requested ourselves.
- *the server cancels in the same loop turn as we do*: asyncio folds both into one CancelledError.
  ``Task.cancelling()`` still counts two; what is left after taking back ours is re-raised.

Left out: tasks that the work makes for itself. ``receive`` and ``send`` tell each of them that the client has left,
but only the host's own unwinding is known here. A task that unwinds from what it was told, while the host waits
for it, can be cancelled through the host in the middle of its cleanup.

Two rules for whoever edits this file. A subclass says only how an interruption is delivered, never
when. And every path that interrupts the work goes through ``_interrupted``, once.
"""

from __future__ import annotations

import logging
import threading
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator, Mapping
from itertools import chain
from types import MappingProxyType, coroutine
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from starlette.types import Scope

from ._stepper import Reader
from .policy import HERE, CancelPolicy, Cause

logger = logging.getLogger("fastapi_cancel")


# Plain integers in the order in which they are passed through: compared at every step.
RUN, DUE, CLEAN, FORCE, DONE = range(5)

_NO_TIMERS: Mapping[str, Timer] = MappingProxyType({})

RUNNING = object()
"""What the work waits for while it does not wait."""

_LISTENING = threading.Lock()

ending: WeakKeyDictionary[Ladder, int] = WeakKeyDictionary()
"""The ladders whose work ends early and has not ended yet, each with the thread of its event loop."""


def name_of(scope: Scope) -> str:
    """Method, path and function of a request: "GET /export (export)"."""
    name = f"{scope.get('method', scope['type'])} {scope.get('root_path', '')}{scope['path']}"
    if (function := getattr(scope.get("endpoint"), "__qualname__", None)) is not None:
        name += f" ({function})"
    return name


class Timer(Protocol):
    """What ``call_later`` returns."""

    def cancel(self) -> None: ...


class Ladder:  # no `ABC`: CPython does not specialize the making of what has a metaclass
    """One request's way from a cause to a finished cleanup.

    :param policy: how it ends early
    :param scope: the ASGI scope of the request, to name it in the log
    :ivar cause: why the work ends early, once it does
    :ivar reason: what whoever stopped it says about that
    :ivar left: whether the client has left, whatever the cause
    :ivar waits: how often the work has waited
    :ivar cheap_timers: whether ``call_later`` costs less than a task
    :ivar watch: called when the work waits, until it returns True: the client is watched
    :ivar parting: called when the grace is over, before the cancellation
    """

    reason = ""
    left = False
    cheap_timers = False
    _insist = False

    def __init__(self, policy: CancelPolicy, scope: Scope) -> None:
        self.policy = policy
        self.scope = scope
        # No defaults in the class for these: CPython does not specialize a store that hides one.
        self.cause: Cause | None = None
        self.state = RUN
        self.waits = 0
        self.watch: Callable[[], bool] | None = None
        self.parting: Callable[[], object] | None = None
        self._watched = False
        self._restless = True
        self._waiting_for: Any = RUNNING
        self._listeners: tuple[Callable[[], object], ...] = ()
        self._timers: Mapping[str, Timer] = _NO_TIMERS

    # -- causes ------------------------------------------------------------------------------

    def stop(self, reason: str) -> None:
        """Somebody has asked for its end."""
        if self.cause is None and "stop" in self.policy.causes:
            self.reason = reason
        self.signal("stop")

    def signal(self, cause: Cause, *, at_once: bool = False) -> bool:
        """Set the token. Only the first cause counts, and none once the response is complete.

        But a client that leaves during the grace of another cause ends it: the grace was for its sake.

        :param at_once: without grace, and whatever the policy listens to
        :return: whether this was the one
        """
        if cause == "disconnect":
            self.left = True
        if self.state == DONE or not (at_once or cause in self.policy.causes):
            return False
        if self.cause is not None:
            if self.state == RUN and (at_once or (self.cause in HERE and cause not in HERE)):
                self._stop_timers("grace")
                self._cancel()
            return False
        self.cause = cause
        ending[self] = threading.get_ident()
        for tell in self._listeners:
            tell()
        if self.policy.grace and not at_once:
            self.start_timer("grace", self.policy.grace, self._cancel)
        else:
            self._cancel()
        return True

    def listen(self, tell: Callable[[], object]) -> None:
        """Have ``tell`` called at the signal, or now if that has been."""
        with _LISTENING:  # called from threads, too
            self._listeners += (tell,)
        if self.cause is not None:  # in this order: a signal in between tells it twice rather than never
            tell()

    def forget(self, tell: Callable[[], object]) -> None:
        """Undo ``listen``."""
        with _LISTENING:
            self._listeners = tuple(each for each in self._listeners if each is not tell)

    def adopt(self, policy: CancelPolicy) -> None:
        """Go on under another policy: that of a response. Its ``timeout`` starts now."""
        limit, self.policy = self.policy.timeout, policy
        if policy.timeout != limit:
            self._stop_timers("limit")
            self._start_limit()

    def settle(self) -> None:
        """The work is about to unwind by itself, because of the cause: spare it the cancellation.

        Called before raising, by whoever raises. Has no effect outside the work's own task.
        """
        if self.cause is not None and self.state <= DUE and self.in_host():
            self._settle()

    def _settle(self) -> None:
        grace = self.policy.grace if self.state == RUN else 0
        self._interrupted(self.policy.cleanup_timeout + grace)

    def complete(self) -> None:
        """The response is out: what the client does from here on is its own affair."""
        self.state = DONE
        if self._timers:
            self._stop_timers(*self._timers)

    def others_cancel(self) -> bool:
        """Whether somebody else's cancellation is under way in the work, which no error may replace (C14).

        Never on Trio: a scope further out stays cancelled, whatever is raised.
        """
        return False

    # -- the work ----------------------------------------------------------------------------

    def unwatched(self) -> None:
        """The watcher had to stop: ask for it again at the work's next wait."""
        self._watched = False
        self._restless = True

    def watch_again(self) -> None:
        """The watcher may read now, if it might not before. If by a task of the work's, that may not wait anew."""
        if not self._watched and not self.in_host():
            self._start_watching()

    def _start_watching(self) -> None:
        if not self._watched and self.watch is not None:
            self._watched = True
            if not self.watch():
                self.unwatched()

    def run(self, work: Coroutine[Any, Any, None]) -> Awaitable[None]:
        """Run the work. Our own cancellation ends here; everything else passes."""
        self._start_limit()
        return self.drive(work, work.__await__())

    @coroutine
    def drive(
        self, work: Coroutine[Any, Any, None], steps: Iterator[Any], thrown: BaseException | None = None
    ) -> Generator[Any, Any, None]:
        """Step the work by hand, to see its waits. One that never waits costs next to nothing.

        :param steps: what is left of them
        :param thrown: what its present wait has raised
        """
        waits: Any = steps
        step: Any = None
        value: Any = None
        waiting_for: Any = None
        self._waiting_for = RUNNING
        try:
            if thrown is not None:
                self._thrown(thrown)
                waits = chain(iter((work.throw(thrown),)), steps)
                thrown = None
            while True:
                for waiting_for in waits:  # half the price of `work.send(None)`
                    self._waiting_for = waiting_for
                    self.waits += 1
                    # A bare yield, `sleep(0)`, is over in the next turn: one or two are not worth a watcher.
                    if self._restless and (waiting_for is not None or self.waits > 2):
                        self._on_wait()
                    try:
                        value = yield waiting_for
                        self._waiting_for = RUNNING
                    except GeneratorExit:
                        work.close()
                        raise
                    except BaseException as exc:
                        self._waiting_for = RUNNING
                        self._thrown(exc)
                        step, value = work.throw, exc
                        break
                    if value is not None:  # Trio says so what came of the wait
                        step = work.send
                        break
                else:
                    return
                waits = chain(iter((step(value),)), steps)  # an iterator lets go of what it has given
        except StopIteration:
            pass  # the work has returned
        except BaseException as exc:
            if not self._swallows(exc):
                raise
        finally:
            waits = waiting_for = step = value = thrown = None  # an exception would hold this frame, which holds it
            del steps
            self.end()

    def end(self) -> None:
        """The work has ended, if not before. Leaves no timer, and no reference cycle: the request is freed at once."""
        self.state = DONE
        self.watch = self.parting = None
        self._listeners = ()
        if self._timers:
            self._stop_timers(*self._timers)
        if self.cause is not None:
            self._over()

    def _over(self) -> None:
        """Nothing of the work is left."""
        ending.pop(self, None)

    def _on_wait(self) -> None:
        self._restless = False
        self._start_watching()  # which may have news at once
        if self.state in (DUE, FORCE):
            self._restless = True
            self._call_soon(self._attempt)

    # -- the rungs ---------------------------------------------------------------------------

    def _cancel(self) -> None:
        if self.state == RUN:
            if self.parting is not None:
                self.parting()
            self.state = DUE
            self._restless = True
            self.start_timer("overdue", self.policy.cleanup_timeout, self._overdue)
            self._attempt()

    def _attempt(self) -> None:
        if self.state == DUE:
            if self._deliver():
                self._interrupted(self.policy.cleanup_timeout)
        elif self.state == FORCE:
            self._force()

    def _interrupted(self, cleanup_timeout: float) -> None:
        self.state = CLEAN
        self.start_timer("overdue", cleanup_timeout, self._overdue)

    def _overdue(self) -> None:
        due = self.state == DUE
        logger.warning(
            "%s: %s after %s (cause: %s)%s",
            self.name(),
            "still shielded or in a worker thread" if due else "cleanup not finished",
            f"{self.policy.cleanup_timeout:g} s",
            self.cause or "cancelled from outside",
            "" if due else ", forcing it",
        )
        if due:  # its cleanup has still to get its time; whose cancellation is in the way no longer matters
            self._insist = True
            self._attempt()
        else:
            self.state = FORCE
            self._restless = True
            self._force()

    def name(self) -> str:
        """Of the request: see :func:`name_of`."""
        return name_of(self.scope)

    # -- time --------------------------------------------------------------------------------

    def _start_limit(self) -> None:
        if self.policy.timeout is not None:
            self.start_timer("limit", self.policy.timeout, lambda: self.signal("timeout"))

    def start_timer(self, name: str, seconds: float, function: Callable[[], object]) -> None:
        self._stop_timers(name)
        self._timers = {**self._timers, name: self.call_later(seconds, function)}

    def _stop_timers(self, *names: str) -> None:
        for name in names:
            if (timer := self._timers.get(name)) is not None:
                timer.cancel()

    # -- the seam: how a backend does it -----------------------------------------------------

    @abstractmethod
    def _swallows(self, exc: BaseException) -> bool:
        """Whether ``exc``, with which the work ended, is our own cancellation and nobody else's."""

    @abstractmethod
    def _deliver(self) -> bool:
        """Cancel the work if it can take it now. Whether it was delivered."""

    @abstractmethod
    def _force(self) -> None:
        """Cancel the work at this wait, and at each later one."""

    @abstractmethod
    def turn(self) -> Awaitable[None]:
        """Let the event loop turn once."""

    @abstractmethod
    def in_host(self) -> bool:
        """Whether the calling task is the one that runs the work."""

    @abstractmethod
    def settle_from_thread(self) -> None:
        """``settle``, before raising in a thread. Has no effect unless the work itself waits for that thread."""

    @abstractmethod
    def spawn(self, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run ``function`` beside the work; it ends with the work at the latest."""

    def start_watcher(self, reader: Reader) -> None:
        """Have the client watched for this reader: one at a time, an upload has one after another."""
        self.spawn(reader.watch_on)

    def pause_watcher(self) -> None:
        """End the watcher if that can be done at once, and the work's next wait is sure to start another."""

    @abstractmethod
    def call_later(self, seconds: float, function: Callable[[], object]) -> Timer:
        """Call ``function`` in so many seconds, unless the work has ended."""

    @abstractmethod
    def _call_soon(self, function: Callable[[], object]) -> None:
        """Call ``function`` once the work's present step is over."""

    def _thrown(self, exc: BaseException) -> None:
        """The work is about to receive an exception at its wait."""
