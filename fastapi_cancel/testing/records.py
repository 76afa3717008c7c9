"""What was seen of one request: how it waits, who interrupts it, what it starts and leaves open."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Coroutine, Generator
from contextvars import ContextVar
from types import AsyncGeneratorType, coroutine
from typing import Any, Protocol

from starlette.requests import ClientDisconnect

from ..exceptions import ClientGone
from .faults import Fault, Kind
from .sites import Stack, own, stack_of, stack_of_waiting, told

AnyGenerator = AsyncGeneratorType[Any, Any]

CURRENT: ContextVar[Record | None] = ContextVar("fastapi_cancel_record", default=None)
"""The record of the request that this task belongs to; every task that it starts inherits it."""


class Backend(Protocol):
    """What stepping must ask of asyncio or Trio."""

    def requests(self) -> int:
        """How often the running task has been asked to cancel, where that is counted."""
        ...

    def interruption(self, value: Any, requests: int) -> BaseException | None:
        """The cancellation of the running task that its wait has ended with, if it did.

        :param requests: how many there had been before
        """
        ...

    def alive(self, task: Any) -> bool:
        """Whether a task has not ended."""
        ...


class Started:
    """A task that the work has started.

    :param created: the stack that did it
    """

    def __init__(self, name: str, work: Any, created: Stack) -> None:
        self.name = name
        self.work = work
        self.created = created

    def __str__(self) -> str:
        return f"{self.name}, created at\n{told(self.created)}\n  waits at\n{told(stack_of_waiting(self.work))}"


class Record:
    """One request.

    :param on_suspension: called at each wait of the work, in whichever of its tasks
    :ivar suspensions: how many there were
    :ivar interruptions: how often somebody has cancelled one of its tasks at a wait
    """

    def __init__(self, backend: Backend, on_suspension: Callable[[], object] | None = None) -> None:
        self.backend = backend
        self.on_suspension = on_suspension
        self.faults: list[Fault] = []
        self.suspensions = 0
        self.interruptions = 0
        self.suspended_in: Any = None
        self._work: Any = None
        self._tasks: weakref.WeakKeyDictionary[Any, Started] = weakref.WeakKeyDictionary()
        self._generators: dict[int, _Generator] = {}

    async def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run the request itself."""
        token = CURRENT.set(self)
        self._work = work
        try:
            await stepped(work, self)
        finally:
            CURRENT.reset(token)

    def where(self) -> Stack:
        """Where the request itself waits."""
        return stack_of_waiting(self._work)

    def stacks(self) -> list[Stack]:
        """Likewise, and each of its tasks."""
        return [self.where(), *(stack_of_waiting(each.work) for each in self.tasks().values())]

    def everywhere(self) -> str:
        """Where it and its tasks wait in the user's own code, to be read by a person."""
        stacks = self.stacks()
        return "\n  and at\n".join(map(told, [stack for stack in stacks if own(stack) is not None] or stacks[:1]))

    def blame(self, kind: Kind, text: str) -> None:
        if (fault := Fault(kind, text)) not in self.faults:
            self.faults.append(fault)

    # -- what happens ------------------------------------------------------------------------

    def suspended(self, work: Any) -> None:
        self.suspensions += 1
        self.suspended_in = work
        if self.on_suspension is not None:
            self.on_suspension()

    def interrupted(self, interruption: BaseException) -> None:
        """The work has taken ``interruption``, which by now knows what it met."""
        self.interruptions += 1
        stack = stack_of(interruption)
        if any(site.package == "starlette" and site.function == "BackgroundTask.__call__" for site in stack):
            self.blame("background cancelled", f"a background task was cancelled at\n{told(stack)}")
        elif is_second(interruption) and (line := own(stack)) is not None:
            below = stack[stack.index(line) + 1 :]
            # A task group that waits for its children, a stream that has closed already: they lose nothing.
            if not any(site.function.endswith((".__aexit__", ".aclose")) for site in below):
                self.blame("cleanup killed", f"interrupted again while it handled an interruption, at\n{told(stack)}")

    def started(self, task: Any, started: Started) -> None:
        self._tasks[task] = started

    def iterated(self, generator: AnyGenerator, by: Stack) -> None:
        self._generators[id(generator)] = _Generator(weakref.ref(generator), generator.__qualname__, by)

    def abandoned(self, generator: AnyGenerator) -> None:
        """The garbage collector has got it: nobody has closed it."""
        noted = self._generators.pop(id(generator))
        self.blame("generator left open", f"{noted} was left to the garbage collector at\n{_waits(generator)}")

    # -- what is left ------------------------------------------------------------------------

    def tasks(self) -> dict[Any, Started]:
        """Those that have not ended."""
        return {task: started for task, started in self._tasks.items() if self.backend.alive(task)}

    def look(self) -> None:
        """Blame the work for all that it has left over by now."""
        for started in self.tasks().values():
            self.blame("task left", str(started))
        for noted in self._open_generators():
            self.blame("generator left open", f"{noted} waits at\n{_waits(noted.reference())}")

    def needs_collecting(self) -> bool:
        """Whether something may only be part of a reference cycle: that is left to the collector, too."""
        return bool(self._open_generators()) or bool(self._tasks)

    def _open_generators(self) -> list[_Generator]:
        return [
            noted for noted in self._generators.values() if getattr(noted.reference(), "ag_frame", None) is not None
        ]


class _Generator:
    def __init__(self, reference: weakref.ref[AnyGenerator], name: str, iterated: Stack) -> None:
        self.reference = reference
        self._name = name
        self._iterated = iterated

    def __str__(self) -> str:
        return f"{self._name}, first iterated at\n{told(self._iterated)}\n "


def _waits(generator: AnyGenerator | None) -> str:
    return told(stack_of_waiting(generator))


def is_second(interruption: BaseException) -> bool:
    """Whether it has arrived while an earlier one was being handled.

    Python keeps that: the earlier one is the context of the later one. A cancellation that was caught, and over,
    is not.
    """
    seen: set[int] = set()
    before = interruption.__context__
    while before is not None and id(before) not in seen:
        if is_interruption(before):
            return True
        seen.add(id(before))
        before = before.__context__
    return False


def is_interruption(exc: BaseException) -> bool:
    """Whether ``exc`` tells the work that it shall end."""
    if isinstance(exc, (asyncio.CancelledError, ClientDisconnect, ClientGone)):
        return True
    return type(exc).__name__ == "Cancelled" and type(exc).__module__.partition(".")[0] == "trio"


@coroutine
def stepped(work: Any, record: Record) -> Generator[Any, Any, Any]:
    """Step ``work`` by hand, and tell ``record`` of each wait and each interruption.

    A wait may also end by the cancellation of something else, of a task that is awaited. asyncio counts the
    requests to cancel a task, and only with one more of them was it this one.
    """
    backend = record.backend
    step: Callable[[Any], Any] = work.send
    value: Any = None
    requests = backend.requests()
    interruption: BaseException | None = None
    try:
        while True:
            try:
                waits_for = step(value)
            except StopIteration as end:
                return end.value
            finally:
                if interruption is not None:
                    record.interrupted(interruption)
            requests = min(requests, backend.requests())
            record.suspended(work)
            try:
                value = yield waits_for
            except GeneratorExit:
                work.close()
                raise
            except BaseException as exc:
                step, value = work.throw, exc
            else:
                step = work.send
            interruption = backend.interruption(value, requests)
            requests = max(requests, backend.requests())
    finally:
        del step, value, interruption  # an exception would hold this frame, which holds it
