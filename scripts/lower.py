"""The tests with the oldest versions that pyproject.toml promises, which scripts/lower.txt pins."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv-lower"
PINS = ROOT / "scripts" / "lower.txt"
CONSTRAINTS = ROOT / "constraints.txt"
PYPROJECT = ROOT / "pyproject.toml"
# An old Starlette's TestClient under an AnyIO of today; everywhere else a warning is an error, as in `make test`.
TEST_CLIENT = "ignore:The anyio.abc.BlockingPortal alias is deprecated:DeprecationWarning"


def main() -> int:
    check_promises()
    install()
    command = [str(VENV / "bin" / "python"), "-m", "pytest", "-p", "no:cacheprovider", "-W", TEST_CLIENT, *sys.argv[1:]]
    return subprocess.run(command, cwd=ROOT).returncode


def check_promises() -> None:
    """The lower bounds of pyproject.toml are what is tested here."""
    pins = versions(PINS.read_text(), "==")
    for package, promised in versions(PYPROJECT.read_text(), ">=").items():
        if package in pins and (pins[package] + ".0.0").split(".")[:3] != (promised + ".0.0").split(".")[:3]:
            sys.exit(f"{PYPROJECT.name} promises {package}>={promised}, {PINS.name} tests {pins[package]}")


def versions(text: str, operator: str) -> dict[str, str]:
    return {name.lower(): version for name, version in re.findall(rf"([\w-]+){operator}([\w.]+)", text)}


def install() -> None:
    pinned = versions(PINS.read_text(), "==")
    newest = [line for line in CONSTRAINTS.read_text().splitlines() if line.split("==")[0].lower() not in pinned]
    newest = [line for line in newest if not line.startswith("pydantic_core==")]  # it goes with pydantic
    wanted = hashlib.sha256(PINS.read_bytes() + PYPROJECT.read_bytes() + "\n".join(newest).encode()).hexdigest()
    stamp = VENV / ".installed"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    venv.create(VENV, with_pip=True, clear=True)
    constraints = VENV / "constraints.txt"
    constraints.write_text("\n".join(newest))
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["-e", f"{ROOT}[sse,redis,testing]", "-r", str(PINS), "-c", str(constraints)]
    subprocess.run(command, check=True)
    stamp.write_text(wanted)


if __name__ == "__main__":
    sys.exit(main())
