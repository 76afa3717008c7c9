"""Whatever the other servers serve, for Granian's RSGI interface. ``APP``: the application, as uvicorn is told it."""

from __future__ import annotations

import os
from importlib import import_module

from fastapi_cancel.rsgi import RSGI

module, _, name = os.environ.get("APP", "tests.app:app").partition(":")
application = RSGI(getattr(import_module(module), name))
