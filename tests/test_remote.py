"""Stop anywhere. In process; a "worker" is a broker of its own where there is Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.routing import APIRoute

from fastapi_cancel import (
    Broker,
    CancellableRoute,
    CancelPolicy,
    NotCancellable,
    Run,
    SSEResponse,
    Stoppable,
    StreamInfo,
    Token,
    cancel_policy,
    connect,
    header,
    never_cancel,
)
from fastapi_cancel.broker import runs
from fastapi_cancel.testing import LeavingClient, Patience, Visit, when

from .brokers import NewBroker, a_kind, its_backend, its_store, new_brokers  # noqa: F401 (fixtures)
from .conftest import DEADLINE

pytestmark = pytest.mark.anyio


def under(stoppable: Stoppable, endpoint: Any, path: str = "/jobs/{job}", **policy: Any) -> FastAPI:
    """The endpoint on a ``CancellableRoute.under``."""
    route_class = CancellableRoute.under(stoppable).with_policy(CancelPolicy(**policy))
    return serve(APIRouter(route_class=route_class), endpoint, path)


def depending(stoppable: Stoppable, endpoint: Any, path: str = "/jobs/{job}", **policy: Any) -> FastAPI:
    """The endpoint behind the dependency."""
    route_class = CancellableRoute.with_policy(CancelPolicy(**policy))
    return serve(APIRouter(route_class=route_class, dependencies=[Depends(stoppable)]), endpoint, path)


def serve(router: APIRouter, endpoint: Any, path: str) -> FastAPI:
    app = FastAPI()
    router.add_api_route(path, endpoint)
    app.include_router(router)
    return app


Serve = Callable[..., FastAPI]


@pytest.fixture(params=[under, depending])
def way(request: pytest.FixtureRequest) -> Serve:
    way: Serve = request.param
    return way


class Job:
    """An endpoint that goes on until it is stopped."""

    def __init__(self) -> None:
        self.begun = anyio.Event()
        self.reasons: list[str] = []
        self.count = 0

    async def __call__(self, token: Token) -> None:
        self.count += 1
        self.begun.set()
        try:
            await anyio.sleep_forever()
        finally:
            self.reasons.append(token.reason)


@asynccontextmanager
async def workers(new: NewBroker) -> AsyncIterator[tuple[Broker, Broker]]:
    here, there = new(), new()
    async with here, there:
        yield here, there


def client(app: FastAPI, **options: Any) -> LeavingClient:
    return LeavingClient(app, patience=Patience(untold=5), **options)


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(DEADLINE):
        while not condition():
            await anyio.sleep(0.001)


async def stopped(app: FastAPI, begun: anyio.Event, stop: Callable[[], Any], path: str = "/jobs/1") -> Visit:
    async with client(app).visit("GET", path) as visit:
        await visit.until(when(begun))
        assert await stop() == 1
    visit.assert_clean()
    return visit


# -- a stop reaches what runs --------------------------------------------------------------------


async def test_a_stop_on_another_worker_ends_the_request(new: NewBroker, way: Serve) -> None:
    async with workers(new) as (here, there):
        job = Job()
        app = way(Stoppable(here, "jobs/{job}"), job)
        visit = await stopped(app, job.begun, lambda: there.stop("jobs/1", reason="enough"))
        assert (visit.status, visit.body, visit.cause) == (409, b'{"detail":"enough"}', "stop")
        assert job.reasons == ["enough"]


async def test_a_stop_without_a_reason(new: NewBroker) -> None:
    async with workers(new) as (here, there):
        job = Job()
        app = under(Stoppable(here, "jobs/{job}"), job, stop_status=499)
        visit = await stopped(app, job.begun, lambda: there.stop("jobs/1"))
        assert visit.status == 499
        job = Job()
        app = under(Stoppable(here, "jobs/{job}"), job, stop_status=410)
        visit = await stopped(app, job.begun, lambda: there.stop("jobs/1"))
        assert (visit.status, visit.body) == (410, b'{"detail":"Gone"}')
        assert job.reasons == [""]


async def test_a_stop_reaches_all_runs_of_a_key_and_no_other(new: NewBroker) -> None:
    async with workers(new) as (here, there):
        jobs = [Job() for _ in range(4)]
        apps = [
            under(Stoppable(broker, "jobs/{job}"), job) for broker, job in zip([here, there] * 2, jobs, strict=True)
        ]
        async with (
            client(apps[0]).visit("GET", "/jobs/1") as one,
            client(apps[1]).visit("GET", "/jobs/1") as two,
            client(apps[2]).visit("GET", "/jobs/2") as other,
            client(apps[3]).visit("GET", "/jobs/1") as three,
        ):
            for visit, job in zip([one, two, other, three], jobs, strict=True):
                await visit.until(when(job.begun))
            assert await there.stop("jobs/1", reason="all") == 3
            await until(lambda: one.over and two.over and three.over)
            assert not other.over
            assert await here.stop("jobs/2") == 1
        assert [job.reasons for job in jobs] == [["all"], ["all"], [""], ["all"]]


async def test_a_key_from_a_header(new: NewBroker, way: Serve) -> None:
    async with workers(new) as (here, there):
        job = Job()
        app = way(Stoppable(here, header("X-Key"), run=header("X-Run")), job, "/")
        async with client(app).visit("GET", "/", headers={"x-key": "k", "x-run": "5"}) as visit:
            await visit.until(when(job.begun))
            assert await there.stop("k", run="4", early=0) == 0
            assert await there.stop("k", run="5", reason="fifth") == 1
        assert job.reasons == ["fifth"]


async def test_a_key_from_a_function(new: NewBroker) -> None:
    async with workers(new) as (here, there):
        job = Job()

        def key(request: Request) -> str:
            return f"user {request.query_params['user']}"

        app = under(Stoppable(here, key), job)
        await stopped(app, job.begun, lambda: there.stop("user anna"), "/jobs/1?user=anna")


async def test_without_a_key_nothing_can_be_stopped(new: NewBroker, way: Serve) -> None:
    async with workers(new) as (here, _):
        app = way(Stoppable(here, header("X-Key")), lambda: "done", "/")
        assert (await client(app).get("/")).body == b'"done"'
        assert (await client(app).get("/", headers={"X-Key": ""})).body == b'"done"'


async def test_the_dependency_gives_the_run(new: NewBroker) -> None:
    async with workers(new) as (here, there):
        stoppable, begun, seen = Stoppable(here, "jobs/{job}"), anyio.Event(), list[Run | None]()

        async def endpoint(run: Any = Depends(stoppable)) -> None:  # noqa: B008
            seen.append(run)
            begun.set()
            await anyio.sleep_forever()

        app = serve(APIRouter(route_class=CancellableRoute), endpoint, "/jobs/{job}")
        async with client(app).visit("GET", "/jobs/7") as visit:
            await visit.until(when(begun))
            run = seen[0]
            assert run is not None and run.key == "jobs/7" and run.id
            assert await there.stop(run.key, run=run.id) == 1


async def test_stopping_twice_is_once(new: NewBroker) -> None:
    async with workers(new) as (here, there):
        begun, stopping, go = anyio.Event(), anyio.Event(), anyio.Event()

        async def endpoint(token: Token) -> None:
            begun.set()
            try:
                await anyio.sleep_forever()
            finally:
                stopping.set()
                with anyio.CancelScope(shield=True):
                    await go.wait()
                assert token.reason == "first"

        app = under(Stoppable(here, "jobs/{job}"), endpoint)
        async with client(app).visit("GET", "/jobs/1") as visit:
            await visit.until(when(begun))
            assert await there.stop("jobs/1", reason="first") == 1
            await visit.until(when(stopping))
            assert await there.stop("jobs/1", reason="second") == 1
            go.set()
        visit.assert_clean()


async def test_it_can_stop_itself(new: NewBroker) -> None:
    async with workers(new) as (here, _):

        async def endpoint() -> None:
            assert await here.stop("jobs/1", reason="myself") == 1
            await anyio.sleep_forever()

        visit = await client(under(Stoppable(here, "jobs/{job}"), endpoint)).get("/jobs/1")
        visit.assert_clean()
        assert (visit.status, visit.body) == (409, b'{"detail":"myself"}')


async def test_an_event_stream_says_farewell(new: NewBroker, way: Serve) -> None:
    async with workers(new) as (here, there):
        infos: list[StreamInfo] = []
        begun = anyio.Event()

        async def feed() -> AsyncIterator[str]:
            yield "one"
            begun.set()
            await anyio.sleep_forever()

        async def told(info: StreamInfo) -> None:
            infos.append(info)

        async def endpoint() -> SSEResponse:
            return SSEResponse(feed(), farewell=lambda info: {"event": "bye", "data": info.reason}, on_disconnect=told)

        app = way(Stoppable(here, "jobs/{job}"), endpoint)
        visit = await stopped(app, begun, lambda: there.stop("jobs/1", reason="enough"))
        assert visit.status == 200 and visit.completed
        assert visit.body == b"data: one\r\n\r\nevent: bye\r\ndata: enough\r\n\r\n"
        assert [(info.cause, info.reason) for info in infos] == [("stop", "enough")]


async def test_who_opted_out_is_not_reached(new: NewBroker, way: Serve) -> None:
    async with workers(new) as (here, there):

        @never_cancel
        async def endpoint() -> int:
            return await there.stop("jobs/1", early=0)

        assert (await client(way(Stoppable(here, "jobs/{job}"), endpoint)).get("/jobs/1")).body == b"0"


async def test_a_policy_that_does_not_listen_to_stops(new: NewBroker) -> None:
    """It is reached, and leaves it alone."""
    async with workers(new) as (here, there):

        @cancel_policy(causes={"disconnect"})
        async def endpoint(token: Token) -> list[Any]:
            reached = await there.stop("jobs/1", reason="no")
            await anyio.sleep(0.01)
            return [reached, token.cause, token.reason]

        visit = await client(under(Stoppable(here, "jobs/{job}"), endpoint)).get("/jobs/1")
        assert visit.body == b'[1,null,""]'


async def test_a_grace(new: NewBroker) -> None:
    async with workers(new) as (here, there):
        begun = anyio.Event()

        async def endpoint(token: Token) -> str:
            begun.set()
            await token.wait()
            return token.reason

        app = under(Stoppable(here, "jobs/{job}"), endpoint, grace=DEADLINE)
        visit = await stopped(app, begun, lambda: there.stop("jobs/1", reason="hurry"))
        assert visit.body == b'"hurry"'


async def test_two_requests_may_choose_one_id(new: NewBroker) -> None:
    async with workers(new) as (here, there):
        jobs = [Job(), Job()]
        apps = [under(Stoppable(here, "k", run=header("X-Run")), job, "/") for job in jobs]
        same = {"X-Run": "1"}
        async with client(apps[0]).visit("GET", "/", headers=same) as stays:
            await stays.until(when(jobs[0].begun))
            async with client(apps[1]).visit("GET", "/", headers=same) as leaves:
                await leaves.until(when(jobs[1].begun))
                leaves.leave()
            assert await there.stop("k", run="1") == 1
        stays.assert_clean()


# -- early, and late -----------------------------------------------------------------------------


async def test_an_early_stop_waits_for_the_next_run(new: NewBroker, way: Serve) -> None:
    """It does not begin. The one behind it does."""
    async with workers(new) as (here, there):
        job = Job()
        app = way(Stoppable(here, "jobs/{job}"), job)
        assert await there.stop("jobs/1", reason="early") == 0
        assert await there.stop("jobs/1", reason="earlier") == 0  # which is not one more
        visit = await client(app).get("/jobs/1")
        visit.assert_clean()
        assert (visit.status, visit.body, job.count) == (409, b'{"detail":"earlier"}', 0)
        await stopped(app, job.begun, lambda: there.stop("jobs/1", reason="later"))
        assert job.reasons == ["later"]


async def test_an_early_stop_with_a_grace(new: NewBroker) -> None:
    async with workers(new) as (here, there):

        async def endpoint(token: Token) -> str:
            return token.reason

        assert await there.stop("jobs/1", reason="early") == 0
        app = under(Stoppable(here, "jobs/{job}"), endpoint, grace=DEADLINE)
        assert (await client(app).get("/jobs/1")).body == b'"early"'


async def test_a_stop_that_comes_just_after_the_end_is_over(new: NewBroker) -> None:
    async with workers(new) as (here, there):
        app = under(Stoppable(here, "jobs/{job}"), lambda: "done")
        assert (await client(app).get("/jobs/1")).body == b'"done"'
        assert await there.stop("jobs/1") == 0
        assert (await client(app).get("/jobs/1")).body == b'"done"'


async def test_a_stop_of_one_run_hits_no_later_one(new: NewBroker) -> None:
    """Neither does it matter when the one before has ended."""
    async with workers(new) as (here, there):
        job = Job()
        stoppable = Stoppable(here, "jobs/{job}", run=header("X-Run"))
        app = under(stoppable, job)
        assert await there.stop("jobs/1", run="1") == 0
        async with client(app).visit("GET", "/jobs/1", headers={"X-Run": "2"}) as second:
            await second.until(when(job.begun))
            first = await client(app).get("/jobs/1", headers={"X-Run": "1"})
            assert (first.status, job.count) == (409, 1)
            assert await there.stop("jobs/1", run="3", reason="third") == 0
            assert not second.over
            second.leave()
        third = await client(app).get("/jobs/1", headers={"X-Run": "3"})
        assert (third.status, third.body) == (409, b'{"detail":"third"}')


async def test_early_stops_expire(new: NewBroker) -> None:
    async with workers(new) as (here, there):
        app = under(Stoppable(here, "jobs/{job}"), lambda: "done")
        assert await there.stop("jobs/1", early=0.001) == 0
        assert await there.stop("jobs/2", early=0) == 0
        await anyio.sleep(0.01)
        assert await there.stop("jobs/3", early=0.001) == 0
        for path in ("/jobs/1", "/jobs/2"):
            assert (await client(app).get(path)).body == b'"done"'


async def test_ends_are_forgotten(new: NewBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "EARLY_AT_MOST", 0.001)
    async with workers(new) as (here, there):
        app = under(Stoppable(here, "jobs/{job}"), lambda: "done")
        for number in range(3):
            await client(app).get(f"/jobs/{number}")
            await anyio.sleep(0.01)
        assert await there.stop("jobs/0", early=0.005) == 0
        assert (await client(app).get("/jobs/0")).status in (200, 409)


# -- arguments -----------------------------------------------------------------------------------


BAD: list[tuple[Callable[[Broker], Any], type[Exception], str]] = [
    (lambda broker: Stoppable("redis://", "k"), TypeError, "broker must be a Broker, not 'redis://'"),  # type: ignore[arg-type]
    (lambda broker: Stoppable(broker, ""), TypeError, "key must be a str that is not empty, or a function"),
    (lambda broker: Stoppable(broker, 5), TypeError, "key must be a str"),  # type: ignore[arg-type]
    (lambda broker: Stoppable(broker, "k", run=5), TypeError, "run must be a str"),  # type: ignore[arg-type]
    (lambda broker: header(5), TypeError, "name must be a str, not 5"),  # type: ignore[arg-type]
    (lambda broker: CancellableRoute.under("k"), TypeError, "stoppable must be a Stoppable, not 'k'"),  # type: ignore[arg-type]
    (
        lambda broker: under(Stoppable(broker, "jobs/{task}"), lambda: None),
        ValueError,
        "key 'jobs/{task}': the path '/jobs/{job}' has no task",
    ),
    (
        lambda broker: under(Stoppable(broker, "{job}", run="{a}{job}{b}"), lambda: None),
        ValueError,
        "run '{a}{job}{b}': the path '/jobs/{job}' has no a, b",
    ),
]


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=False)
@pytest.mark.parametrize(("make", "kind_of_error", "message"), BAD)
def test_what_cannot_be_used_is_named(
    make: Callable[[Broker], Any], kind_of_error: type[Exception], message: str, anyio_backend: str
) -> None:
    with pytest.raises(kind_of_error) as caught:
        make(connect())
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "kind_of_error", "message"),
    [
        ({"key": ""}, ValueError, "key must be a str that is not empty"),
        ({"key": 5}, TypeError, "key must be a str"),
        ({"key": "k", "run": ""}, ValueError, "run must be a str that is not empty"),
        ({"key": "k", "reason": None}, TypeError, "reason must be a str, not None"),
        ({"key": "k", "early": -1}, ValueError, "early must be a finite number of seconds"),
        ({"key": "k", "early": 61}, ValueError, "early must be 60 seconds at the most, not 61"),
    ],
)
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_stop_that_cannot_be(
    arguments: dict[str, Any], kind_of_error: type[Exception], message: str, anyio_backend: str
) -> None:
    with pytest.raises(kind_of_error) as caught:
        await connect().stop(**arguments)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_dependency_on_a_plain_route(anyio_backend: str) -> None:
    stoppable = Stoppable(connect(), "k")
    app = serve(APIRouter(route_class=APIRoute, dependencies=[Depends(stoppable)]), lambda: None, "/plain")
    error = (await client(app).get("/plain")).error
    assert isinstance(error, NotCancellable)
    assert str(error) == "/plain cannot be stopped: its router needs a CancellableRoute"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_dependency_whose_path_has_no_such_parameter(anyio_backend: str) -> None:
    app = depending(Stoppable(connect(), "jobs/{task}"), lambda: None)
    error = (await client(app).get("/jobs/1")).error
    assert repr(error) == repr(ValueError("key: the path of /jobs/1 has no parameter task"))


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_prefix_of_the_router_is_part_of_its_paths(anyio_backend: str) -> None:
    router = APIRouter(prefix="/users/{user}", route_class=CancellableRoute.under(Stoppable(connect(), "{user} {job}")))
    app = serve(router, lambda: "done", "/jobs/{job}")
    assert (await client(app).get("/users/anna/jobs/1")).body == b'"done"'
