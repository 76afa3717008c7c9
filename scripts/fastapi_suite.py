"""FastAPI's own tests, with and without ``CancellableRoute`` as the default route class: no new failure.

Four runs, two at a time: either route class, with ``TestClient`` on asyncio (its own default) and on Trio. In each of
them the tests that FastAPI marks with ``anyio`` run on both backends. Nothing is deselected: what fails on an
``APIRoute`` too is counted as such.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import venv
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / ".build"
VENV = ROOT / ".venv-fastapi"
CONSTRAINTS = ROOT / "constraints.txt"
REQUIREMENTS = ROOT / "scripts" / "fastapi_suite.txt"
PLUGIN = ROOT / "scripts" / "plugin"  # on the path, where scripts/ itself would hide the standard library's `test`
BACKENDS = ["asyncio", "trio"]
PLAUSIBLE = 2000  # tests and requests: fewer would mean that something did not run at all
MAX_FAILURES = 50  # then a run stops: FastAPI itself has a handful, and tracebacks are slow
AT_A_TIME = 2


@dataclass
class Run:
    """One run of the suite: the ids of its tests by outcome, and how many requests each backend handled."""

    name: str
    backend: str
    exit_code: int
    seconds: float
    passed: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: set[str] = field(default_factory=set)
    requests: dict[str, int] = field(default_factory=dict)

    def read(self, report: Path) -> None:
        suite = ET.parse(report).getroot()
        for case in suite.iter("testcase"):
            test = f"{case.get('classname')}::{case.get('name')}"
            problem = next((each for each in case if each.tag in ("failure", "error")), None)
            if problem is not None:
                self.failed[test] = (problem.get("message") or "").partition("\n")[0]
            elif case.find("skipped") is not None:
                self.skipped.add(test)
            else:
                self.passed.add(test)
        for each in suite.iter("property"):
            self.requests[(each.get("name") or "").removeprefix("requests on ")] = int(each.get("value") or 0)

    def tests(self) -> set[str]:
        return self.passed | self.skipped | set(self.failed)

    def parametrized(self, backend: str) -> int:
        """Passed tests that FastAPI itself runs on ``backend``."""
        return sum(re.search(rf"\[(.*-)?{backend}[-\]]", test) is not None for test in self.passed)

    def complaints(self) -> list[str]:
        """Why this run proves nothing."""
        ran = len(self.passed) + len(self.failed)
        found = [f"pytest ended with exit code {self.exit_code}"] if self.exit_code not in (0, 1) else []
        if len(self.failed) >= MAX_FAILURES:
            found.append(f"stopped after {len(self.failed)} failures")
        elif ran < PLAUSIBLE:
            found.append(f"only {ran} tests ran")
        if self.requests.get(self.backend, 0) < PLAUSIBLE:
            found.append(f"only {self.requests.get(self.backend, 0)} requests on {self.backend} were counted")
        found += [f"no test ran on {backend}" for backend in BACKENDS if not self.parametrized(backend)]
        return [f"{self.name}: {each}" for each in found]

    def line(self) -> str:
        counts = [len(self.passed), len(self.failed), len(self.skipped)]
        counts += [number for each in BACKENDS for number in (self.requests.get(each, 0), self.parametrized(each))]
        return f"{self.name:30}" + "".join(f"{count:>9}" for count in counts) + f"{self.seconds:>8.0f} s"


HEAD = f"{'':30}" + "".join(
    f"{title:>9}" for title in ["passed", "failed", "skipped", "asyncio:", "tests", "trio:", "tests"]
)


def main() -> int:
    BUILD.mkdir(exist_ok=True)
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        installing = pool.submit(install)
        archive = download(pinned("fastapi"))
        installing.result()
        order = [(route, backend) for backend in BACKENDS for route in ("APIRoute", "CancellableRoute")]
        runs = list(pool.map(lambda each: run(archive, *each), order))
    print(HEAD)
    for each in runs:
        print(each.line())
    problems = [complaint for each in runs for complaint in each.complaints()]
    for plain, cancellable in zip(runs[::2], runs[1::2], strict=True):
        problems += compare(plain, cancellable)
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problems" if problems else "no new failure")
    return 1 if problems else 0


def compare(plain: Run, cancellable: Run) -> list[str]:
    """What is worse with ``CancellableRoute``: failures, and tests that do not run any more."""
    worse = {test: reason for test, reason in cancellable.failed.items() if test not in plain.failed}
    lost = (plain.tests() - cancellable.tests()) | (plain.passed & cancellable.skipped)
    if len(cancellable.failed) >= MAX_FAILURES:
        lost.clear()
    return [f"{cancellable.name}: FAILED {test}: {reason}" for test, reason in sorted(worse.items())] + [
        f"{cancellable.name}: not run: {test}" for test in sorted(lost)
    ]


def pinned(package: str) -> str:
    """The version in constraints.txt."""
    found = re.search(rf"(?m)^{package}==(\S+)$", CONSTRAINTS.read_text())
    assert found is not None, f"{package} is not pinned in {CONSTRAINTS.name}"
    return found[1]


def install() -> None:
    """A virtualenv of its own, since the suite needs much that we do not."""
    stamp = VENV / ".installed"
    wanted = digest(REQUIREMENTS, CONSTRAINTS, ROOT / "pyproject.toml")
    if stamp.exists() and stamp.read_text() == wanted:
        return
    venv.create(VENV, with_pip=True, clear=True)
    pip = [str(VENV / "bin" / "python"), "-m", "pip"]
    quiet = ["--quiet", "--disable-pip-version-check"]
    command = [*pip, "install", *quiet, "-e", str(ROOT), "-r", str(REQUIREMENTS), "-c", str(CONSTRAINTS)]
    subprocess.run(command, check=True)
    stamp.write_text(wanted)


def download(version: str) -> Path:
    """FastAPI's source distribution: the wheel has no tests."""
    archive = BUILD / f"fastapi-{version}.tar.gz"
    if not archive.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--no-binary", "fastapi", "--dest", str(BUILD), f"fastapi=={version}"]
        subprocess.run(command, check=True)
    return archive


def unpack(archive: Path, folder: Path) -> Path:
    """A fresh tree for each run: the tests write files there (log.txt, database.db)."""
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def run(archive: Path, route: str, backend: str) -> Run:
    """Run the suite. Without ``CancellableRoute`` the result depends on nothing of ours: it is kept."""
    name = f"{route}, {backend}"
    report = BUILD / f"suite-{route}-{backend}.xml"
    if route == "APIRoute":
        version = digest(CONSTRAINTS, REQUIREMENTS, *PLUGIN.glob("*.py"), extra=f"{sys.version} {archive.name}")
        report = report.with_stem(f"{report.stem}-{version}")
        if report.exists():
            kept = Run(f"{name} (kept)", backend, exit_code=0, seconds=0)
            kept.read(report)
            return kept
    unfinished = report.with_suffix(".part")
    unfinished.unlink(missing_ok=True)
    command = [str(VENV / "bin" / "pytest"), "-p", "default_route", "-p", "no:cacheprovider", "--tb=short", "-q"]
    command += [f"--maxfail={MAX_FAILURES}", f"--junit-xml={unfinished}"]
    command += [f"--route={route}", f"--test-client-backend={backend}", "tests"]
    path = os.pathsep.join([str(PLUGIN), "docs_src"])  # docs_src: as FastAPI's own scripts/test.sh has it
    suite = unpack(archive, report.with_suffix(""))
    started = time.monotonic()
    with report.with_suffix(".log").open("w") as log:
        environment = {**os.environ, "PYTHONPATH": path}
        process = subprocess.run(command, cwd=suite, env=environment, stdout=log, stderr=subprocess.STDOUT)
    result = Run(name, backend, process.returncode, time.monotonic() - started)
    if unfinished.exists():
        result.read(unfinished)
    else:
        print(report.with_suffix(".log").read_text()[-4000:])
    if not result.complaints():
        unfinished.replace(report)
    return result


def digest(*files: Path, extra: str = "") -> str:
    return hashlib.sha256(extra.encode() + b"".join(each.read_bytes() for each in sorted(files))).hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main())
