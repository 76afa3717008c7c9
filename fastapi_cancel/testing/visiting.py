"""One visit, from its beginning to the verdict."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
from starlette.types import ASGIApp

from .backends import POLL, Backend, Running
from .moments import Moment
from .records import Record
from .visit import NeverCame, Patience, Visit, settle
from .watching import watch

LOOKS = 20
"""At work before it is blamed for going on, however slow the machine."""


@asynccontextmanager
async def visiting(
    app: ASGIApp,
    visit: Visit,
    *,
    upload: AsyncIterable[bytes] | None,
    leave: Moment | None,
    stall: Moment | None,
    resume: Moment | None,
    patience: Patience,
    watched: Sequence[Any],
    log_level: int,
) -> AsyncIterator[Visit]:
    """Run ``app`` for one request, beside the block; then wait until it is over, and look at what it left."""
    over = watch()
    with over.record(visit.look, log_level) as record, over.ledger.watched(watched) as not_returned:
        beside = visit.begin(record, leave, stall, resume)
        if upload is not None:
            beside.append(partial(visit.guarded, partial(_upload, upload, visit)))
        try:
            async with (
                over.backend.running(_together(beside)),
                over.backend.running(visit.run(app), record, patience.cancelled) as running,
            ):
                try:
                    yield visit
                    await _until_over(visit, running, patience)
                except NeverCame as exc:
                    await running.ended.wait()
                    visit.judge(running.error)
                    exc.add_note("\n".join(map(str, visit.faults)))
                    raise
                except BaseException:
                    record.listening = False
                    visit.leave()
                    raise
            if running.forced:
                visit.blame("went on", f"it was cancelled, and not over {patience.cancelled:g} s later")
            elif record.listening:
                visit.judge(running.error)
            await settle(record)
            record.look()
            for what in not_returned():
                record.blame("not returned", what)
        finally:
            record.listening = False
            visit.over = True
            await _end_tasks(over.backend, record, patience.cancelled)
    visit.raise_failure()


async def _together(functions: list[Callable[[], Coroutine[Any, Any, None]]]) -> None:
    async with anyio.create_task_group() as group:
        for function in functions:
            group.start_soon(function)


async def _upload(pieces: AsyncIterable[bytes], visit: Visit) -> None:
    async for piece in pieces:
        visit.upload(piece)
    visit.end_upload()


async def _until_over(visit: Visit, running: Running, patience: Patience) -> None:
    began = anyio.current_time()
    looks = 0
    while True:
        with anyio.move_on_after(POLL):
            await running.ended.wait()
        if running.ended.is_set():
            return
        if visit.left is not None and began < visit.left:
            began, looks = visit.left, 0
        since = anyio.current_time() - began
        looks += 1
        cancels_after = visit.habits.cancels_after
        if visit.left is not None and cancels_after is not None and not visit.cancelled and since > cancels_after:
            running.cancel()
            visit.cancelled = True
        limit, reproach = _limit(visit, patience)
        if since > limit and looks > LOOKS:
            visit.go_on_no_more(f"{reproach.format(since)}, at\n{visit.where}")
            return


def _limit(visit: Visit, patience: Patience) -> tuple[float, str]:
    """How long it may go on, and what to say if it does."""
    if visit.left is None:
        return patience.whole, "its client stayed, and it was not over after {:.1f} s"
    if visit.was_told():
        return patience.cleanup, "it knew that its client had left {:.1f} s ago"
    return patience.untold, "nobody told it that its client had left"


async def _end_tasks(backend: Backend, record: Record, patience: float) -> None:
    """Nothing that a visit has left is to go on in the next test."""
    tasks = record.tasks()
    if not tasks or not all(map(backend.cancel, tasks)):
        return
    with anyio.CancelScope(shield=True):
        await settle(record)
        with anyio.move_on_after(patience):
            while record.tasks():
                await anyio.sleep(POLL)
        while tasks := record.tasks():
            record.dropped = True
            for task in tasks:
                backend.wake(task)
            await anyio.sleep(POLL)
