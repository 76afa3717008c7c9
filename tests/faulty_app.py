"""A small shop of ten endpoints, each with a fault that nobody sees while clients stay; under ``/fixed`` each without.

A client finds the fault that leaves at a certain wait. Where that is, and what is wrong, stands beside it.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Annotated, Any

import anyio
import redis.asyncio as redis
from anyio.to_thread import run_sync
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_cancel import CancellableRoute, CancellableStreamingResponse, SSEResponse, Token

logger = logging.getLogger("shop")


class Shop:
    """What the endpoints share.

    :ivar charged: payments that the bank has made
    :ivar open_sessions: with the warehouse
    """

    def __init__(self, client: redis.Redis) -> None:
        self.redis = client
        self.database = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self.database.executescript(
            "CREATE TABLE accounts (name, balance); INSERT INTO accounts VALUES ('alice', 100), ('bob', 100);"
            "CREATE TABLE payments (amount); CREATE TABLE sales (amount); INSERT INTO sales VALUES (1), (2), (3), (4)"
        )
        self.charged = 0
        self.open_sessions = 0
        self.receipts = 0

    async def execute(self, sql: str, *values: Any) -> list[Any]:
        return await run_sync(lambda: self.database.execute(sql, values).fetchall())

    def count(self, table: str) -> int:
        return int(self.database.execute(f"SELECT count(*) FROM {table}").fetchone()[0])

    async def charge(self) -> None:
        """The bank's answer comes a little later than the money."""
        await asyncio.sleep(0.001)
        self.charged += 1
        await asyncio.sleep(0.001)

    async def send_receipt(self) -> None:
        await asyncio.sleep(0.001)
        await asyncio.sleep(0.001)
        self.receipts += 1

    def __enter__(self) -> Shop:
        return self

    def __exit__(self, *exc: object) -> None:
        self.database.close()


def shop_of(request: Request) -> Shop:
    shop: Shop = request.app.state.shop
    return shop


OurShop = Annotated[Shop, Depends(shop_of)]

router = APIRouter(route_class=CancellableRoute)
old = APIRouter()
fixed = APIRouter(prefix="/fixed", route_class=CancellableRoute)


async def log_in() -> None:
    """What most requests begin with: at these waits nothing is wrong yet."""
    await asyncio.sleep(0.001)
    await asyncio.sleep(0.001)


# -- 1. /report ------------------------------------------------------------------------------


async def sales(shop: Shop) -> AsyncGenerator[int]:
    for page in range(2):
        for (amount,) in await shop.execute("SELECT amount FROM sales LIMIT 2 OFFSET ?", page * 2):
            yield amount


async def rendered(amount: int) -> str:
    await asyncio.sleep(0.001)
    return f"{amount}.00"


@router.get("/report")
async def report(shop: OurShop) -> list[str]:
    """In ``rendered`` the sales stand at their ``yield``: they are left to the garbage collector."""
    await log_in()
    return [await rendered(amount) async for amount in sales(shop)]


@fixed.get("/report")
async def fixed_report(shop: OurShop) -> list[str]:
    await log_in()
    async with aclosing(sales(shop)) as found:
        return [await rendered(amount) async for amount in found]


# -- 2. /export ------------------------------------------------------------------------------


class Session:
    """With the warehouse, which wants to be told of the end."""

    def __init__(self, shop: Shop) -> None:
        self._shop = shop
        shop.open_sessions += 1

    async def page(self, number: int) -> str:
        await asyncio.sleep(0.001)
        return f"page {number}\n"

    async def close(self) -> None:
        await asyncio.sleep(0.001)
        self._shop.open_sessions -= 1


async def warehouse(shop: Shop, shield: bool) -> AsyncIterator[str]:
    """Fetches ahead. A task group cancels its tasks at each of their waits, so ``close`` is cancelled as well."""
    await log_in()
    pages, incoming = anyio.create_memory_object_stream[str](2)

    async def fetch() -> None:
        session = Session(shop)
        try:
            with pages:
                for number in range(4):
                    await pages.send(await session.page(number))
        finally:
            with anyio.CancelScope(shield=shield):
                await session.close()

    async with anyio.create_task_group() as group:
        group.start_soon(fetch)
        with incoming:
            async for page in incoming:
                yield page


@router.get("/export")
async def export(shop: OurShop) -> Response:
    return CancellableStreamingResponse(warehouse(shop, shield=False))


@fixed.get("/export")
async def fixed_export(shop: OurShop) -> Response:
    return CancellableStreamingResponse(warehouse(shop, shield=True))


# -- 3. /feed --------------------------------------------------------------------------------


async def new_orders(shop: Shop) -> AsyncIterator[str]:
    """A client that leaves while the last orders are read leaves a connection that nobody gives back."""
    subscription = shop.redis.pubsub(ignore_subscribe_messages=True)
    await subscription.subscribe("orders")
    for order in await shop.redis.lrange("orders", 0, 9):
        yield str(order)
    try:
        async for message in subscription.listen():
            yield str(message["data"])
    finally:
        await subscription.aclose()  # type: ignore[no-untyped-call]


async def fixed_new_orders(shop: Shop) -> AsyncIterator[str]:
    subscription = shop.redis.pubsub(ignore_subscribe_messages=True)
    try:
        await subscription.subscribe("orders")
        for order in await shop.redis.lrange("orders", 0, 9):
            yield str(order)
        messages: Any = subscription.listen()
        async with aclosing(messages):
            async for message in messages:
                yield str(message["data"])
    finally:
        await subscription.aclose()  # type: ignore[no-untyped-call]


@router.get("/feed")
async def feed(shop: OurShop) -> Response:
    return SSEResponse(new_orders(shop))


@fixed.get("/feed")
async def fixed_feed(shop: OurShop) -> Response:
    return SSEResponse(fixed_new_orders(shop))


# -- 4. /photos ------------------------------------------------------------------------------


async def size_of(request: Request) -> int:
    return sum([len(piece) async for piece in request.stream()])


async def unless_it_leaves(request: Request, work: Coroutine[Any, Any, int]) -> int:
    """Whoever comes first gets the next piece of the body. One that came whole was for the work."""

    async def listen() -> int:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        return 0

    working, listening = asyncio.ensure_future(work), asyncio.ensure_future(listen())
    try:
        done, _ = await asyncio.wait([working, listening], return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()
    finally:
        working.cancel()
        listening.cancel()
        await asyncio.gather(working, listening, return_exceptions=True)


@router.post("/photos")
async def photos(request: Request) -> int:
    await log_in()
    return await unless_it_leaves(request, size_of(request))


@fixed.post("/photos")
async def fixed_photos(request: Request) -> int:
    await log_in()
    return await size_of(request)


# -- 5. /payments ----------------------------------------------------------------------------


@router.post("/payments")
async def payments(shop: OurShop) -> str:
    """The money is gone, and nothing is written down: only the shop's books show it."""
    await log_in()
    await shop.charge()
    await shop.execute("INSERT INTO payments VALUES (5)")
    return "paid"


@fixed.post("/payments")
async def fixed_payments(shop: OurShop) -> str:
    await log_in()
    with anyio.CancelScope(shield=True):
        await shop.charge()
        await shop.execute("INSERT INTO payments VALUES (5)")
    return "paid"


# -- 6. /search ------------------------------------------------------------------------------


async def shelf(number: int) -> int:
    """Is not over yet when it is looked for, not even on a slow machine."""
    await asyncio.sleep(0.1)
    await asyncio.sleep(0.1)
    return number


@router.get("/search")
async def search() -> list[int]:
    """``asyncio.wait`` that is cancelled cancels nothing."""
    await log_in()
    searches = [asyncio.create_task(shelf(number)) for number in range(3)]
    done, late = await asyncio.wait(searches, timeout=5)
    for each in late:
        each.cancel()
    return sorted(each.result() for each in done)


@fixed.get("/search")
async def fixed_search() -> list[int]:
    await log_in()
    async with asyncio.TaskGroup() as group:
        searches = [group.create_task(shelf(number)) for number in range(3)]
    return sorted(each.result() for each in searches)


# -- 7. /transfers ---------------------------------------------------------------------------


async def is_fraud() -> bool:
    await asyncio.sleep(0.001)
    return False


async def transfer(shop: Shop, mishap: type[BaseException]) -> str:
    """A cancellation is no ``Exception``: the transaction stays open, for the next request to run into."""
    await log_in()
    await shop.execute("BEGIN")
    try:
        await shop.execute("UPDATE accounts SET balance = balance - 5 WHERE name = 'alice'")
        if await is_fraud():
            raise ValueError("not with us")
        await shop.execute("UPDATE accounts SET balance = balance + 5 WHERE name = 'bob'")
        await shop.execute("COMMIT")
    except mishap:
        await shop.execute("ROLLBACK")
        raise
    return "done"


@router.post("/transfers")
async def transfers(shop: OurShop) -> str:
    return await transfer(shop, Exception)


@fixed.post("/transfers")
async def fixed_transfers(shop: OurShop) -> str:
    return await transfer(shop, BaseException)


# -- 8. /orders ------------------------------------------------------------------------------


class CancelOnDisconnect:
    """Cancels what its client has left. To uvicorn, whoever has got an answer has left."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        messages: asyncio.Queue[Any] = asyncio.Queue()
        work = asyncio.ensure_future(self.app(scope, messages.get, send))

        async def read() -> None:
            while True:
                message = await receive()
                await messages.put(message)
                if message["type"] == "http.disconnect":
                    work.cancel()
                    return

        reader = asyncio.create_task(read())
        await asyncio.wait([work])
        reader.cancel()
        await asyncio.wait([reader])


@old.post("/orders")
@fixed.post("/orders")
async def orders(shop: OurShop, background: BackgroundTasks) -> str:
    await log_in()
    background.add_task(shop.send_receipt)
    return "ordered"


# -- 9. /quotes ------------------------------------------------------------------------------


async def price() -> int:
    await asyncio.sleep(0.001)
    return 7


async def quote(mishap: type[BaseException]) -> int:
    """A client that leaves is no mishap, but is in the log as one, with a traceback."""
    await log_in()
    try:
        return await price()
    except mishap:
        logger.exception("no price")
        raise


@router.get("/quotes")
async def quotes() -> int:
    return await quote(BaseException)


@fixed.get("/quotes")
async def fixed_quotes() -> int:
    return await quote(Exception)


# -- 10. /invoices ---------------------------------------------------------------------------


def typeset(pages: int, token: Token | None) -> int:
    for _ in range(pages):
        if token is not None:
            token.raise_if_set()
        time.sleep(0.01)
    return pages


@router.get("/invoices")
async def invoices(pages: int) -> int:
    """Nobody can cancel a thread: it has to look."""
    await log_in()
    return await run_sync(typeset, pages, None)


@fixed.get("/invoices")
async def fixed_invoices(pages: int, token: Token) -> int:
    await log_in()
    return await run_sync(typeset, pages, token)


# -- the application -------------------------------------------------------------------------


def service(shop: Shop) -> FastAPI:
    app, older = FastAPI(), FastAPI()
    app.include_router(router)
    app.include_router(fixed)
    older.include_router(old)
    app.mount("/old", CancelOnDisconnect(older))
    app.state.shop = older.state.shop = shop
    return app
