"""What the server of a LiveServer imports: the application under test, behind its probe."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from ._probe import APP, TOKEN, VISITS, Probe, load
from .recorder import Recorder

app = Probe(Recorder(load(os.environ[APP]), os.environ[VISITS]), os.environ[TOKEN])


def __getattr__(name: str) -> Any:
    if name != "rsgi_application":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("fastapi_cancel.rsgi").RSGI(app)  # only Granian asks for it
