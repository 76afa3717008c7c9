"""What the servers are like, where they differ in what an application can notice.

Measured: docs/servers.md has the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EXTENSIONS = frozenset({"http.response.trailers", "http.response.pathsend"})


@dataclass(frozen=True, kw_only=True)
class Habits:
    """How a server treats an application whose client leaves.

    :param spec_version: of ASGI, as it says; ``None``: it says nothing
    :param again: whether ``receive`` says http.disconnect every time, or once and then waits for ever
    :param raises: whether ``send`` raises :class:`OSError` once the client has left (ASGI 2.4 says so), or drops
        silently
    :param after_completion: whether ``receive`` says http.disconnect once the response is complete, or waits
    :param cancels_after: seconds from the client's leaving until the server cancels the application; ``None``: never
    :param whole_body: whether the application is only started when the body is complete
    :param back_pressure: whether ``send`` waits for a client that does not read
    :param yields: whether ``send`` lets the event loop turn
    :param extensions: of ASGI that it offers: ``"http.response.trailers"``, ``"http.response.pathsend"``
    """

    spec_version: str | None = "2.3"
    again: bool = True
    raises: bool = False
    after_completion: Literal["http.disconnect", "waits"] = "http.disconnect"
    cancels_after: float | None = None
    whole_body: bool = False
    back_pressure: bool = True
    yields: bool = False
    extensions: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.cancels_after is not None and not self.cancels_after >= 0:
            raise ValueError(f"cancels_after: seconds (>= 0) or None, not {self.cancels_after!r}")
        if self.after_completion not in ("http.disconnect", "waits"):
            raise ValueError(f"after_completion: 'http.disconnect' or 'waits', not {self.after_completion!r}")
        if wrong := sorted(self.extensions - EXTENSIONS):
            raise ValueError(f"extensions: some of {', '.join(sorted(EXTENSIONS))}, not {', '.join(wrong)}")


SERVERS: dict[str, Habits] = {
    "uvicorn": Habits(),
    "gunicorn": Habits(spec_version="2.4", after_completion="waits", cancels_after=3),
    "hypercorn": Habits(spec_version="2.1", again=False),
    "granian": Habits(extensions=frozenset({"http.response.pathsend"})),
    "daphne": Habits(spec_version=None, again=False, cancels_after=10, whole_body=True, back_pressure=False),
    "asgi": Habits(spec_version="2.4", raises=True),
}
"""By name. ``asgi`` is the server that ASGI 2.4 describes; there is none."""


def habits_of(server: str | Habits) -> Habits:
    """Those of a server, by its name.

    :raises ValueError: there is no such name
    """
    if isinstance(server, Habits):
        return server
    try:
        return SERVERS[server]
    except KeyError:
        raise ValueError(f"server: one of {', '.join(SERVERS)}, or Habits, not {server!r}") from None
