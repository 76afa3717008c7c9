"""Two machines with a cable between them, on one: a server's and a client's, whose link goes down without a word.

They are network namespaces, held by a process each, and vanish with them, however this one ends. They need root,
or the right to be root in a namespace of one's own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import ExitStack
from subprocess import DEVNULL, PIPE

SERVER, CLIENT = "10.77.0.1", "10.77.0.2"
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
WAYS = [[], ["--user", "--map-root-user"]]
"""How ``unshare`` may be allowed to make a network: as root, or as root of a namespace."""


class Unavailable(Exception):
    """There can be no such machines here. Says why."""


class Machine:
    """A network namespace.

    :ivar enter: what to put before a command to run it there, in a process that keeps its id
    """

    enter: list[str]

    def __init__(self, way: list[str], within: Machine | None = None) -> None:
        before = within.enter if within else []
        command = [*before, program("unshare"), *way, "--net", "sh", "-c", "echo ready; exec cat"]
        # It ends when this process does: then there is nothing more to read.
        self._holder = subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE)
        assert self._holder.stdout is not None
        ready = self._holder.stdout.readline()
        if not ready:
            raise Unavailable(self._end())
        self.pid = str(self._holder.pid)
        user = ["--user", "--preserve-credentials"] if way or (within and "--user" in within.enter) else []
        self.enter = [program("nsenter"), "--target", self.pid, *user, "--net"]

    def run(self, *command: str) -> None:
        done = subprocess.run([*self.enter, *command], stdin=DEVNULL, capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"{' '.join(command)}: {done.stderr.strip()}")

    def ip(self, *arguments: str) -> None:
        self.run(program("ip"), *arguments)

    def _end(self) -> str:
        _, complaint = self._holder.communicate()
        return str(complaint.decode().strip())

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exc: object) -> None:
        self._end()


class Cable:
    """``with Cable() as cable:`` the two machines, ``cable.server`` and ``cable.client``."""

    server: Machine
    client: Machine

    def __enter__(self) -> Cable:
        complaints = []
        for way in WAYS:
            with ExitStack() as stack:
                try:
                    self._lay(way, stack)
                except Unavailable as exc:
                    complaints.append(str(exc))
                else:
                    self._stack = stack.pop_all()
                    return self
        raise Unavailable("; ".join(dict.fromkeys(complaints)))

    def _lay(self, way: list[str], stack: ExitStack) -> None:
        switch = stack.enter_context(Machine(way))
        switch.ip("link", "add", "bridge", "type", "bridge")
        switch.ip("link", "set", "bridge", "up")
        for name, address in (("server", SERVER), ("client", CLIENT)):
            machine = stack.enter_context(Machine([], within=switch))
            setattr(self, name, machine)
            switch.ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", machine.pid)
            switch.ip("link", "set", name, "master", "bridge", "up")
            machine.ip("address", "add", f"{address}/24", "dev", "eth0")
            machine.ip("link", "set", "eth0", "up")

    def cut(self) -> None:
        """The client's link goes down; the server's own does not, as behind a switch."""
        self.client.ip("link", "set", "eth0", "down")

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


def program(name: str) -> str:
    found = shutil.which(name, path=PATH)
    if found is None:
        raise Unavailable(f"there is no program {name}")
    return found
