"""Tests in a virtualenv of their own: another project's with our classes, or ours with other versions."""

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
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / ".build"
CONSTRAINTS = ROOT / "constraints.txt"
PYPROJECT = ROOT / "pyproject.toml"
PLUGIN = ROOT / "scripts" / "plugin"  # on the path, where scripts/ itself would hide the standard library's `test`
PIP = ["-m", "pip", "--quiet", "--disable-pip-version-check"]


def install(name: str, requirements: Path, constraints: str, extras: str = "") -> Path:
    """A virtualenv with this project and ``requirements``, made anew when one of them has changed.

    :param constraints: the text of a constraints file
    :param extras: those of this project, in brackets
    """
    folder = ROOT / name
    stamp = folder / ".installed"
    wanted = digest(requirements, PYPROJECT, extra=constraints)
    if stamp.exists() and stamp.read_text() == wanted:
        return folder
    venv.create(folder, with_pip=True, clear=True)
    limits = folder / "constraints.txt"
    limits.write_text(constraints)
    command = [str(folder / "bin" / "python"), *PIP, "install"]
    command += ["-e", f"{ROOT}{extras}", "-r", str(requirements), "-c", str(limits)]
    subprocess.run(command, check=True)
    stamp.write_text(wanted)
    return folder


def pinned(package: str) -> str:
    """The version in constraints.txt."""
    found = re.search(rf"(?m)^{package}==(\S+)$", CONSTRAINTS.read_text())
    assert found is not None, f"{package} is not pinned in {CONSTRAINTS.name}"
    return found[1]


def download(package: str) -> Path:
    """The source distribution of the pinned version: a wheel has no tests."""
    BUILD.mkdir(exist_ok=True)
    version = pinned(package)
    archive = BUILD / f"{package.replace('-', '_')}-{version}.tar.gz"
    if not archive.exists():
        command = [sys.executable, *PIP, "download", "--no-deps", "--no-binary", package, "--dest", str(BUILD)]
        subprocess.run([*command, f"{package}=={version}"], check=True)
    return archive


def unpack(archive: Path, folder: Path) -> Path:
    """A fresh tree for each run: tests write files there (log.txt, database.db)."""
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@dataclass
class Run:
    """One run of a suite: the ids of its tests by outcome, with the reasons, and what its plugin counted."""

    name: str
    exit_code: int = 0
    seconds: float = 0.0
    passed: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=dict)

    def pytest(self, folder: Path, suite: Path, report: Path, *arguments: str, path: str = "") -> None:
        """Run pytest of the virtualenv ``folder`` in the tree ``suite``, and read its report.

        :param path: more for ``PYTHONPATH`` than our plugins
        """
        report.unlink(missing_ok=True)
        command = [str(folder / "bin" / "pytest"), "-p", "no:cacheprovider", "--tb=short", "-q", *arguments]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(PLUGIN), path]))}
        log = report.with_suffix(".log")
        started = time.monotonic()
        with log.open("w") as out:
            process = subprocess.run(
                [*command, f"--junit-xml={report}"], cwd=suite, env=environment, stdout=out, stderr=subprocess.STDOUT
            )
        self.exit_code, self.seconds = process.returncode, time.monotonic() - started
        if report.exists():
            self.read(report)
        else:
            print(log.read_text()[-4000:])

    def read(self, report: Path) -> None:
        suite = ET.parse(report).getroot()
        for case in suite.iter("testcase"):
            test = f"{case.get('classname')}::{case.get('name')}"
            problem = next((each for each in case if each.tag in ("failure", "error", "skipped")), None)
            if problem is None:
                self.passed.add(test)
            else:
                outcome = self.skipped if problem.tag == "skipped" else self.failed
                outcome[test] = (problem.get("message") or "").partition("\n")[0]
        self.counted = {each.get("name", ""): int(each.get("value", 0)) for each in suite.iter("property")}

    def crash(self) -> list[str]:
        """Why pytest did not come to its end, if so."""
        return [f"pytest ended with exit code {self.exit_code}"] if self.exit_code not in (0, 1) else []


def conclude(problems: list[str], otherwise: str) -> int:
    """Print the outcome. The exit code."""
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problems" if problems else otherwise)
    return 1 if problems else 0


def digest(*files: Path, extra: str = "") -> str:
    return hashlib.sha256(extra.encode() + b"".join(each.read_bytes() for each in sorted(files))).hexdigest()[:12]
