"""What was seen of one request: how it waits, who interrupts it, what it starts and leaves open."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from types import AsyncGeneratorType, GeneratorType
from typing import Any, NamedTuple, Protocol

from .faults import Fault, Kind
from .sites import Stack, own, site_of, stack_of, stack_of_waiting, told
from .stepping import Seam, stepped

AnyGenerator = AsyncGeneratorType[Any, Any]

ABANDONED = "was left to the garbage collector"

CURRENT: ContextVar[Record | None] = ContextVar("fastapi_cancel_record", default=None)
"""The record of the request that this task belongs to; every task that it starts inherits it."""


class Backend(Seam, Protocol):
    """What a record must ask of asyncio or Trio."""

    def alive(self, task: Any) -> bool:
        """Whether a task has not ended."""
        ...

    def once_suspended(self, function: Callable[[], object]) -> None:
        """Call ``function`` when the running task waits, as it is about to."""
        ...

    def called(self, task: Any, function: str) -> str:
        """The name by which the user knows a task.

        :param function: that it runs
        """
        ...


class Started:
    """A task that the work has started.

    :param function: that it runs
    :param work: its coroutine
    :param created: the stack that did it
    """

    def __init__(self, function: str, work: Any, created: Stack) -> None:
        self.function = function
        self.work = work
        self.created = created

    def __str__(self) -> str:
        return f"created at\n{told(self.created)}\n  waits at\n{told(stack_of_waiting(self.work))}"


class Record:
    """One request.

    :param on_suspension: called at each wait of the work, in whichever of its tasks
    :param log_level: from which on what it logs is a fault
    :ivar suspensions: how many there were
    :ivar listening: whether what is heard of counts; not once the test itself has ended the work
    :ivar dropped: whether it shall end by force
    """

    def __init__(
        self,
        backend: Backend,
        on_suspension: Callable[[], object] | None = None,
        log_level: int = logging.WARNING,
    ) -> None:
        self.backend = backend
        self.on_suspension = on_suspension
        self.faults: list[Fault] = []
        self.suspensions = 0
        self.listening = True
        self.dropped = False
        self.suspended_in: Any = None
        self._log_level = log_level
        self._work: Any = None
        self._tasks: weakref.WeakKeyDictionary[Any, Started] = weakref.WeakKeyDictionary()
        self._generators: dict[int, _Generator] = {}
        self._driven: list[tuple[_Generator, GeneratorType[Any, Any, Any]]] = []  # whose driver has been abandoned

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

    def heard(self, line: str, level: int) -> None:
        """Somebody has said something."""
        if self.listening and level >= self._log_level:
            self.blame("logged", line)

    def blame(self, kind: Kind, text: str) -> None:
        if (fault := Fault(kind, text)) not in self.faults:
            self.faults.append(fault)

    # -- what happens ------------------------------------------------------------------------

    def suspended(self, work: Any) -> None:
        self.suspensions += 1
        self.suspended_in = work
        if self.on_suspension is not None:
            self.backend.once_suspended(self.on_suspension)

    def judged(self, interruption: BaseException, killed: bool) -> None:
        """What came of an interruption."""
        if not self.listening:
            return
        stack = stack_of(interruption)
        if any(site.package == "starlette" and site.function == "BackgroundTask.__call__" for site in stack):
            self.blame("background cancelled", f"a background task was cancelled at\n{told(stack)}")
        elif killed and (line := own(stack)) is not None:
            below = stack[stack.index(line) + 1 :]
            # A task group that waits for its children, a stream that has closed already: they lose nothing.
            if not any(site.function.endswith((".__aexit__", ".aclose")) for site in below):
                self.blame("cleanup killed", f"interrupted again while it handled an interruption, at\n{told(stack)}")

    def started(self, task: Any, started: Started) -> None:
        self._tasks[task] = started

    def iterated(self, generator: AnyGenerator, by: Stack) -> None:
        self._generators[id(generator)] = _Generator(weakref.ref(generator), by)

    def abandoned(self, generator: AnyGenerator) -> None:
        """The garbage collector has got it: nobody has closed it."""
        noted = self._generators.pop(id(generator))
        left = _users(generator)
        if not self.listening or left is None:
            return
        if isinstance(left, GeneratorType):  # whoever has it still may be about to close it
            self._driven.append((noted, left))
        else:
            self._blame_open(noted, left, ABANDONED)

    def _blame_open(self, noted: _Generator, left: AnyGenerator | GeneratorType[Any, Any, Any], how: str) -> None:
        name, first, waits = left.__qualname__, told(noted.iterated), told(stack_of_waiting(left))
        self.blame("generator left open", f"{name}, first iterated at\n{first}\n  {how} at\n{waits}")

    # -- what is left ------------------------------------------------------------------------

    def tasks(self) -> dict[Any, Started]:
        """Those that have not ended."""
        return {task: started for task, started in self._tasks.items() if self.backend.alive(task)}

    def look(self) -> None:
        """Blame the work for all that it has left over by now."""
        for task, started in self.tasks().items():
            self.blame("task left", f"{self.backend.called(task, started.function)}, {started}")
        for noted, generator in self._open_generators():
            if (left := _users(generator)) is not None:
                self._blame_open(noted, left, "waits")
        for noted, driven in self._driven:
            if driven.gi_frame is not None:
                self._blame_open(noted, driven, ABANDONED)
        self._driven.clear()

    def needs_collecting(self) -> bool:
        """Whether something may only be part of a reference cycle: that is left to the collector, too."""
        return bool(self._open_generators() or self._tasks)

    def _open_generators(self) -> list[tuple[_Generator, AnyGenerator]]:
        alive = [(noted, noted.reference()) for noted in self._generators.values()]
        return [(noted, each) for noted, each in alive if each is not None and each.ag_frame is not None]


class _Generator(NamedTuple):
    reference: weakref.ref[AnyGenerator]
    iterated: Stack


def _users(generator: AnyGenerator) -> AnyGenerator | GeneratorType[Any, Any, Any] | None:
    """``generator``, or what a framework's own one drives; ``None``: it has nothing to clean up."""
    frame = generator.ag_frame
    assert frame is not None
    if site_of(frame).own:
        return generator
    held = frame.f_locals.values()
    return next((each for each in held if isinstance(each, GeneratorType) and each.gi_frame is not None), None)
