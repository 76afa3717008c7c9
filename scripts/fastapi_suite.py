"""FastAPI's own tests, with and without ``CancellableRoute`` as the default route class: no new failure.

Four runs, two at a time: either route class, with ``TestClient`` on asyncio (its own default) and on Trio. In each of
them the tests that FastAPI marks with ``anyio`` run on both backends. Nothing is deselected: what fails on an
``APIRoute`` too is counted as such.
"""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import suites
from suites import BUILD, CONSTRAINTS, PLUGIN, ROOT

REQUIREMENTS = ROOT / "scripts" / "fastapi_suite.txt"
BACKENDS = ["asyncio", "trio"]
PLAUSIBLE = 2000  # tests and requests: fewer would mean that something did not run at all
MAX_FAILURES = 50  # then a run stops: FastAPI itself has a handful, and tracebacks are slow
AT_A_TIME = 2


@dataclass
class Run(suites.Run):
    """One run of the suite; its plugin counts how many requests each backend handled."""

    backend: str = "asyncio"

    def requests(self, backend: str) -> int:
        return self.counted.get(f"requests on {backend}", 0)

    def tests(self) -> set[str]:
        return self.passed | set(self.skipped) | set(self.failed)

    def parametrized(self, backend: str) -> int:
        """Passed tests that FastAPI itself runs on ``backend``."""
        return sum(re.search(rf"\[(.*-)?{backend}[-\]]", test) is not None for test in self.passed)

    def complaints(self) -> list[str]:
        """Why this run proves nothing."""
        ran = len(self.passed) + len(self.failed)
        found = self.crash()
        if len(self.failed) >= MAX_FAILURES:
            found.append(f"stopped after {len(self.failed)} failures")
        elif ran < PLAUSIBLE:
            found.append(f"only {ran} tests ran")
        if self.requests(self.backend) < PLAUSIBLE:
            found.append(f"only {self.requests(self.backend)} requests on {self.backend} were counted")
        found += [f"no test ran on {backend}" for backend in BACKENDS if not self.parametrized(backend)]
        return [f"{self.name}: {each}" for each in found]

    def line(self) -> str:
        counts = [len(self.passed), len(self.failed), len(self.skipped)]
        counts += [number for each in BACKENDS for number in (self.requests(each), self.parametrized(each))]
        return f"{self.name:30}" + "".join(f"{count:>9}" for count in counts) + f"{self.seconds:>8.0f} s"


HEAD = f"{'':30}" + "".join(
    f"{title:>9}" for title in ["passed", "failed", "skipped", "asyncio:", "tests", "trio:", "tests"]
)


def main() -> int:
    venv = suites.install(".venv-fastapi", REQUIREMENTS, CONSTRAINTS.read_text())
    archive = suites.download("fastapi")
    order = [(route, backend) for backend in BACKENDS for route in ("APIRoute", "CancellableRoute")]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        runs = list(pool.map(lambda each: run(venv, archive, *each), order))
    print(HEAD)
    for each in runs:
        print(each.line())
    problems = [complaint for each in runs for complaint in each.complaints()]
    for plain, cancellable in zip(runs[::2], runs[1::2], strict=True):
        problems += compare(plain, cancellable)
    return suites.conclude(problems, "no new failure")


def compare(plain: Run, cancellable: Run) -> list[str]:
    """What is worse with ``CancellableRoute``: failures, and tests that do not run any more."""
    worse = {test: reason for test, reason in cancellable.failed.items() if test not in plain.failed}
    lost = (plain.tests() - cancellable.tests()) | (plain.passed & set(cancellable.skipped))
    if len(cancellable.failed) >= MAX_FAILURES:
        lost.clear()
    return [f"{cancellable.name}: FAILED {test}: {reason}" for test, reason in sorted(worse.items())] + [
        f"{cancellable.name}: not run: {test}" for test in sorted(lost)
    ]


def run(venv: Path, archive: Path, route: str, backend: str) -> Run:
    """Run the suite. Without ``CancellableRoute`` the result depends on nothing of ours: it is kept."""
    result = Run(f"{route}, {backend}", backend=backend)
    report = BUILD / f"suite-{route}-{backend}.xml"
    if route == "APIRoute":
        files = [CONSTRAINTS, REQUIREMENTS, *PLUGIN.glob("*.py")]
        version = suites.digest(*files, extra=f"{sys.version} {archive.name}")
        report = report.with_stem(f"{report.stem}-{version}")
        if report.exists():
            result.name += " (kept)"
            result.read(report)
            return result
    unfinished = report.with_suffix(".part")
    arguments = ["-p", "default_route", f"--maxfail={MAX_FAILURES}"]
    arguments += [f"--route={route}", f"--test-client-backend={backend}", "tests"]
    suite = suites.unpack(archive, report.with_suffix(""))
    result.pytest(venv, suite, unfinished, *arguments, path="docs_src")  # as FastAPI's own scripts/test.sh has it
    if not result.complaints():
        unfinished.replace(report)
    return result


if __name__ == "__main__":
    sys.exit(main())
