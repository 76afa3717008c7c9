"""The servers that a LiveServer can be: how each is started, and what it says while all is well."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True)
class Server:
    """One server, in one way of running it.

    :ivar command: its module and options
    :ivar needs: what must be there, and what to install where it is not
    :ivar access_log: the options with which it logs its requests, and those with which it does not
    :ivar workers: the option for their number, if it has workers
    :ivar up: a regular expression of what each of them logs once it serves
    :ivar request: how a line of its access log begins, if not with its level
    :ivar hopeless: what it logs when a worker has died, if it would start others for ever
    :ivar rsgi: whether it serves RSGI applications
    """

    command: str
    needs: dict[str, str]
    access_log: tuple[str, str]
    workers: str | None = None
    up: str = ""
    request: re.Pattern[str] | None = None
    hopeless: str | None = None
    rsgi: bool = False

    def arguments(self, port: int, workers: int, access_log: bool) -> list[str]:
        """Of ``python -m``: all but the application."""
        arguments = self.command.format(port=port).split()
        arguments += self.access_log[0 if access_log else 1].split()
        return arguments if self.workers is None else [*arguments, self.workers, str(workers)]

    def workers_up(self, log: str) -> int:
        """How many of its workers serve."""
        return len(re.findall(self.up, log))

    def is_at_a_loss(self, log: str) -> bool:
        """Whether its workers die as soon as they are started."""
        return self.hopeless is not None and self.hopeless in log

    def is_fine(self, line: str) -> bool:
        """Whether ``line`` of the log is no reason to look at it."""
        if self.request is not None and self.request.match(line):
            return True
        return _QUIET.match(line) is not None and not self.is_at_a_loss(line)


_DATE = r"\[[-\d]+ [\d:]+ [+-]\d{4}\]"
_QUIET = re.compile(r"[-\d:,.T+ \[\]]*(INFO|DEBUG|TRACE)\b|\s*$")
"""A level that says that all is well, with nothing but dates and numbers before it; or nothing at all."""


def _uvicorn(options: str, **needs: str) -> Server:
    return Server(
        f"uvicorn --host 127.0.0.1 --port {{port}} {options}",
        {"uvicorn": "uvicorn", **needs},
        workers="--workers",
        up="INFO:     Application startup complete",
        access_log=("", "--no-access-log"),
        hopeless="Child process [",
    )


def _gunicorn(worker: str, up: str, needs: dict[str, str]) -> Server:
    return Server(
        f"gunicorn -b 127.0.0.1:{{port}} -k {worker}",
        {"gunicorn": "gunicorn", **needs},
        workers="-w",
        up=up,
        access_log=("--access-logfile -", ""),
        request=re.compile(r'\S+ - (\S+ \[.*\] )?"[A-Z]+ '),
    )


def _hypercorn(worker: str, **needs: str) -> Server:
    return Server(
        f"hypercorn -b 127.0.0.1:{{port}} -k {worker}",
        {"hypercorn": "hypercorn", **needs},
        workers="-w",
        up="Running on",
        access_log=("--access-logfile -", ""),
    )


def _granian(interface: str, rsgi: bool) -> Server:
    return Server(
        f"granian --host 127.0.0.1 --port {{port}} --interface {interface}",
        {"granian": "granian"},
        workers="--workers",
        up=r"Started worker-\d+\n",  # over RSGI, "Started worker-1 runtime-1" comes from the same one
        access_log=("--access-log", "--no-access-log"),
        request=re.compile(_DATE + r' \S+ - "[A-Z]+ '),
        rsgi=rsgi,
    )


_DAPHNE = Server(
    "daphne -b 127.0.0.1 -p {port}",
    {"daphne": "daphne"},
    access_log=("-v 1", "-v 0"),  # its one switch: without it, it logs warnings only
    request=re.compile(r'\S+ - - \[.*\] "'),
)

SERVERS = {
    "uvicorn": _uvicorn("--http auto --loop asyncio"),  # httptools where installed
    "uvicorn-h11": _uvicorn("--http h11 --loop asyncio", h11="h11"),
    "uvicorn-uvloop": _uvicorn("--http auto --loop uvloop", uvloop="uvloop"),
    "gunicorn": _gunicorn("asgi", "ASGI server listening", {"gunicorn.workers.gasgi": "'gunicorn>=24'"}),
    "gunicorn-uvicorn": _gunicorn(
        "uvicorn_worker.UvicornWorker", "Application startup complete", {"uvicorn_worker": "uvicorn-worker"}
    ),
    "hypercorn": _hypercorn("asyncio"),
    "hypercorn-trio": _hypercorn("trio", trio="'hypercorn[trio]'"),
    "granian": _granian("asgi", rsgi=False),
    "granian-rsgi": _granian("rsgi", rsgi=True),
    "daphne": _DAPHNE,
}


def find_server(name: str) -> Server:
    """The server of that name.

    :raises ValueError: there is none
    :raises ImportError: it is not installed
    """
    if name not in SERVERS:
        raise ValueError(f"server: one of {', '.join(map(repr, SERVERS))}, not {name!r}")
    for module, package in SERVERS[name].needs.items():
        if not _is_installed(module):
            raise ImportError(f"server {name!r} needs {module}: pip install {package}")
    return SERVERS[name]


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is in
        return False
