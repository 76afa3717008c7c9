"""From ``stop()`` on one worker to the first line of the cleanup on another."""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack

from fastapi_cancel.testing import LiveServer
from tests.redis_server import RedisServer

from .harness import Row, Section, at_most


def run(quick: bool) -> Section:
    section = Section(
        "Stop anywhere",
        "Two uvicorn processes and a Redis on this machine; one request at a time runs on the one, is stopped from the "
        "other. From the call of `broker.stop` to the first line of the handler's `finally`.",
    )
    milliseconds = sorted(measure(100 if quick else 1000))
    middle, late = statistics.median(milliseconds), milliseconds[int(len(milliseconds) * 0.99)]
    what = f"{len(milliseconds):,} stops"
    section.rows += [Row(what, "the median", f"{middle:.2f} ms"), at_most(what, "the 99th of 100", late, 50, " ms")]
    return section


def measure(stops: int) -> list[float]:
    """Milliseconds."""
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer())
        here, there = (
            stack.enter_context(LiveServer("tests.remote_app:app", env={"REDIS_URL": redis.url}, probe=False))
            for _ in range(2)
        )
        called: dict[str, float] = {}
        for number in range(stops):
            with here.open(f"/jobs/{number}/{number}") as client:
                while here.json("/stats")["begun"] != [str(number)]:
                    time.sleep(0.001)
                called[str(number)] = there.json(f"/stop/{number}")["at"]
                client.response()
        stopped = here.json("/stats")["stopped"]
        return [(stopped[number] - at) * 1000 for number, at in called.items()]
