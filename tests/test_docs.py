"""The documentation: its Python runs as it stands, its links lead somewhere."""

from __future__ import annotations

import re
import runpy
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any

import anyio
import pytest
from fastapi import APIRouter

from fastapi_cancel import CancellableRoute

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md")])
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


class Anything:
    """Stands for what an example does not define."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    async def close(self) -> None: ...


async def release(*args: object) -> None: ...


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_python_in_the_documentation_runs(page: Path, tmp_path: Path) -> None:
    """The blocks of a page in their order, in one module; names that the prose explains are given."""
    run(page, tmp_path)


def test_tests_in_the_documentation_pass(tmp_path: Path) -> None:
    names = run(ROOT / "docs/testing.md", tmp_path)
    tests = [test for name, test in names.items() if name.startswith("test_") and iscoroutinefunction(test)]
    assert len(tests) > 3
    for test in tests:
        anyio.run(test)


def run(page: Path, tmp_path: Path) -> dict[str, Any]:
    given: dict[str, Any] = {
        "router": APIRouter(route_class=CancellableRoute),
        "Document": dict[str, str],
        "Summary": dict[str, str],
        **dict.fromkeys(("model", "rows", "database", "pool", "connection"), Anything()),
        "release": release,
        "feed": lambda **_: iter([]),
    }
    given["pool"].release = release
    given["rows"] = lambda *args: iter([])
    code = "\n\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S))
    script = tmp_path / "page.py"
    script.write_text(code)
    return runpy.run_path(str(script), given)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert link.startswith("http") or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_files_that_the_prose_names_exist(page: Path) -> None:
    for name in re.findall(r"`((?:tests|benchmarks|docs|examples|fastapi_cancel)/[\w/.]+)`", page.read_text()):
        assert (ROOT / name).exists(), name
