"""``python -m benchmarks``: every budget, measured in one run against its peers."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from . import drops, everywhere, fan_out, inprocess, instructions, remote, sse, streams, wire
from .harness import Section

SECTIONS: dict[str, Callable[[bool], Section]] = {
    "inprocess": inprocess.run,
    "wire": wire.run,
    "instructions": instructions.run,
    "streams": streams.in_process,
    "served-streams": streams.served,
    "idle": streams.idle,
    "drops": drops.run,
    "sse": sse.in_process,
    "served-sse": sse.served,
    "idle-sse": sse.idle,
    "dropped-sse": sse.drops,
    "crowd-sse": sse.crowd,
    "fan-out": fan_out.run,
    "stop": remote.run,
    "servers": everywhere.run,
}
PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
START, END = "<!-- bench:start -->", "<!-- bench:end -->"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: noisier, but soon over")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="this section only; may be repeated")
    parser.add_argument("--write", action="store_true", help=f"also into {PAGE.name}, between its two markers")
    arguments = parser.parse_args()
    begin = time.monotonic()
    text = machine()
    print(text, flush=True)
    for name in arguments.only or SECTIONS:
        since = time.monotonic()
        part = "\n" + markdown(SECTIONS[name](arguments.quick))
        print(part, flush=True)
        print(f"({name}: {time.monotonic() - since:.0f} s)", file=sys.stderr)
        text += "\n" + part
    print(f"\n({time.monotonic() - begin:.0f} s)")
    if arguments.write:
        write(text)


def machine() -> str:
    packages = ["fastapi", "starlette", "anyio", "uvicorn", "sse-starlette"]
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"Python {platform.python_version()}, {versions}. ±: half of the middle 50 % of the rounds."


def markdown(section: Section) -> str:
    lines = [
        f"### {section.title}",
        "",
        section.how,
        "",
        "| what | who | measured | budget | |",
        "|---|---|---|---|---|",
    ]
    what = ""
    for row in section.rows:
        cells = [row.what if row.what != what else "", row.who, row.measured, row.budget, row.verdict]
        lines.append(f"| {' | '.join(cells)} |")
        what = row.what
    if not section.rows:
        del lines[-2:]
    if section.notes:
        lines += ["", *(f"- {note}" for note in section.notes)]
    return "\n".join(lines)


def write(text: str) -> None:
    page = PAGE.read_text() if PAGE.exists() else ""
    if START not in page or END not in page:
        sys.exit(f"{PAGE} needs the two markers {START} and {END}")
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    main()
