"""What Granian imports over RSGI when the application is served without a probe."""

from __future__ import annotations

import os

from ..rsgi import RSGI
from ._probe import APP, load

application = RSGI(load(os.environ[APP]))
