"""What becomes of the requests to a real server, as its own process writes it down. Here in process."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import Any

import anyio
import pytest
from fastapi import FastAPI
from starlette.types import Message, Receive, Scope, Send

from fastapi_cancel import CancellableRoute
from fastapi_cancel.testing import Fault, LeavingClient, after_start, at_wait
from fastapi_cancel.testing.backends import _drop
from fastapi_cancel.testing.recorder import Recorder, ServedVisit, VisitsFile
from fastapi_cancel.testing.records import Record
from fastapi_cancel.testing.stepping import Dropped

pytestmark = pytest.mark.anyio

app = FastAPI()
app.router.route_class = CancellableRoute


@app.get("/hello")
async def hello() -> str:
    return "hello"


@app.get("/work")
async def work() -> None:
    await anyio.sleep_forever()


@app.get("/broken")
async def broken() -> None:
    raise ValueError("broken")


@app.get("/forgotten")
async def forgotten() -> str:
    tasks.add(asyncio.create_task(asyncio.sleep(60), name="forgotten"))
    return "started"


tasks: set[asyncio.Task[None]] = set()


async def visits_of(recorder: Recorder, file: Path, count: int = 1) -> list[ServedVisit]:
    """Wait until so many are over."""
    with anyio.fail_after(5):
        while True:
            visits = VisitsFile(file).visits()
            if len(visits) == count and all(visit.ended is not None for visit in visits):
                assert recorder.running() == {}
                return visits
            await anyio.sleep(0.001)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "visits"


async def test_a_request_that_was_answered(file: Path) -> None:
    recorder = Recorder(app, file)
    await LeavingClient(recorder).get("/hello")
    (visit,) = await visits_of(recorder, file)
    assert str(visit) == "GET /hello 200"
    assert visit.ended is not None and visit.ended >= visit.began
    assert (visit.left, visit.cause, visit.error, visit.faults) == (None, None, None, [])


async def test_a_request_whose_client_left(file: Path) -> None:
    recorder = Recorder(app, file)
    async with LeavingClient(recorder).visit("GET", "/work") as running:
        await running.until(at_wait(1))
        (where,) = recorder.running().values()
        assert "in work" in where
        assert VisitsFile(file).visits()[0].ended is None
        running.leave()
    (visit,) = await visits_of(recorder, file)
    assert (visit.status, visit.cause, visit.faults) == (499, "disconnect", [])
    assert visit.left is not None and visit.ended is not None and visit.began <= visit.left <= visit.ended


async def test_an_error_that_reached_the_server(file: Path) -> None:
    recorder = Recorder(app, file)
    await LeavingClient(recorder).get("/broken")
    (visit,) = await visits_of(recorder, file)
    assert visit.status == 500
    assert visit.error is not None and visit.error.startswith("ValueError('broken')") and "in broken" in visit.error
    assert [fault.kind for fault in visit.faults] == ["error"]


@pytest.mark.parametrize(("words", "kinds"), [("the server's", []), ("the application's", ["error"])])
async def test_an_error_of_the_servers_own_send(file: Path, words: str, kinds: list[str]) -> None:
    """ASGI 2.4: it is for the application to let it through. Another one is the application's."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200})
        except OSError as exc:
            raise exc if "server" in words else OSError(words) from None

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def gone(message: Message) -> None:
        raise OSError("the server's")

    recorder = Recorder(answer, file)
    with pytest.raises(OSError, match=words):
        await recorder({"type": "http", "method": "GET", "path": "/", "headers": []}, receive, gone)
    (visit,) = await visits_of(recorder, file)
    assert [fault.kind for fault in visit.faults] == kinds


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_it_left_behind(file: Path) -> None:
    recorder = Recorder(app, file)
    await LeavingClient(recorder).get("/forgotten")
    (visit,) = await visits_of(recorder, file)
    (fault,) = visit.faults
    assert fault.kind == "task left" and "in forgotten" in fault.text


async def test_requests_of_several_workers_share_the_file(file: Path) -> None:
    first, second = Recorder(app, file), Recorder(app, file)
    await LeavingClient(first).get("/hello")
    await LeavingClient(second).get("/hello")
    await LeavingClient(first).get("/work", leave=at_wait(1))
    assert [visit.path for visit in await visits_of(first, file, 3)] == ["/hello", "/hello", "/work"]


@pytest.mark.parametrize(
    "last",
    [
        {"type": "http.response.body", "body": b"", "more_body": False},
        {"type": "http.response.pathsend", "path": __file__},
    ],
    ids=["body", "file"],
)
async def test_a_client_that_leaves_a_complete_response_has_not_left(file: Path, last: Message) -> None:
    async def curious(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if last["type"] == "http.response.body":
            await send({"type": "http.response.body", "body": b"all", "more_body": True})
        await send(last)
        while (await receive())["type"] != "http.disconnect":
            pass

    recorder = Recorder(curious, file)
    await LeavingClient(recorder, server="granian").get("/")
    (visit,) = await visits_of(recorder, file)
    assert visit.left is None


async def test_other_scopes_pass(file: Path) -> None:
    recorder = Recorder(app, file)
    async with LeavingClient(recorder):
        pass
    assert file.read_text() == ""


async def test_a_native_cancellation_is_no_error(file: Path) -> None:
    async def cancelled(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        with anyio.CancelScope() as scope_of_its_own:
            scope_of_its_own.cancel()
            await anyio.sleep(1)
        while (await receive())["type"] != "http.disconnect":
            pass

    recorder = Recorder(cancelled, file)
    await LeavingClient(recorder).get("/", leave=after_start())
    (visit,) = await visits_of(recorder, file)
    assert visit.error is None and visit.left is not None


def test_a_request_that_ends_with_its_event_loop(file: Path, anyio_backend: str) -> None:
    """Which cancels the recorder's own task as soon as the main one is over. If anybody were watched for ever, nobody
    would see what refers to the objects that were frozen for that: Hypothesis warns of Trio's random numbers."""

    async def main() -> None:
        nothing: Any = anyio.sleep_forever
        await Recorder(answers, file)({"type": "http", "method": "GET", "path": "/"}, nothing, drops)

    async def answers(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body"})

    async def drops(message: Message) -> None:
        pass

    anyio.run(main, backend=anyio_backend)
    (visit,) = VisitsFile(file).visits()
    assert visit.ended is not None and visit.faults == []
    assert gc.get_freeze_count() == 0  # and nobody is watched any more


def test_what_has_been_read_is_not_read_again(file: Path) -> None:
    began = '{"id": "1", "method": "GET", "path": "/", "began": 1.0}\n'
    over = '{"id": "1", "ended": 2.0, "error": null, "faults": [["logged", "x"]]}\n'
    visits = VisitsFile(file)
    assert visits.visits() == []
    file.write_text(began + over[:20])
    (running,) = visits.visits()
    file.write_text("?" * len(began) + over)
    (visit,) = visits.visits()
    assert (running.ended, visit.ended, visit.faults) == (None, 2.0, [Fault("logged", "x")])
    file.unlink()
    assert visits.visits() == [visit]


async def test_requests_that_end_together_are_judged_together(file: Path) -> None:
    recorder = Recorder(app, file)
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(LeavingClient(recorder).get, "/hello")
    assert [visit.faults for visit in await visits_of(recorder, file, 3)] == [[], [], []]


CLOSING = """
class Stream:
    def aclose(self):
        raise RuntimeError("interrupted")
"""


def test_a_stream_that_has_closed_already_loses_nothing() -> None:
    """AnyIO's streams and task groups end their own waits in order."""
    plumbing: dict[str, Any] = {"__name__": "anyio.streams"}
    exec(CLOSING, plumbing)
    record = Record(None)  # type: ignore[arg-type]
    try:
        plumbing["Stream"]().aclose()
    except RuntimeError as interruption:
        record.judged(interruption, True)
    assert record.faults == []


def test_what_trio_is_to_raise_in_work_that_does_not_end() -> None:
    with pytest.raises(Dropped):
        _drop()
