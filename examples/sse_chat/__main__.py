"""``python -m examples.sse_chat``: start the chat room and say where it is."""

from __future__ import annotations

import argparse
import asyncio
import socket
from types import FrameType

import uvicorn

from .app import app


class Server(uvicorn.Server):
    """uvicorn, which waits for its connections when it stops; the streams are ended by the library."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for each in sockets or []:
            print(f"The chat room is open at http://127.0.0.1:{each.getsockname()[1]} (Ctrl-C closes it)", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(0.5, self._cut_off)
        await super().shutdown(sockets)

    def _cut_off(self) -> None:
        # Whoever does not read would keep uvicorn waiting.
        for connection in self.server_state.connections:
            connection.transport.abort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not the inherited one: it has the signal raised again after the shutdown, which is not exit code 0.
        self.force_exit = self.should_exit
        self.should_exit = True


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.sse_chat", description="A chat room in the browser.")
    parser.add_argument("--port", type=int, default=0, help="the port to listen on (a free one)")
    port = parser.parse_args().port
    try:
        listener = socket.create_server(("127.0.0.1", port))
    except (OSError, OverflowError) as exc:
        parser.error(f"cannot listen on port {port}: {exc}")
    Server(uvicorn.Config(app, log_level="warning")).run([listener])


if __name__ == "__main__":
    main()
