"""The tests with the oldest versions that pyproject.toml promises, which scripts/lower.txt pins.

Not every test on every server: scripts/plugin/one_server.py says which, and why. Arguments go to pytest.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import suites
from suites import CONSTRAINTS, PLUGIN, PYPROJECT, ROOT

PINS = ROOT / "scripts" / "lower.txt"
# An old Starlette's TestClient under an AnyIO of today; everywhere else a warning is an error, as in `make test`.
TEST_CLIENT = "ignore:The anyio.abc.BlockingPortal alias is deprecated:DeprecationWarning"


def main() -> int:
    check_promises()
    venv = suites.install(".venv-lower", PINS, newest(), "[sse,redis,testing]")
    command = [str(venv / "bin" / "python"), "-m", "pytest", "-p", "no:cacheprovider", "-p", "one_server"]
    command += ["-W", TEST_CLIENT, *sys.argv[1:]]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(PLUGIN)}).returncode


def check_promises() -> None:
    """The lower bounds of pyproject.toml are what is tested here."""
    pins = versions(PINS.read_text(), "==")
    for package, promised in versions(PYPROJECT.read_text(), ">=").items():
        if package in pins and (pins[package] + ".0.0").split(".")[:3] != (promised + ".0.0").split(".")[:3]:
            sys.exit(f"{PYPROJECT.name} promises {package}>={promised}, {PINS.name} tests {pins[package]}")


def versions(text: str, operator: str) -> dict[str, str]:
    return {name.lower(): version for name, version in re.findall(rf"([\w-]+){operator}([\w.]+)", text)}


def newest() -> str:
    """The constraints for what is not pinned to an old version."""
    pinned = versions(PINS.read_text(), "==")
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if line.split("==")[0].lower() not in pinned]
    return "\n".join(line for line in lines if not line.startswith("pydantic_core=="))  # it goes with pydantic


if __name__ == "__main__":
    sys.exit(main())
