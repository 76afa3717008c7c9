"""A listening socket whose connections notice that the network has gone silent.

A client whose link goes down sends no FIN. Two clocks of TCP can tell, and neither is enough alone: while sent data
waits to be acknowledged, no keep-alive goes out, and on an idle connection nothing waits to be acknowledged. So we
set both. Data may be sent just before the first clock would have run out, which starts the second one: each may
take half of the time. Accepted sockets inherit both from the listening one; no server then touches them.

``python -m fastapi_cancel.listening 0.0.0.0:8000 -- uvicorn app:app --fd {fd}`` has a server listen on one.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import sys
from collections.abc import Sequence

SHORTEST, LONGEST = 3, 24 * 60 * 60  # seconds; keep-alive counts whole ones and needs two of them

_PLATFORM: str = sys.platform
_PLATFORMS: dict[str, tuple[str, str | None]] = {
    "linux": ("TCP_KEEPIDLE", "TCP_USER_TIMEOUT"),
    "darwin": ("TCP_KEEPALIVE", "TCP_RXT_CONNDROPTIME"),
    "win32": ("TCP_KEEPIDLE", "TCP_MAXRT"),
    "freebsd": ("TCP_KEEPIDLE", None),  # its keep-alive goes on while data waits to be acknowledged
}
"""What bounds the idle time, and what the time of data that is not acknowledged."""
_UNNAMED = {"TCP_RXT_CONNDROPTIME": 0x80, "TCP_MAXRT": 5}  # what Python's socket module has no name for

Option = tuple[str, int, int, int]
"""Name, level, number, value."""


def listening_socket(
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    silence: float = 30.0,
    backlog: int = 2048,
    reuse_port: bool = False,
) -> socket.socket:
    """A listening TCP socket whose connections end at most ``silence`` seconds after their peer was last heard of.

    To be handed to a server: see ``docs/silent-networks.md`` for uvicorn, Hypercorn and gunicorn. An outage of less
    than about 0.4 x ``silence`` does no harm. A client that is there, but has not read for as long what waits for it,
    is cut off as well: that is what ``TCP_USER_TIMEOUT`` means on Linux (tcp(7)).

    :param host: an address; a name, of which an IPv4 address is preferred; ``"::"`` takes IPv4 too where the system
        can, and so does ``""``, which is ``"0.0.0.0"`` where there is no IPv6
    :param port: 0 for a free one
    :param silence: seconds, from 3 to 86400
    :param backlog: how many connections may wait to be accepted; a server may set its own
    :param reuse_port: let other sockets, also of other processes, listen on the same port
    :raises ValueError: ``silence`` or ``port`` is out of range, or ``reuse_port`` unknown to this platform
    :raises NotImplementedError: this platform has no such options, or accepted sockets do not inherit them
    :raises OSError: the address cannot be had
    """
    if not 0 <= port <= 65535:  # getaddrinfo() would take it modulo 65536
        raise ValueError(f"port must be from 0 to 65535, not {port!r}")
    if reuse_port and not hasattr(socket, "SO_REUSEPORT"):
        raise ValueError(f"reuse_port must be False: {_PLATFORM} has no SO_REUSEPORT")
    family, address = _resolve(host, port)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        limit_silence(sock, silence)
        if os.name == "posix":  # elsewhere it would let others take the port over
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6 and socket.has_dualstack_ipv6():
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # asyncio does it too, but takes a socket that came as a file descriptor for another kind (uvicorn --fd).
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.bind(address)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def limit_silence(sock: socket.socket, silence: float = 30.0) -> None:
    """Have the connections that ``sock`` accepts from now on end as those of :func:`listening_socket`.

    For a listening TCP socket that somebody else has made, such as gunicorn or systemd.

    :param silence: seconds, from 3 to 86400
    :raises ValueError: ``silence`` is out of range
    :raises NotImplementedError: this platform has no such options, or accepted sockets do not inherit them
    """
    options = _options(silence)
    if _PLATFORM != "linux":  # where our tests say that they do
        _check_inheritance(options)
    _set(sock, options)


def _options(silence: float) -> list[Option]:
    if not SHORTEST <= silence <= LONGEST:
        raise ValueError(f"silence must be from {SHORTEST} to {LONGEST} seconds, not {silence!r}")
    platform = next((platform for platform in _PLATFORMS if _PLATFORM.startswith(platform)), None)
    if platform is None:
        raise NotImplementedError(f"no way is known to bound the silence of a TCP connection on {_PLATFORM}")
    idle_name, unacknowledged_name = _PLATFORMS[platform]
    idle, interval, count, unacknowledged = _figures(silence)
    tcp = [(idle_name, idle), ("TCP_KEEPINTVL", interval), ("TCP_KEEPCNT", count)]
    if unacknowledged_name == "TCP_USER_TIMEOUT":
        tcp.append((unacknowledged_name, int(unacknowledged * 1000)))
    elif unacknowledged_name is not None:
        tcp.append((unacknowledged_name, math.ceil(unacknowledged)))
    options = [("SO_KEEPALIVE", socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    for name, value in tcp:
        number = _UNNAMED.get(name, getattr(socket, name, None))
        if number is None:
            raise NotImplementedError(f"this Python knows no {name} on {_PLATFORM}")
        options.append((name, socket.IPPROTO_TCP, number, value))
    return options


def _figures(silence: float) -> tuple[int, int, int, float]:
    """Keep-alive's idle time, interval and count, and how long data may go unacknowledged; all in seconds.

    An eighth is kept for the first retransmission and for Linux' timers, which are late by up to that.
    """
    time = silence * 7 / 8
    probing = max(2, int(time / 2))  # from the peer's last word to the end of an idle connection
    count = min(3, probing - 1)
    interval = max(1, probing // 6)
    # With TCP_USER_TIMEOUT, Linux ends an idle connection at the first probe due after that time, whatever the count.
    return probing - count * interval, interval, count, min(probing, time - probing)


def _set(sock: socket.socket, options: list[Option]) -> None:
    for name, level, number, value in options:
        try:
            sock.setsockopt(level, number, value)
        except OSError as exc:
            raise NotImplementedError(f"{name} cannot be set to {value}: {exc}") from exc


def _check_inheritance(options: list[Option]) -> None:
    """macOS hands on some of them, but not the idle time (its ``tcp_input.c``): such a bound would hold nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        _set(listener, options)
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
            lost = [name for name, level, number, value in options if not _has(accepted, name, level, number, value)]
    if lost:
        raise NotImplementedError(f"on {_PLATFORM}, accepted sockets do not inherit {', '.join(lost)}")


def _has(sock: socket.socket, name: str, level: int, number: int, value: int) -> bool:
    found = sock.getsockopt(level, number)
    return bool(found) if name == "SO_KEEPALIVE" else found == value


def _resolve(host: str, port: int) -> tuple[int, tuple[object, ...]]:
    if host == "":
        host = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
    return family, address


def main(arguments: Sequence[str] | None = None) -> None:
    """Become a server that listens on such a socket."""
    parser = argparse.ArgumentParser(
        prog="python -m fastapi_cancel.listening",
        usage="%(prog)s [options] HOST:PORT -- COMMAND ... {fd} ...",
        description="Run a server on a socket whose connections notice a silent network. In its command, {fd} stands"
        " for the socket's file descriptor.",
    )
    parser.add_argument("--silence", type=float, default=30.0, metavar="SECONDS", help="30 by default")
    parser.add_argument("--backlog", type=int, default=2048, help="2048 by default")
    parser.add_argument("--reuse-port", action="store_true")
    parser.add_argument("address", metavar="HOST:PORT", help="such as 0.0.0.0:8000, [::]:8000 or :8000")
    parser.add_argument("command", nargs="+")
    given = parser.parse_args(arguments)
    host, _, port = given.address.rpartition(":")
    if not port.isdecimal():
        parser.error(f"HOST:PORT must end with a port, as in 0.0.0.0:8000, not {given.address!r}")
    if not any("{fd}" in part for part in given.command):
        parser.error("the command must say where the socket's file descriptor goes: {fd}")
    more = {"silence": given.silence, "backlog": given.backlog, "reuse_port": given.reuse_port}
    try:
        sock = listening_socket(host.strip("[]"), int(port), **more)
    except (OSError, ValueError, NotImplementedError) as exc:
        parser.error(f"{given.address}: {exc}")
    with sock:
        sock.set_inheritable(True)
        command = [part.replace("{fd}", str(sock.fileno())) for part in given.command]
        try:
            os.execvp(command[0], command)
        except OSError as exc:
            parser.error(f"{command[0]}: {exc.strerror}")


if __name__ == "__main__":
    main()
