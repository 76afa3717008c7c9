"""The same look at code that is not behind a request."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from .faults import fail_on
from .pools import checked, in_use, name
from .records import CURRENT, Record
from .visit import settle
from .watching import watch


@asynccontextmanager
async def nothing_left(pools: Sequence[Any] = ()) -> AsyncIterator[Record]:
    """Fail if the block leaves a task, an open asynchronous generator or a borrowed connection, or logs a warning::

        async with nothing_left():
            await consumer.run_for(seconds=1)

    A block that raises is not judged.

    :param pools: as :class:`.client.LeavingClient` takes them
    :raises AssertionError: names what is left, where it was created and where it waits
    """
    counted = [(pool, in_use(pool)) for pool in checked(pools)]
    with watch().record() as record:
        token = CURRENT.set(record)
        try:
            yield record
        finally:
            CURRENT.reset(token)
        await settle(record)
        record.look()
        for pool, before in counted:
            if (more := in_use(pool) - before) > 0:
                record.blame("not returned", f"{more} of {name(pool)}")
    __tracebackhide__ = True
    fail_on(record.faults, "this block")
