"""The pytest plugin, in runs of pytest of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fastapi_cancel.testing import Fault, LeavingClient, plugin

APP = """
from fastapi import FastAPI

app = FastAPI()

@app.get("/")
async def hello() -> str:
    return "hello"
"""

TESTS = """
import pytest
from served import app

running = []

@pytest.mark.parametrize("number", range(3))
def test_a_real_server(asgi_server, number):
    server = asgi_server(app)
    assert server.get("/") == (200, b'"hello"')
    running.append(server.pid)
    assert server.log == ""

def test_one_for_all_who_ask_for_the_same(asgi_server):
    assert len(set(running)) == 1
    assert asgi_server("served:app", access_log=True).pid not in running
"""

FAILS = """
from fastapi_cancel.testing import Fault

def test_faults():
    assert [Fault("task left", "poll, created at\\n    app.py:7 in feed")] == []
"""

IMPORTS = """
import sys

def test_nothing_was_imported_for_the_plugin():
    assert not {"fastapi", "starlette", "anyio"} & set(sys.modules)
"""


def pytest_run(directory: Path, test: str, *options: str) -> subprocess.CompletedProcess[str]:
    (directory / "served.py").write_text(APP)
    (directory / "test_it.py").write_text(test)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60)


def test_a_fixture_starts_real_servers(tmp_path: Path) -> None:
    run = pytest_run(tmp_path, TESTS)
    assert run.returncode == 0, run.stdout
    assert "4 passed" in run.stdout


def test_faults_are_told_as_they_tell_themselves(tmp_path: Path) -> None:
    run = pytest_run(tmp_path, FAILS)
    assert run.returncode == 1
    assert "1 faults" in run.stdout and "task left: poll, created at\nE " in run.stdout


def test_it_imports_nothing_by_itself(tmp_path: Path) -> None:
    run = pytest_run(tmp_path, IMPORTS, "-p", "no:anyio", "-p", "no:hypothesispytest")
    assert run.returncode == 0, run.stdout


def test_other_comparisons_are_left_alone() -> None:
    fault = Fault("logged", "something")
    assert plugin.pytest_assertrepr_compare("==", [fault], []) == ["1 faults", "logged: something"]
    assert plugin.pytest_assertrepr_compare("==", [fault], [fault]) is None
    assert plugin.pytest_assertrepr_compare("!=", [fault], []) is None
    assert plugin.pytest_assertrepr_compare("==", ["other"], []) is None
    assert plugin.pytest_assertrepr_compare("==", [], []) is None


def test_the_kit_offers_its_names_one_by_one() -> None:
    import fastapi_cancel.testing as kit

    assert kit.LeavingClient is LeavingClient
    assert all(getattr(kit, name) is not None for name in kit.__all__)
    assert not hasattr(kit, "nothing_of_the_kind")
