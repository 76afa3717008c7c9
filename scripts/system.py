"""The programs that the tests run beside Python: on Debian, those that are missing are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

PROGRAMS = ["chromium", "curl", "haproxy", "ip", "nginx", "redis-server"]
PACKAGES = {"ip": "iproute2"}
"""Those whose Debian package has another name."""

PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])
APT = "apt-get -o DPkg::Lock::Timeout=300"


def main() -> int:
    wanted = missing()
    if not wanted:
        return 0
    packages = " ".join(PACKAGES.get(program, program) for program in wanted)
    install = f"{APT} update && {APT} install -y --no-install-recommends {packages}"
    root = as_root()
    if shutil.which("apt-get", path=PATH) is None or root is None:
        print(f"The tests need {', '.join(wanted)}. On Debian, as root:\n    {install}", file=sys.stderr)
        return 1
    print(f"Installing {', '.join(wanted)} ...", flush=True)
    subprocess.run([*root, "env", f"PATH={PATH}", "DEBIAN_FRONTEND=noninteractive", "sh", "-c", install], check=False)
    wanted = missing()
    if wanted:
        print(f"The tests need {', '.join(wanted)}: apt-get could not install them, see above.", file=sys.stderr)
        return 1
    return 0


def missing() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]


def as_root() -> list[str] | None:
    """What to put before a command so that root runs it; ``None``: there is no way without a password."""
    if os.geteuid() == 0:
        return []
    sudo = ["sudo", "-n"]
    if shutil.which("sudo") is None or subprocess.run([*sudo, "true"], capture_output=True).returncode:
        return None
    return sudo


if __name__ == "__main__":
    sys.exit(main())
