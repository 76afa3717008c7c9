"""What the protection of a JSON route costs, without a server."""

from __future__ import annotations

import asyncio
from functools import partial

from .apps import BARE, OURS, PEERS_MISSING, VARIANTS, build
from .asgi import answer, cpu_of
from .harness import BASE, Section, at_most, interleave, on_one_core, ratios, shown, typical

HANDED_ON = "?handed-on"
CALLS = 64  # a slice, all of them at the same time

ROWS: list[tuple[str, str, int, float | None]] = [
    ("never waits", "/never", 0, 1.20),
    ("waits for one turn of the loop, `sleep(0)`", "/turn", 0, 1.25),
    ("waits for another callback", "/wait", 0, 1.25),
    ("waits for another callback, 10 ms", "/wait-long", 0, 1.25),
    ("waits for another callback, a `receive` that a middleware hands on", f"/wait{HANDED_ON}", 0, None),
    ("POST, a JSON body", "/body", 0, 1.20),
    ("never waits, one `BaseHTTPMiddleware` around", "/never", 1, None),
    ("waits, one `BaseHTTPMiddleware` around", "/wait", 1, None),
]


@on_one_core()
def run(quick: bool) -> Section:
    section = Section(
        "A JSON route, in process",
        f"CPU time of ASGI calls, {CALLS} at a time, relative to the same route on plain FastAPI.",
        notes=[PEERS_MISSING] if PEERS_MISSING else [],
    )
    loop = asyncio.new_event_loop()
    for what, path, layers, budget in ROWS:
        bare = [BARE] if path == "/wait" and not layers else []
        apps = {variant: build(variant, layers) for variant in [*VARIANTS, *bare]}
        for app in apps.values():
            answer(loop, app, path)
        handed_on = path.endswith(HANDED_ON)
        variants = {name: partial(cpu_of, loop, app, path, CALLS, handed_on) for name, app in apps.items()}
        costs = interleave(variants, rounds=20 if quick else 300, warm=5)
        for who, value in ratios(costs).items():
            if who == OURS and budget is not None:
                section.rows.append(at_most(what, who, value, budget))
            else:
                section.rows.append(shown(what, who, value))
        section.notes.append(f"{what}: plain = {typical(costs[BASE]) / CALLS * 1e6:.1f} µs on this machine.")
    loop.close()
    return section
