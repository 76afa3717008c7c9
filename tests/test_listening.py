"""Sockets that bound the silence of what they accept. The silence itself: ``tests/test_silent_network.py``."""

from __future__ import annotations

import json
import math
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import anyio
import hypercorn.asyncio
import hypercorn.config
import pytest
import uvicorn

from fastapi_cancel import listening
from fastapi_cancel.listening import limit_silence, listening_socket, main

from .live import DEADLINE, ROOT, Client
from .silent_app import NAMES, SERVERS, app

SECONDS = [3, 3.5, 4.5, 5, 7, 10, 29.9, 30, 60, 3600, 86400]


@contextmanager
def accepted(listener: socket.socket) -> Iterator[socket.socket]:
    with socket.create_connection(listener.getsockname()[:2], DEADLINE), listener.accept()[0] as connection:
        yield connection


def options(sock: socket.socket) -> dict[str, int]:
    found = {name: sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in NAMES}
    return {"SO_KEEPALIVE": sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), **found}


HALF_A_MINUTE = {
    "SO_KEEPALIVE": 1,
    "TCP_KEEPIDLE": 7,
    "TCP_KEEPINTVL": 2,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 13_000,
    "TCP_NODELAY": 1,
}


def test_accepted_sockets_inherit_everything() -> None:
    with listening_socket() as listener, accepted(listener) as connection:
        assert options(connection) == HALF_A_MINUTE


def test_socket_of_somebody_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        limit_silence(listener)
        with accepted(listener) as connection:
            assert options(connection) == {**HALF_A_MINUTE, "TCP_NODELAY": 0}


@pytest.mark.parametrize("silence", SECONDS)
def test_both_clocks_one_after_the_other_fit(silence: float) -> None:
    """An idle connection's last probe may be due when data is sent, which then waits to be acknowledged."""
    with listening_socket(silence=silence) as listener:
        found = options(listener)
    idle = found["TCP_KEEPIDLE"] + found["TCP_KEEPCNT"] * found["TCP_KEEPINTVL"]
    unacknowledged = found["TCP_USER_TIMEOUT"] / 1000
    assert idle + unacknowledged <= silence * 7 / 8
    assert unacknowledged <= idle  # else Linux would go on probing
    assert silence < 7 or idle + unacknowledged > silence * 3 / 4  # as patient as may be


@pytest.mark.parametrize("silence", [0, -1, 2.999, 86400.1, math.nan, math.inf])
def test_silence_out_of_range(silence: float) -> None:
    with pytest.raises(ValueError, match=r"^silence must be from 3 to 86400 seconds, not "):
        listening_socket(silence=silence)
    with socket.socket() as sock, pytest.raises(ValueError, match=r"^silence must be from 3"):
        limit_silence(sock, silence)


# -- where it listens ----------------------------------------------------------------------------


def backlog(listener: socket.socket) -> int:
    info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
    (length,) = struct.unpack_from("I", info, 28)  # what `ss -l` shows as Send-Q
    return int(length)


def reaches(listener: socket.socket, address: str) -> bool:
    try:
        with socket.create_connection((address, listener.getsockname()[1]), DEADLINE):
            return True
    except ConnectionRefusedError:
        return False


@pytest.mark.parametrize(
    ("host", "at"),
    [
        ("127.0.0.1", {"127.0.0.1"}),
        ("0.0.0.0", {"127.0.0.1"}),
        ("::1", {"::1"}),
        ("::", {"127.0.0.1", "::1"}),
        ("", {"127.0.0.1", "::1"}),
    ],
)
def test_addresses(host: str, at: set[str]) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    with listening_socket(host) as listener:
        assert {address for address in ("127.0.0.1", "::1") if reaches(listener, address)} == at


def test_name_with_both_kinds_of_address(monkeypatch: pytest.MonkeyPatch) -> None:
    found = socket.getaddrinfo("::1", 0, type=socket.SOCK_STREAM)
    found += socket.getaddrinfo("127.0.0.1", 0, type=socket.SOCK_STREAM)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
    with listening_socket("localhost") as listener:
        assert listener.family == socket.AF_INET


def test_backlog() -> None:
    with listening_socket(backlog=7) as listener:
        assert backlog(listener) == 7


def test_no_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with listening_socket("") as listener:
        assert listener.family == socket.AF_INET
        assert reaches(listener, "127.0.0.1")


def test_ipv6_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a socket cannot take both, ``::`` is left as the system has it."""
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with listening_socket("::") as listener:
        assert listener.family == socket.AF_INET6


def test_port_is_taken() -> None:
    with listening_socket() as listener, pytest.raises(OSError, match="in use"):
        listening_socket(port=listener.getsockname()[1])


def test_port_may_be_shared() -> None:
    with listening_socket(reuse_port=True) as listener:
        port = listener.getsockname()[1]
        with listening_socket(port=port, reuse_port=True) as other:
            assert other.getsockname()[1] == port


def test_port_cannot_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "SO_REUSEPORT")
    with pytest.raises(ValueError, match=r"^reuse_port must be False: "):
        listening_socket(reuse_port=True)


def test_port_soon_free_again_only_where_that_is_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows SO_REUSEADDR would let another process take the port over."""
    with listening_socket() as listener:
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
    monkeypatch.setattr(os, "name", "nt")
    with listening_socket() as listener:
        assert not listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)


# -- other platforms, as far as Linux can play them ----------------------------------------------


def test_platform_without_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "_PLATFORM", "openbsd7")
    with pytest.raises(NotImplementedError, match=r"no way is known .* on openbsd7$"):
        listening_socket()


def test_python_without_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "TCP_KEEPINTVL")
    with pytest.raises(NotImplementedError, match=r"^this Python knows no TCP_KEEPINTVL on linux$"):
        listening_socket()


def test_system_that_refuses_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "_PLATFORM", "win32")
    monkeypatch.setitem(listening._UNNAMED, "TCP_MAXRT", 0x7FFF)
    with pytest.raises(NotImplementedError, match=r"^TCP_MAXRT cannot be set to 13: "):
        listening_socket()


def test_freebsd_needs_keep_alive_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "_PLATFORM", "freebsd14")
    with listening_socket() as listener, accepted(listener) as connection:
        assert options(connection) == {**HALF_A_MINUTE, "TCP_USER_TIMEOUT": 0}


def test_bsd_says_8_for_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "_PLATFORM", "freebsd14")
    getsockopt = socket.socket.getsockopt

    def as_on_bsd(self: socket.socket, level: int, number: int) -> int:
        found = getsockopt(self, level, number)
        return found * 8 if (level, number) == (socket.SOL_SOCKET, socket.SO_KEEPALIVE) else found

    monkeypatch.setattr(socket.socket, "getsockopt", as_on_bsd)
    listening_socket().close()


def test_options_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "_PLATFORM", "win32")
    monkeypatch.setitem(listening._UNNAMED, "TCP_MAXRT", socket.TCP_USER_TIMEOUT)
    with listening_socket(silence=3) as listener:
        assert options(listener)["TCP_USER_TIMEOUT"] == 1  # seconds: rounded up


def test_options_that_are_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS: the idle time of keep-alive stays behind."""
    monkeypatch.setattr(listening, "_PLATFORM", "darwin")
    monkeypatch.setattr(socket, "TCP_KEEPALIVE", socket.TCP_KEEPIDLE, raising=False)
    monkeypatch.setitem(listening._UNNAMED, "TCP_RXT_CONNDROPTIME", socket.TCP_USER_TIMEOUT)
    with listening_socket() as listener, accepted(listener) as connection:
        assert options(connection)["TCP_USER_TIMEOUT"] == 13
    accept = socket.socket.accept

    def forgetful(self: socket.socket) -> tuple[socket.socket, object]:
        connection, address = accept(self)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 7200)
        return connection, address

    monkeypatch.setattr(socket.socket, "accept", forgetful)
    with pytest.raises(NotImplementedError, match=r"^on darwin, accepted sockets do not inherit TCP_KEEPALIVE$"):
        listening_socket()


# -- servers -------------------------------------------------------------------------------------


def ask_for_options(listener: socket.socket) -> dict[str, int]:
    with Client(listener.getsockname()[1]) as client:
        client.request("/options", headers="Connection: close\r\n")
        status, body = client.response()
    assert status == 200
    found: dict[str, int] = json.loads(body)
    return found


@contextmanager
def child(listener: socket.socket, *command: str) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        pass_fds=[listener.fileno()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its workers too
        process.wait(DEADLINE)


@pytest.mark.parametrize("name", SERVERS)
def test_server_keeps_the_options(name: str) -> None:
    with listening_socket() as listener:
        command = [part.replace("{fd}", str(listener.fileno())) for part in SERVERS[name]]
        with child(listener, *command, "tests.silent_app:app"):
            assert ask_for_options(listener) == HALF_A_MINUTE


GUNICORN_CONF = """
from fastapi_cancel.listening import limit_silence

def when_ready(server):
    for listener in server.LISTENERS:
        limit_silence(listener.sock)
"""


def test_gunicorn_by_its_configuration(tmp_path: Path) -> None:
    config = tmp_path / "gunicorn.conf.py"
    config.write_text(GUNICORN_CONF)
    with socket.create_server(("127.0.0.1", 0)) as theirs:
        bind = f"fd://{theirs.fileno()}"
        with child(theirs, "gunicorn", "-k", "asgi", "-c", str(config), "-b", bind, "tests.silent_app:app"):
            # What connects before is accepted with what the socket had then.
            deadline = time.monotonic() + DEADLINE
            while ask_for_options(theirs)["TCP_USER_TIMEOUT"] == 0:
                assert time.monotonic() < deadline
            assert ask_for_options(theirs) == HALF_A_MINUTE


def test_uvicorn_in_process() -> None:
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    with listening_socket() as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            assert ask_for_options(listener) == HALF_A_MINUTE
        finally:
            server.should_exit = True
            thread.join(DEADLINE)


def test_hypercorn_in_process() -> None:
    stop = threading.Event()

    async def stopped() -> None:
        while not stop.is_set():
            await anyio.sleep(0.01)

    with listening_socket() as listener, listener.dup() as handed_over:
        config = hypercorn.config.Config()
        config.errorlog = None
        config.bind = [f"fd://{handed_over.detach()}"]
        serve = partial(hypercorn.asyncio.serve, app, config, shutdown_trigger=stopped)  # type: ignore[arg-type]
        thread = threading.Thread(target=anyio.run, args=(serve,))
        thread.start()
        try:
            assert ask_for_options(listener) == HALF_A_MINUTE
        finally:
            stop.set()
            thread.join(DEADLINE)


# -- the command line ----------------------------------------------------------------------------

SHOW = "import socket, sys; s = socket.socket(fileno=int(sys.argv[1])); print(s.getsockname(), s.getsockopt(6, 18))"


def test_command_gets_the_socket() -> None:
    command = [sys.executable, "-m", "fastapi_cancel.listening", "--silence", "60", "127.0.0.1:0", "--"]
    done = subprocess.run([*command, sys.executable, "-c", SHOW, "{fd}"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("('127.0.0.1', ") and done.stdout.endswith(") 26000\n"), done


class Executed(Exception):
    """Instead of the process becoming another."""


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The command, and after it the descriptor of a copy of the socket."""
    commands: list[str] = []

    def execvp(file: str, command: list[str]) -> None:
        assert file == command[0]
        assert os.get_inheritable(int(command[-1]))
        commands.extend([*command[:-1], str(os.dup(int(command[-1])))])
        raise Executed

    monkeypatch.setattr(os, "execvp", execvp)
    yield commands
    os.close(int(commands[-1]))


@pytest.mark.parametrize(("address", "host"), [("127.0.0.1:0", "127.0.0.1"), ("[::1]:0", "::1")])
def test_addresses_of_the_command_line(executed: list[str], address: str, host: str) -> None:
    with pytest.raises(Executed):
        main([address, "--", "server", "--json", "{}", "--fd", "{fd}"])
    assert executed[:-1] == ["server", "--json", "{}", "--fd"]
    with socket.socket(fileno=os.dup(int(executed[-1]))) as sock:
        assert sock.getsockname()[0] == host


def test_options_of_the_command_line(executed: list[str]) -> None:
    with pytest.raises(Executed):
        main(["--silence", "60", "--reuse-port", "--backlog", "7", "127.0.0.1:0", "--", "server", "{fd}"])
    with socket.socket(fileno=os.dup(int(executed[-1]))) as sock:
        assert options(sock)["TCP_USER_TIMEOUT"] == 26_000
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)
        assert backlog(sock) == 7


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["8000x", "--", "server", "{fd}"], "HOST:PORT must end with a port, as in 0.0.0.0:8000, not '8000x'"),
        (["127.0.0.1:0", "--", "server", "--fd", "3"], "the command must say where the socket's file descriptor goes"),
        (["127.0.0.1:0"], "the following arguments are required: command"),
        (["--silence", "1", "127.0.0.1:0", "--", "server", "{fd}"], "silence must be from 3 to 86400 seconds, not 1.0"),
        (["127.0.0.1:65536", "--", "server", "{fd}"], "port must be from 0 to 65535, not 65536"),
        (["no.such.name.invalid:0", "--", "server", "{fd}"], "no.such.name.invalid:0: "),
        (["127.0.0.1:0", "--", "no-such-server", "{fd}"], "no-such-server: No such file or directory"),
    ],
)
def test_complaints_of_the_command_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 2
    assert complaint in capsys.readouterr().err


def test_runs_as_a_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["listening", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(listening.__file__), run_name="__main__")
    assert "HOST:PORT -- COMMAND ... {fd} ..." in capsys.readouterr().out
