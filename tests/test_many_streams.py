"""10,000 idle event streams over real sockets, dropped at once."""

from __future__ import annotations

from fastapi_cancel.testing.live import LiveServer

from .crowd import many_files, measure

COUNT = 10_000
HEARTBEAT = 5.0  # seconds


def test_ten_thousand_clients_drop_at_once() -> None:
    """C7, C11, C20: all have had a heartbeat; every awaiting cleanup runs to its end; nothing is left or logged."""
    with many_files(COUNT), LiveServer("tests.sse_app:app", probe=False) as server:

        def cleaned() -> float:
            at: float = server.wait_for("/plain/crowd/cleaned", cleaned=COUNT)["at"]
            return at

        path = f"/route/crowd/stream?heartbeat={HEARTBEAT}"
        print(measure(server.port, server.pid, path, COUNT, HEARTBEAT, 2, cleaned))
        state = server.wait_for("/stats", running=0, tasks=[])
        assert (state["started"], state["cleaned"]) == (COUNT, COUNT)
        assert server.complaints() == []
