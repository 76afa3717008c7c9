"""Under which name another process finds the application."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

TARGET = re.compile(r"[\w.]+:[\w.]+")
MAIN = "__main__"


def target_of(app: object) -> str:
    """``module:attribute`` of an application.

    :param app: one that is an attribute of a module; or its name, which is returned
    :raises ValueError: it has no such name
    """
    if isinstance(app, str):
        if not TARGET.fullmatch(app):
            raise ValueError(f"app: 'module:attribute', or the application itself, not {app!r}")
        return app
    names = sorted(_names(app), key=_less_wanted)
    if not names:
        raise ValueError(
            f"app: the server imports it in a process of its own, so it must be an attribute of a module in a file, "
            f"or be given as 'module:attribute'; {app!r} is in none that has been imported"
        )
    return names[0]


def _names(app: object) -> Iterator[str]:
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType):
            for attribute, value in list(vars(module).items()):
                if value is app and (module_name := _name_of_main(module) if name == MAIN else name):
                    yield f"{module_name}:{attribute}"


def _name_of_main(module: ModuleType) -> str | None:
    """Under which name others can import the program that runs. Its folder is on ``sys.path``."""
    if module.__spec__ is not None:  # python -m
        return module.__spec__.name
    file = Path(getattr(module, "__file__", None) or "")
    return file.stem if file.suffix == ".py" and file.stem.isidentifier() else None


def _less_wanted(name: str) -> bool:
    """Tests that have imported it: they drag more along than the server needs."""
    module = name.partition(":")[0].rpartition(".")[2]
    return module.startswith("test_") or module == "conftest"
