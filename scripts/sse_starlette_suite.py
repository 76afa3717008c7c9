"""sse-starlette's own tests on ``SSEResponse``: nothing fails but what is listed here, each with its reason.

Two runs at a time: as it is, and with events that are ready sent one by one, as sse-starlette sends them. The second
is for the tests that block a ``send`` and look at what the generator does meanwhile.
"""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import suites
from suites import BUILD, CONSTRAINTS, ROOT

REQUIREMENTS = ROOT / "scripts" / "sse_starlette_suite.txt"
PLAUSIBLE_PASSED, PLAUSIBLE_SERVED = 80, 60  # fewer would mean that something did not run at all
PATIENCE = 300  # seconds; a run takes 45
# The other distributions of sse-starlette have this module; all it does is to name this function.
COMPAT = "from sse_starlette._utils import collapse_excgroups as collapse_excgroups\n"
# A demonstration under examples/, which the distribution lacks.
NOT_THERE = "tests/test_broadcasting_example.py"

# Why a test may fail -> parts of the ids of such tests.
DIFFERENT = {
    "the words of the error are ours; it is a ValueError there too": [
        "test_shutdownGracePeriod_whenNegative_thenRaisesValueError",
        "test_cleanupTimeout_whenNegative_thenRaisesValueError",
    ],
    "content that is no iterable is refused at once: the tests pass 0": ["TestEventSourceResponse::test_pingInterval_"],
    "cleanup_timeout is the policy's by default; the test looks at the default in the signature": [
        "test_cleanupTimeout_whenOmitted_thenDefaultsToFiniteDeadline"
    ],
    "there is no Connection header: HTTP/1.1 needs none, HTTP/2 forbids it": [
        "test_headers_whenCustomHeadersProvided_thenMergesCorrectly"
    ],
    "a debug message for each event is looked at, which we do not write": [
        "test_disconnect_whenClientDisconnects_thenHandlesGracefully"
    ],
    "an OSError of send is a client that left (ASGI 2.4): the end is silent": [
        "test_send_whenInterruptedAndCleanupStuck_thenDeadlineCancelsCleanup[asyncio-send_error]",
        "test_send_whenInterrupted_thenClosesSuspendedGenerator[asyncio-False-send_error]",
        "test_send_whenInterrupted_thenClosesSuspendedGenerator[asyncio-True-send_error]",
    ],
    "a client that does not read ends the stream silently, with the cause `stalled`: there is no SendTimeoutError": [
        "test_send_whenInterruptedAndCleanupStuck_thenDeadlineCancelsCleanup[asyncio-timeout]",
        "test_send_whenInterrupted_thenClosesSuspendedGenerator[asyncio-False-timeout]",
        "test_send_whenInterrupted_thenClosesSuspendedGenerator[asyncio-True-timeout]",
        "test_send_whenTimeoutOccurs_thenRaisesSendTimeoutError",
        "test_ping_whenSendTimesOut_thenTearsDownResponseAndRunsCleanup",
        "test_head_whenSendStallsBeyondSendTimeout_thenRaisesSendTimeoutError",
    ],
    "at a shutdown the end of the response is sent, for which a client has a second; the test gives it less": [
        "test_send_whenInterruptedAndCleanupStuck_thenDeadlineCancelsCleanup[asyncio-shutdown]",
        "test_closingFrame_whenSendStalls_thenInterruptionEndsResponse[asyncio-shutdown]",
        "test_send_whenInterrupted_thenClosesSuspendedGenerator[asyncio-False-shutdown]",
        "test_send_whenInterrupted_thenClosesSuspendedGenerator[asyncio-True-shutdown]",
    ],
    "a send that never returns though the client has left: no server has one": [
        "test_closingFrame_whenSendStalls_thenInterruptionEndsResponse[asyncio-disconnect]"
    ],
    "an event that cannot be sent is raised in the generator and logged, and ends the response as it should": [
        "test_stream_whenEncodingFails_thenClosesSuspendedGenerator",
        "test_stream_whenEncodingFailsAndCleanupStuck_thenDeadlineCancelsCleanup",
    ],
    "the private method of sse-starlette that sends its heartbeats is called, and needs the private lock": [
        "test_ping_whenSendTimesOut_thenRaisesSendTimeoutError",
        "test_ping_whenTimerTicks_thenSendsOneMessagePerTick",
    ],
    "a heartbeat is never sent while an event is: the test wants the two to collide": [
        "test_ping_whenConcurrentWithEvents_thenRespectsLocking"
    ],
}
# Why a test may fail when events that are ready go out together.
AHEAD = {
    "the generator is asked for the next event before the first is sent": [
        "test_send_whenInterruptedAndCleanupStuck_thenDeadlineCancelsCleanup[asyncio-disconnect]",
        "test_send_whenInterruptedAndCleanupStuck_thenDeadlineCancelsCleanup[asyncio-cancel]",
        "test_send_whenCleanupSwallowsDeadlineCancellation_thenStillWarns",
        "test_send_whenCleanupFinishesInTime_thenCompletesWithoutWarning",
        "test_send_whenInterrupted_thenClosesSuspendedGenerator[asyncio-False-disconnect]",
        "test_send_whenInterrupted_thenClosesSuspendedGenerator[asyncio-False-cancel]",
        "test_send_whenInterrupted_thenClosesSuspendedGenerator[asyncio-True-disconnect]",
        "test_send_whenInterrupted_thenClosesSuspendedGenerator[asyncio-True-cancel]",
    ]
}


@dataclass
class Run(suites.Run):
    """One run of the suite; its plugin counts how many responses were served."""

    allowed: dict[str, list[str]] = field(default_factory=dict)

    def problems(self) -> list[str]:
        found = self.crash()
        if len(self.passed) < PLAUSIBLE_PASSED:
            found.append(f"only {len(self.passed)} tests passed")
        if self.served() < PLAUSIBLE_SERVED:
            found.append(f"only {self.served()} responses were served")
        listed = [part for parts in self.allowed.values() for part in parts]
        differ = self.failed | self.skipped
        found += [
            f"FAILED {test}: {reason}"
            for test, reason in sorted(differ.items())
            if not any(part in test for part in listed)
        ]
        found += [f"listed, but does not fail: {part}" for part in listed if not any(part in test for test in differ)]
        return [f"{self.name}: {each}" for each in found]

    def served(self) -> int:
        return self.counted.get("served", 0)

    def line(self) -> str:
        differ = len(self.failed) + len(self.skipped)
        counts = f"{len(self.passed)} passed, {differ} differ, {self.served()} responses"
        return f"{self.name:14}{counts}, {self.seconds:.0f} s"


def main() -> int:
    # Not into the virtualenv of ours: pytest-asyncio would take our own asynchronous tests.
    venv = suites.install(".venv-sse-starlette", REQUIREMENTS, CONSTRAINTS.read_text(), "[sse]")
    archive = suites.download("sse-starlette")
    with ThreadPoolExecutor(2) as pool:
        bursts = pool.submit(run, venv, archive, "yes", "in bursts", DIFFERENT | AHEAD)
        single = pool.submit(run, venv, archive, "no", "one by one", DIFFERENT)
        runs = [bursts.result(), single.result()]
    for each in runs:
        print(each.line())
    return suites.conclude([problem for each in runs for problem in each.problems()], "no unexpected failure")


def run(venv: Path, archive: Path, bursts: str, name: str, allowed: dict[str, list[str]]) -> Run:
    """Twice, if need be. These tests give many things a few tenths of a second: where all processes stood still for up
    to half a second now and then, 1 run of 6 failed. What is wrong fails again."""
    result = run_once(venv, archive, bursts, Run(name, allowed=allowed))
    if problems := result.problems():
        print("Once more, for:", *problems, sep="\n")
        result = run_once(venv, archive, bursts, Run(name, allowed=allowed))
    return result


def run_once(venv: Path, archive: Path, bursts: str, result: Run) -> Run:
    report = BUILD / f"sse-starlette-bursts-{bursts}.xml"
    suite = suites.unpack(archive, report.with_suffix(""))
    shutil.rmtree(suite / "sse_starlette")  # it would hide the one that is installed
    (suite / "tests" / "__init__.py").touch()  # or the name `tests` would be our own
    (suite / "tests" / "anyio_compat.py").write_text(COMPAT)
    arguments = ["-p", "sse_response", f"--timeout={PATIENCE}", f"--ignore={NOT_THERE}", f"--bursts={bursts}"]
    result.pytest(venv, suite, report, *arguments, "tests")
    return result


if __name__ == "__main__":
    sys.exit(main())
