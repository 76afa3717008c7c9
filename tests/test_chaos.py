"""Chaos leaves at every wait in turn: what it finds in a faulty application, and nothing in a sound one."""

from __future__ import annotations

import gc
import logging
import re
import sys
import time
from collections.abc import AsyncIterator, Iterator
from importlib.util import find_spec
from typing import Any

import anyio
import pytest
import redis.asyncio as redis
from fastapi import APIRouter, FastAPI, Request

from examples.sse_chat.app import app as chat
from examples.sse_chat.app import room
from fastapi_cancel import CancellableRoute, testing
from fastapi_cancel.testing import Chaos, LeavingClient, Patience, Visit, after_event, at_wait, chaos

from .faulty_app import Shop, service
from .redis_server import RedisServer

pytestmark = pytest.mark.anyio
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])

# -- a shop of ten endpoints, each with a fault ----------------------------------------------

PHOTO: dict[str, Any] = {"content": [b"a" * 1000] * 4}
INVOICE: dict[str, Any] = {"params": {"pages": 120}}  # 10 ms each: its thread goes on for longer than is allowed

ENDPOINTS: list[tuple[str, str, dict[str, Any]]] = [
    ("GET", "/report", {}),
    ("GET", "/export", {}),
    ("GET", "/feed", {}),
    ("POST", "/photos", PHOTO),
    ("POST", "/payments", {}),
    ("GET", "/search", {}),
    ("POST", "/transfers", {}),
    ("POST", "/orders", {}),
    ("GET", "/quotes", {}),
    ("GET", "/invoices", INVOICE),
]

FAULTS = {
    "/report": ("generator left open: sales, first iterated at", "in report", "in report"),
    "/export": ("cleanup killed: ", "in warehouse.<locals>.fetch", ""),
    "/feed": ("not returned: 1 of Redis", "", "in new_orders"),
    "/photos": ("body stolen: two readers at once, at", "in unless_it_leaves.<locals>.listen", ""),
    "/payments": ("AssertionError: a payment is not in the books", "", "in Shop.charge"),
    "/search": ("task left: shelf, created at", "in search", "in search"),
    "/transfers": ("AssertionError: a transaction is open", "", "in transfer"),
    "/orders": ("background cancelled: ", "in Shop.send_receipt", "in Shop.send_receipt"),
    "/quotes": ("logged: shop ERROR: no price\nTraceback", "", "in price"),
    "/invoices": ("went on: it knew that its client had left", "in invoices", "in invoices"),
}
"""Of each endpoint: how the fault is told, a line that it names, and one at which the client had left."""

ORDERS = ["first", "second"]
EAGER = sys.version_info >= (3, 12)
"""The watcher of a request begins to read at once: the first wait is later than before."""


@pytest.fixture
async def shop(redis_server: RedisServer) -> AsyncIterator[Shop]:
    async with redis.Redis(port=redis_server.port) as connected:
        await connected.delete("orders")
        await connected.rpush("orders", *ORDERS)
        with Shop(connected) as shop:
            yield shop


def visitor(shop: Shop) -> LeavingClient:
    return LeavingClient(service(shop), pools=[shop.redis], patience=Patience(cleanup=0.5))


def in_order(visit: Visit) -> None:
    shop = visit.scope["app"].state.shop
    assert not shop.database.in_transaction, "a transaction is open"
    assert shop.charged == shop.count("payments"), "a payment is not in the books"
    assert shop.open_sessions == 0, "the warehouse has not been told"


@on_asyncio
@pytest.mark.parametrize(("method", "path", "options"), ENDPOINTS)
async def test_a_planted_fault_is_found(shop: Shop, method: str, path: str, options: dict[str, Any]) -> None:
    where = f"/old{path}" if path == "/orders" else path
    with pytest.raises(AssertionError) as failure:
        await chaos(visitor(shop), method, where, check=in_order, **options)
    fault, line, left_at = FAULTS[path]
    message = str(failure.value)
    assert fault in message
    left, _, told = message.partition(fault)
    assert line in told
    assert left_at in left
    number = re.search(r"^<Visit .*>, whose client left at wait (\d+), at\n", left)
    assert number is not None
    assert int(number[1]) > (0 if EAGER else 1)  # nothing so obvious that the first wait shows it


@on_asyncio
@pytest.mark.parametrize(("method", "path", "options"), ENDPOINTS)
async def test_nothing_is_found_where_it_is_mended(shop: Shop, method: str, path: str, options: dict[str, Any]) -> None:
    # A thread may have to wait for its core for longer than the event loop for its own.
    longest = 1 if path == "/feed" else 20
    found = await chaos(visitor(shop), method, f"/fixed{path}", longest=longest, check=in_order, **options)
    assert found.waits >= 3
    assert found.complete == (path != "/feed")  # which waits for an order that never comes


@on_asyncio
@pytest.mark.parametrize(("method", "path", "options"), ENDPOINTS)
async def test_clients_that_stay_see_no_difference(shop: Shop, method: str, path: str, options: dict[str, Any]) -> None:
    """Hence nobody has found the faults."""
    answers = []
    for prefix in ("/old" if path == "/orders" else "", "/fixed"):
        if path == "/photos":
            options = {"content": b"a" * 4000}
        async with visitor(shop).visit(method, f"{prefix}{path}", **options) as visit:
            if path == "/feed":
                await visit.until(after_event(ORDERS[-1]))
                visit.leave()
        assert visit.status == 200
        answers.append((visit.body, visit.events))
    assert answers[0] == answers[1]


# -- the chat --------------------------------------------------------------------------------


def only_ann(visit: Visit) -> None:
    assert room.people == ["ann"]


@pytest.mark.parametrize("server", ["uvicorn", "hypercorn"])
async def test_the_chat(server: str) -> None:
    """Somebody is in the room and talks; whoever joins and leaves, at whichever wait, has left it."""
    client = LeavingClient(chat, server=server)

    async def talk() -> None:
        while True:
            room.say(seat.key, "...")
            await anyio.sleep(0.001)

    async def listen() -> None:
        while True:
            await seat.next()

    async with room.join("ann") as seat, anyio.create_task_group() as group:
        group.start_soon(listen)
        said = {"key": seat.key, "text": "hello"}
        assert (await chaos(client, "GET", "/", check=only_ann)).complete
        assert (await chaos(client, "GET", "/who", check=only_ann)).complete
        assert (await chaos(client, "POST", "/messages", json=said, check=only_ann)).complete
        assert (await chaos(client, "GET", "/events?name=bob", check=only_ann, longest=0.2)).waits >= 1
        group.start_soon(talk)
        assert (await chaos(client, "GET", "/events?name=bob", check=only_ann, most=50)).waits == 50
        group.cancel_scope.cancel()
    assert room.people == []


async def test_a_chat_that_forgets_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """The room that it is checked against can be found full."""
    monkeypatch.setattr(room, "_remove", lambda seat: None)
    try:
        with pytest.raises(AssertionError, match=r"whose client left at wait 1, at\n(.*\n)*AssertionError: .*'bob'"):
            await chaos(LeavingClient(chat), "GET", "/events?name=bob", check=nobody)
    finally:
        room._seats.clear()


def nobody(visit: Visit) -> None:
    assert room.people == []


# -- chaos itself ----------------------------------------------------------------------------

logger = logging.getLogger("shop")
router = APIRouter(route_class=CancellableRoute)
cleaned: list[str] = []
held: list[str] = []


@router.get("/waits/{number}")
async def waits(number: int) -> None:
    try:
        for _ in range(number):
            await anyio.sleep(0.001)
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0)
            cleaned.append("waits")


async def turns() -> None:
    """Waits, for longer than it takes to be told, but not for a time: on Trio a sleep that is over by then may end
    before whoever tells has his turn."""
    for _ in range(20):
        await anyio.sleep(0)


@router.get("/unopened")
async def unopened() -> None:
    sessions: list[anyio.Lock] = []
    try:
        await turns()
        sessions.append(anyio.Lock())
        await turns()
    finally:
        sessions[0].statistics()  # not yet there, if the client leaves at the first wait


@router.get("/locked")
async def locked() -> None:
    held.append("lock")
    await turns()
    held.remove("lock")


@router.get("/fast-and-loose")
async def fast_and_loose() -> None:
    logger.warning("oh no")


@router.get("/blocks")
async def blocks() -> None:
    async def block() -> None:
        await anyio.sleep(0.01)
        time.sleep(0.2)

    async with anyio.create_task_group() as group:
        group.start_soon(block)
        await anyio.sleep(0.05)
    await anyio.sleep(0.001)


@router.get("/for-ever")
async def for_ever() -> None:
    await anyio.sleep(0.001)
    await anyio.sleep(3600)


async def numbers() -> AsyncIterator[int]:
    try:
        yield 1
        yield 2
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0)


@router.get("/cycle")
async def cycle() -> None:
    """A generator that only the garbage collector can free."""
    kept: list[Any] = [numbers()]
    kept.append(kept)
    await anext(kept[0])
    await anyio.sleep(0.001)


@router.post("/upload")
async def upload(request: Request) -> int:
    return sum([len(piece) async for piece in request.stream()])


@pytest.fixture
def client() -> LeavingClient:
    cleaned.clear()
    app = FastAPI()
    app.include_router(router)
    return LeavingClient(app)


async def test_every_wait_has_its_turn(client: LeavingClient) -> None:
    visits: list[Visit] = []
    found = await chaos(client, "GET", "/waits/5", check=visits.append)
    assert found.complete
    assert found.waits >= 6  # five, and one in the cleanup
    assert [visit.left is None for visit in visits] == [False] * found.waits + [True]
    assert len(cleaned) == len(visits)


async def test_work_that_never_waits(client: LeavingClient) -> None:
    assert (await chaos(client, "GET", "/waits/0")).complete


async def test_most(client: LeavingClient) -> None:
    visits: list[Visit] = []
    assert await chaos(client, "GET", "/waits/5", most=3, check=visits.append) == Chaos(3, False)
    assert len(visits) == 3


async def test_longest(client: LeavingClient) -> None:
    """A wait that lasts too long is left, and was the last."""
    found = await chaos(client, "GET", "/for-ever", longest=0.05)
    assert found.waits >= 2
    assert not found.complete


async def test_an_event_loop_that_stands_still_is_no_wait(client: LeavingClient) -> None:
    found = await chaos(client, "GET", "/blocks", longest=0.1)
    assert found.complete
    assert found.waits >= 3


async def test_an_error_in_a_cleanup(client: LeavingClient) -> None:
    told = r"<Visit GET /unopened .*>, whose client left at wait \d, at\n(.*\n)+error: IndexError"
    with pytest.raises(AssertionError, match=told):
        await chaos(client, "GET", "/unopened")


@on_asyncio
async def test_a_visit_whose_client_stays_counts_too(client: LeavingClient) -> None:
    with pytest.raises(AssertionError, match=r"whose client stayed:\nlogged: shop WARNING: oh no$"):
        await chaos(client, "GET", "/fast-and-loose")


async def test_a_generator_in_a_cycle(client: LeavingClient) -> None:
    with pytest.raises(AssertionError, match="generator left open: numbers, first iterated at"):
        await chaos(client, "GET", "/cycle")
    gc.collect()


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_check(client: LeavingClient, asynchronous: bool) -> None:
    """What only the application can tell."""

    def unlocked(visit: Visit) -> None:
        if held:
            held.clear()
            raise ValueError("the lock is held")

    async def unlocked_later(visit: Visit) -> None:
        await anyio.sleep(0)
        unlocked(visit)

    with pytest.raises(AssertionError) as failure:
        await chaos(client, "GET", "/locked", check=unlocked_later if asynchronous else unlocked)
    first, *_, last = str(failure.value).splitlines()
    assert re.fullmatch(r"<Visit GET /locked None, 0 chunks>, whose client left at wait \d, at", first)
    assert last == "ValueError: the lock is held"
    assert isinstance(failure.value.__cause__, ValueError)


async def test_a_body_is_sent_each_time(client: LeavingClient) -> None:
    visits: list[Visit] = []
    found = await chaos(client, "POST", "/upload", content=[b"ab"] * 3, check=visits.append)
    assert found.complete
    assert visits[-1].body == b"6"


def pieces() -> Iterator[bytes]:
    yield b"a"


async def later_pieces() -> AsyncIterator[bytes]:
    yield b"a"


@pytest.mark.parametrize("content", [pieces, later_pieces])
async def test_a_body_that_can_be_sent_once(client: LeavingClient, content: Any) -> None:
    with pytest.raises(TypeError, match="content: bytes, text or a list of pieces, to be sent many times, not <"):
        await chaos(client, "POST", "/upload", content=content())


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"most": 0}, r"most: a number \(>= 1\), not 0"),
        ({"longest": 0}, r"longest: seconds \(> 0\), not 0"),
        ({"longest": float("nan")}, r"longest: seconds \(> 0\), not nan"),
    ],
)
async def test_wrong_arguments(client: LeavingClient, argument: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        await chaos(client, "GET", "/waits/1", **argument)


async def test_what_the_application_has_frozen_stays_so(client: LeavingClient) -> None:
    """A visit freezes all objects that are older than itself, so that each look at what is left is quick."""
    gc.freeze()
    try:
        before = gc.get_freeze_count()
        (await client.get("/waits/2", leave=at_wait(1))).assert_clean()
        assert gc.get_freeze_count() >= before // 2
    finally:
        gc.unfreeze()
    async with client.visit("GET", "/waits/2"):
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


def test_no_name_is_that_of_a_module() -> None:
    """Whoever imported the module would make it the package's attribute, instead of what the package offers."""
    for name in testing.__all__:
        assert find_spec(f"fastapi_cancel.testing.{name}") is None
