"""The testing kit's servers: how they start, what they say, how they end."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio
import pytest

from fastapi_cancel.rsgi import RSGI
from fastapi_cancel.testing import LeavingClient
from fastapi_cancel.testing import live as live_module
from fastapi_cancel.testing._probe import APP, READY, RUNNING, TOKEN, VISITS, Probe, load
from fastapi_cancel.testing._target import target_of
from fastapi_cancel.testing.live import LiveServer, LiveServerError, free_port
from fastapi_cancel.testing.recorder import Recorder, VisitsFile
from fastapi_cancel.testing.servers import SERVERS, find_server

from . import app as tests_app
from .conftest import DEADLINE, ROOT

APPLICATION = """
import os
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

count = 0

async def state(request):
    global count
    count += 1
    return JSONResponse({"count": count, "pid": os.getpid(), "cwd": os.getcwd(), "name": os.environ.get("NAME")})

async def say(request):
    print(request.query_params["text"])
    return Response()

async def fail(request):
    return Response("not here", 418)

app = Starlette(routes=[Route("/state", state), Route("/say", say), Route("/fail", fail)])
class nested:
    app = app
"""
ONE_OF_EACH = ["uvicorn", "gunicorn", "hypercorn", "granian", "daphne"]
WITH_WORKERS = ["uvicorn", "gunicorn", "gunicorn-uvicorn", "hypercorn", "granian", "granian-rsgi"]
BY_SIGNAL = ["uvicorn", "uvicorn-h11", "uvicorn-uvloop"]  # they raise the signal again when they have ended

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Write:
    """``write(source)``: a module with it that can be imported."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source: str = APPLICATION, name: str = "written_by_a_test") -> str:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        request.addfinalizer(lambda: sys.modules.pop(name, None))
        return name

    return write


def ended(pid: int) -> None:
    """Wait until that process has; who has waited for it does not matter."""
    end = time.monotonic() + DEADLINE
    while (stat := Path(f"/proc/{pid}/stat")).exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end, f"{pid} goes on"


# -- its life ------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", SERVERS)
def test_every_server(server: str, write: Write) -> None:
    """It answers, in its folder and environment; has nothing to complain about; and ends when it is told to."""
    with LiveServer(f"{write()}:app", server, env={"NAME": "value"}) as live:
        state = live.json("/state")
        assert state["count"] == 1  # being ready has cost the application nothing
        assert (state["cwd"], state["name"]) == (os.getcwd(), "value")
        assert live.url == f"http://127.0.0.1:{live.port}"
        assert live.stop() == (-signal.SIGTERM if server in BY_SIGNAL else 0)
        assert live.complaints() == []
    ended(state["pid"])


@pytest.mark.parametrize("server", [*ONE_OF_EACH, "granian-rsgi"])
def test_without_a_probe(server: str, write: Write) -> None:
    """Ready when it answers anything."""
    with LiveServer(f"{write()}:app", server, probe=False) as live:
        assert live.json("/state")["count"] == 1
        assert live.get(READY)[0] == 404


@pytest.mark.parametrize("server", WITH_WORKERS)
def test_all_workers_serve_and_end_with_their_master(server: str, write: Write) -> None:
    with LiveServer(f"{write()}:app", server, workers=2) as live:
        assert SERVERS[server].workers_up(live.log) == 2
        workers = {live.json("/state")["pid"] for _ in range(20)}
        assert live.pid not in workers
        live.stop(signal.SIGKILL)  # which leaves them no time to end theirs
    for pid in workers:
        ended(pid)


@pytest.mark.parametrize("server", ONE_OF_EACH)
def test_a_port_that_is_taken(server: str, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may be faster."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = [free_port(), taken.getsockname()[1]]
        monkeypatch.setattr(live_module, "free_port", ports.pop)
        with LiveServer(f"{write()}:app", server) as live:
            assert live.json("/state")["count"] == 1
            assert "already in use" not in live.log
    assert ports == []


def test_ports_that_are_always_taken(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(live_module, "free_port", lambda: taken.getsockname()[1])
        with pytest.raises(LiveServerError, match=r"(?s)uvicorn did not start.*address already in use"):
            LiveServer(f"{write()}:app").start()


def test_another_server_is_not_taken_for_this_one(write: Write) -> None:
    """Granian shares its port with whoever does so too."""
    with LiveServer(f"{write()}:app", "granian") as one:
        other = LiveServer(f"{write()}:app", "granian")
        other.port = one.port
        assert one._answers()
        assert not other._answers()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("server", ONE_OF_EACH)
def test_an_application_that_cannot_be_imported(server: str, workers: int, write: Write) -> None:
    """At once, with what it says about it."""
    if workers == 2 and server == "daphne":
        return
    target = write("raise ValueError('not today')") + ":app"
    with pytest.raises(
        LiveServerError, match=rf"(?s){server} did not start.*Traceback.*ValueError: not today"
    ) as error:
        LiveServer(target, server, workers=workers, deadline=100).start()
    assert "written_by_a_test.py" in str(error.value)


def test_an_application_that_takes_too_long(write: Write) -> None:
    server = LiveServer(write("import time; print('asleep'); time.sleep(60)") + ":app", deadline=5)
    with pytest.raises(LiveServerError, match=r"uvicorn did not start, or not all of its workers:\nasleep"):
        server.start()
    ended(server.pid)
    assert server.log == "asleep\n"


def test_an_option_that_does_not_exist(write: Write) -> None:
    with pytest.raises(LiveServerError, match="No such option"):
        LiveServer(f"{write()}:app", options=["--no-such-option"]).start()


def test_a_start_that_is_interrupted(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: LiveServer) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(LiveServer, "_answers", interrupt)
    server = LiveServer(f"{write()}:app")
    with pytest.raises(KeyboardInterrupt):
        server.start()
    ended(server.pid)


def test_a_start_that_fails_before_there_is_a_process(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    server = LiveServer(f"{write()}:app")
    with pytest.raises(FileNotFoundError):
        server.start()
    assert not server._log.parent.exists()
    with pytest.raises(RuntimeError, match="the server has not been started"):
        _ = server.pid


def test_a_server_that_does_not_stop(write: Write) -> None:
    source = APPLICATION + "import signal, threading\nprint('deaf')\n"
    server = LiveServer(f"{write(source)}:app")
    server.start()
    server.deadline = 1
    os.kill(server.pid, signal.SIGSTOP)
    with pytest.raises(LiveServerError, match=r"(?s)uvicorn has not ended within 1 s:.*deaf"):
        server.__exit__(None, None, None)
    ended(server.pid)


def test_an_error_in_the_block_is_not_hidden_by_the_end(write: Write) -> None:
    server = LiveServer(f"{write()}:app")

    def fail() -> None:
        os.kill(server.pid, signal.SIGSTOP)  # to wait for its end would take the deadline
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), server:
        fail()
    ended(server.pid)


def test_a_server_that_ends_by_itself(write: Write) -> None:
    with LiveServer(f"{write()}:app", options=["--limit-max-requests", "2"]) as server:
        server.get("/state")
        assert server.wait() == 0
    assert "Maximum request limit" in server.log


def test_a_server_is_started_again(write: Write) -> None:
    server = LiveServer(f"{write()}:app")
    with server:
        server.get("/say?text=one")
    with server:
        assert "one" not in server.log
        assert server.json("/state")["count"] == 1


# -- its log -------------------------------------------------------------------------------------


@pytest.fixture
def server(write: Write) -> Any:
    with LiveServer(f"{write()}:app") as server:
        server.mark()
        yield server


def test_the_log_begins_at_the_mark(server: LiveServer) -> None:
    server.get("/say?text=one")
    assert server.log == "one\n"
    server.mark()
    assert server.log == ""
    server.get("/say?text=two")
    server.wait_for_log("two")
    server.wait_for_log("two", times=1)
    assert server.log == "two\n"


def test_the_log_survives_the_server(write: Write) -> None:
    with LiveServer(f"{write()}:app") as server:
        server.mark()
        server.get("/say?text=one")
    assert server.log.startswith("one\n")
    assert "Finished server process" in server.log
    assert server.complaints() == ["one"]


@pytest.mark.parametrize("connect", ["connect", "open_http2"])
def test_a_server_that_has_ended_by_itself(server: LiveServer, connect: str) -> None:
    server.get("/say?text=last+words")
    server.send_signal(signal.SIGKILL)
    server.process.wait(DEADLINE)
    with pytest.raises(LiveServerError, match=r"uvicorn has ended with -9:\n(?s:.*)last words"):
        getattr(server, connect)()


def test_a_server_where_nobody_listens(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(server, "port", free_port())
        with pytest.raises(ConnectionRefusedError):
            server.connect()


def test_what_is_not_in_the_log(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.get("/say?text=one")
    with monkeypatch.context() as patch:
        patch.setattr(server, "deadline", 0.1)
        with pytest.raises(AssertionError, match=r"'one' is 1 times in the log of uvicorn, not 2:\none\n"):
            server.wait_for_log("one", times=2)


def test_complaints_are_whole_lines(server: LiveServer) -> None:
    server.get("/say?text=one")
    with server._log.open("a") as log:
        log.write("two, without an end")
    assert server.complaints() == ["one"]
    assert server.complaints("^o", "nothing") == []
    server.mark()
    assert server.log == "two, without an end"
    server.stop(signal.SIGKILL)
    assert server.complaints() == ["two, without an end"]


WELL = {
    "uvicorn": ["INFO:     Shutting down", 'INFO:     127.0.0.1:1 - "GET / HTTP/1.1" 200 OK'],
    "gunicorn": [
        "[2026-11-21 05:21:25 +0000] [29776] [INFO] Starting gunicorn 27.0.1",
        '127.0.0.1 - - [21/Nov/2026:05:21:27 +0000] "GET /hello HTTP/1.1" 200 2 "-" "curl/7.88.1"',
    ],
    "gunicorn-uvicorn": ['127.0.0.1:59442 - "GET /hello HTTP/1.1" 200'],
    "hypercorn": ['[2026-11-21 05:21:33 +0000] [29796] [INFO] 127.0.0.1:45950 - - [21/Nov/2026] "GET / 1.1" 200 2'],
    "granian": ["[INFO] Starting granian", '[2026-11-21 05:21:38 +0000] 127.0.0.1 - "GET /hello HTTP/1.1" 200 0.1'],
    "daphne": [
        "2026-11-21 05:21:39,267 INFO     Starting server at tcp:port=8765:interface=127.0.0.1",
        '127.0.0.1:45998 - - [21/Nov/2026:05:21:41] "GET /hello" 200 2',
    ],
}
NOT_WELL = [
    "Traceback (most recent call last):",
    "ERROR:    Exception in ASGI application",
    "[2026-11-21 05:21:25 +0000] [29776] [ERROR] Exception in worker process",
    "[2026-11-21 05:21:25 +0000] [29776] [WARNING] INFO",
    "2026-11-21 05:22:36,519 CRITICAL Listen failure: Couldn't listen",
    "[WARN] something",
    "INFORMATION",
    "Process SpawnProcess-1:",
]


@pytest.mark.parametrize("server", WELL)
def test_what_a_server_says_while_all_is_well(server: str) -> None:
    for line in [*WELL[server], "", "  ", "INFO:root:of the application", "DEBUG:asyncio:too"]:
        assert find_server(server).is_fine(line), line
    for line in NOT_WELL:
        assert not find_server(server).is_fine(line), line


def test_a_worker_counts_once() -> None:
    """Over RSGI each says twice that it has started."""
    log = "[INFO] Started worker-1\n[INFO] Started worker-1 runtime-1\n[INFO] Started worker-2"
    assert find_server("granian-rsgi").workers_up(log) == 1
    assert find_server("granian-rsgi").workers_up(log + "\n") == 2


def test_a_worker_that_died_is_a_complaint() -> None:
    """Though uvicorn says it as it says the rest."""
    assert not find_server("uvicorn").is_fine("INFO:     Child process [29562] died")
    assert find_server("uvicorn").is_fine("INFO:     Waiting for child process [29562]")


# -- asking it -----------------------------------------------------------------------------------


def test_asking_for_json(server: LiveServer) -> None:
    assert server.json("/state")["count"] == 1
    with pytest.raises(AssertionError, match="/fail answered 418: b'not here'"):
        server.json("/fail")


def test_waiting_for_a_state(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert server.wait_for("/state", count=3, name=None)["count"] == 3
    assert server.wait_for("/state", count=lambda count: count > 5)["count"] == 6
    server.get("/say?text=a+complaint")
    message = r"/state: never \{'count': 1\}, but \{'count': \d+.*\na complaint"
    with monkeypatch.context() as patch:
        patch.setattr(server, "deadline", 0.1)
        with pytest.raises(AssertionError, match=message):
            server.wait_for("/state", count=1)


def test_a_client_of_its_own(server: LiveServer) -> None:
    with server.open("/state", "POST", {"X-One": "1"}, b"body", receive_buffer=4096, timeout=5) as client:
        assert client.timeout == 5
        assert client.socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) < 65536
        assert client.response()[0] == 405
    with server.connect() as client:
        assert client.timeout == server.deadline
        client.request("/state")
        assert client.response()[0] == 200


def test_a_request_that_cannot_be_sent(server: LiveServer) -> None:
    """The warning about a socket that was left open would be an error."""
    with pytest.raises(UnicodeEncodeError):
        server.open("/\ud83d")


def test_the_server_runs_on_though_nobody_listens_to_ctrl_c(server: LiveServer) -> None:
    """It is in a session of its own."""
    assert os.getsid(server.pid) == server.pid != os.getsid(0)


# -- which application ---------------------------------------------------------------------------


def test_the_application_itself() -> None:
    assert target_of(tests_app.app) == "tests.app:app"


def test_a_name_is_taken_as_it_is(write: Write) -> None:
    with LiveServer(f"{write()}:nested.app") as live:
        assert live.json("/state")["count"] == 1


@pytest.mark.parametrize("app", ["", "module", "module:", ":app", "module:app()", "a/b.py:app"])
def test_a_name_that_is_none(app: str) -> None:
    with pytest.raises(ValueError, match="app: 'module:attribute', or the application itself, not"):
        LiveServer(app)


def test_an_application_that_is_in_no_module() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    with pytest.raises(
        ValueError, match=r"must be an attribute of a module in a file.*is in none that has been imported"
    ):
        LiveServer(app)


def test_a_module_is_preferred_to_the_tests_that_import_it(monkeypatch: pytest.MonkeyPatch) -> None:
    app = object()
    for name in ("tests.conftest", "test_first", "between", "later"):
        module = ModuleType(name)
        module.__dict__["that_one"] = app
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "no_module", app)
    monkeypatch.setitem(sys.modules, "none", None)
    assert target_of(app) == "between:that_one"


@pytest.mark.parametrize(
    ("spec", "file", "target"),
    [
        ("package.__main__", "/x/package/__main__.py", "package.__main__:app"),
        (None, "/x/program.py", "program:app"),
        (None, "/x/my-program.py", None),
        (None, "/x/program", None),
        (None, None, None),
    ],
    ids=["python -m", "a file", "a file that cannot be imported", "no .py", "python -c"],
)
def test_the_program_that_runs(
    spec: str | None, file: str | None, target: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = ModuleType("__main__")
    main.__spec__ = None if spec is None else importlib.util.spec_from_loader(spec, None)
    if file is not None:
        main.__file__ = file
    app = main.__dict__["app"] = object()
    monkeypatch.setitem(sys.modules, "__main__", main)
    if target is not None:
        assert target_of(app) == target
    else:
        with pytest.raises(ValueError, match="in none that has been imported"):
            target_of(app)


def test_a_program_that_serves_itself(write: Write, tmp_path: Path) -> None:
    """A test without pytest."""
    program = write(
        APPLICATION
        + """
if __name__ == "__main__":
    from fastapi_cancel.testing.live import LiveServer
    with LiveServer(app) as server:
        print(server.json("/state")["count"])
"""
    )
    command = [sys.executable, str(tmp_path / f"{program}.py")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("1\n", "")


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"server": "apache"}, "server: one of 'uvicorn', .*, 'daphne', not 'apache'"),
        ({"workers": 0}, "workers: for uvicorn 1 or more, not 0"),
        ({"server": "daphne", "workers": 2}, "workers: for daphne 1, it has no others, not 2"),
        ({"options": "--reload"}, "options: a list of strings, not the one string '--reload'"),
        ({"deadline": 0}, "deadline: seconds, above 0, not 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LiveServer("tests.app:app", **arguments)


@pytest.mark.parametrize(
    ("server", "missing", "message"),
    [
        ("uvicorn", "uvicorn", "server 'uvicorn' needs uvicorn: pip install uvicorn"),
        ("uvicorn-uvloop", "uvloop", "needs uvloop: pip install uvloop"),
        ("gunicorn-uvicorn", "uvicorn_worker", "needs uvicorn_worker: pip install uvicorn-worker"),
        ("gunicorn", "gunicorn.workers", "needs gunicorn.workers.gasgi: pip install 'gunicorn>=24'"),
        ("hypercorn-trio", "trio", r"needs trio: pip install 'hypercorn\[trio\]'"),
    ],
)
def test_a_server_that_is_not_installed(
    server: str, missing: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec

    def find_spec(name: str) -> Any:
        if name.startswith(missing + "."):
            raise ModuleNotFoundError
        return None if name == missing else found(name)

    monkeypatch.setattr("fastapi_cancel.testing.servers.find_spec", find_spec)
    with pytest.raises(ImportError, match=message):
        LiveServer("tests.app:app", server)


def test_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(NotImplementedError, match="Linux and macOS only"):
        LiveServer("tests.app:app")


# -- in process: what stands before the application ----------------------------------------------


async def echo(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["path"].encode()})


@pytest.mark.anyio
async def test_the_probe_answers_for_itself_alone(tmp_path: Path) -> None:
    visits = tmp_path / "visits"
    probe = Probe(Recorder(echo, visits), "token")
    answers = {READY: b"token", "/root" + READY: b"token", RUNNING: b"{}", "/other": b"/other"}
    for path, body in answers.items():
        visit = await LeavingClient(probe).get(path)
        assert (visit.status, visit.body) == (200, body)
    with anyio.fail_after(DEADLINE):
        passed_on = VisitsFile(visits)
        while [visit.ended is not None for visit in passed_on.visits()] != [True]:
            await anyio.sleep(0.01)


@pytest.mark.anyio
async def test_the_probe_passes_on_what_is_no_request(tmp_path: Path) -> None:
    scopes: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(scope)

    probe = Probe(Recorder(app, tmp_path / "visits"), "token")
    await probe({"type": "lifespan"}, anyio.sleep_forever, anyio.sleep)  # type: ignore[arg-type]
    assert scopes == [{"type": "lifespan"}]


def test_loading(write: Write) -> None:
    module = write()
    assert load(f"{module}:app") is load(f"{module}:nested.app")
    with pytest.raises(ModuleNotFoundError):
        load("no_such_module:app")


def test_what_is_served(monkeypatch: pytest.MonkeyPatch, write: Write, tmp_path: Path) -> None:
    for name, value in {APP: f"{write()}:app", TOKEN: "token", VISITS: str(tmp_path / "visits")}.items():
        monkeypatch.setenv(name, value)
    for name in ("served", "_rsgi"):
        monkeypatch.delitem(sys.modules, f"fastapi_cancel.testing.{name}", raising=False)
    served = import_module("fastapi_cancel.testing.served")
    assert isinstance(served.app, Probe)
    assert isinstance(served.rsgi_application, RSGI)
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        _ = served.other
    assert isinstance(import_module("fastapi_cancel.testing._rsgi").application, RSGI)
    for name in ("served", "_rsgi"):
        monkeypatch.delitem(sys.modules, f"fastapi_cancel.testing.{name}")


def test_nothing_of_it_is_imported_with_the_library() -> None:
    program = "import sys, fastapi_cancel; print([name for name in sys.modules if 'testing' in name.split('.')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "fastapi_cancel.testing" not in done.stdout


def test_an_object_is_found_and_served() -> None:
    with LiveServer(tests_app.app) as live:
        assert live.json("/stats")["started"] == 0
