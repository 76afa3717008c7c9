"""The chat example, as a process of its own, used by people who come and go."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlencode

import pytest

from fastapi_cancel.testing.sockets import RawClient

from .conftest import DEADLINE, ROOT

ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")

# The example with something changed or added, and a look inside.
PROBED = """
import asyncio, gc
from anyio.streams.memory import MemoryObjectReceiveStream
from examples.sse_chat import __main__, app

@app.app.get("/stats")
async def stats():
    gc.collect()
    queues = sum(type(each) is MemoryObjectReceiveStream for each in gc.get_objects())
    return {"people": len(app.room.people), "queues": queues, "tasks": len(asyncio.all_tasks())}

"""


class Demo(ExitStack):
    """``python -m examples.sse_chat``, or a script that starts it otherwise."""

    def __init__(self, *arguments: str) -> None:
        super().__init__()
        self.log = self.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115
        command = [sys.executable, *(arguments or ("-m", "examples.sse_chat"))]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=self.log, stderr=subprocess.STDOUT)
        self.callback(self.process.wait)
        self.callback(self.process.kill)
        try:
            self.port = self._printed_port()
        except BaseException:
            self.close()
            raise

    def _printed_port(self) -> int:
        end = time.monotonic() + DEADLINE
        while (address := ADDRESS.search(self.text())) is None:
            assert self.process.poll() is None, f"did not start:\n{self.text()}"
            assert time.monotonic() < end, f"no address:\n{self.text()}"
            time.sleep(0.01)
        return int(address[1])

    def text(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def stop(self, sig: int) -> int:
        self.process.send_signal(sig)
        return self.process.wait(DEADLINE)

    def get(self, path: str) -> Any:
        with RawClient(self.port) as client:
            client.request(path, headers="Connection: close\r\n")
            return json.loads(client.response()[1])

    def post(self, message: dict[str, Any]) -> tuple[int, Any]:
        body = json.dumps(message).encode()
        with RawClient(self.port) as client:
            client.request("/messages", "POST", "Content-Type: application/json\r\nConnection: close\r\n", body)
            status, answer = client.response()
            return status, json.loads(answer or "null")


class Person(RawClient):
    """Somebody in the room, reading server-sent events as the WHATWG says."""

    def __init__(self, demo: Demo, name: str) -> None:
        super().__init__(demo.port)
        self.demo = demo
        self._body = b""
        self.request("/events?" + urlencode({"name": name}))
        status, self.headers = self.head()
        assert status == 200
        self.welcome = self.sees("welcome")
        self.name = self.welcome["you"]

    def sees(self, kind: str) -> dict[str, Any]:
        """The next event, which is of this kind."""
        event, data = self.event()
        assert event == kind, (event, data)
        return data

    def event(self) -> tuple[str, dict[str, Any]]:
        while True:
            kind, data = "message", []
            for line in self._lines():
                field, _, value = line.partition(":")
                value = value.removeprefix(" ")
                if field == "event":
                    kind = value
                elif field == "data":
                    data.append(value)
                else:
                    assert field in ("", "retry"), line
            if data:
                return kind, json.loads("\n".join(data))

    def hears_the_heart(self) -> None:
        while not self._lines()[0].startswith(": ping"):
            pass

    def _lines(self) -> list[str]:
        while b"\r\n\r\n" not in self._body:
            size = int(self.until(b"\r\n"), 16)
            assert size, "the stream has ended"
            self._body += self.exactly(size)
            self.until(b"\r\n")
        block, _, self._body = self._body.partition(b"\r\n\r\n")
        return block.decode().split("\r\n")

    def says(self, text: str) -> None:
        assert self.demo.post({"key": self.welcome["key"], "text": text}) == (204, None)

    def __enter__(self) -> Person:
        return self


@pytest.fixture(scope="module")
def running() -> Iterator[Demo]:
    with Demo() as demo:
        yield demo
        assert demo.stop(signal.SIGTERM) == 0
        assert len(demo.text().splitlines()) == 1, demo.text()


@pytest.fixture
def demo(running: Demo) -> Demo:
    """The one that all tests share, with nobody in the room."""
    assert_soon(lambda: running.get("/who") == [])
    return running


def assert_soon(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_two_people_chat(demo: Demo) -> None:
    with Person(demo, "Ada") as ada, Person(demo, "Bob") as bob:
        assert ada.sees("joined")["name"] == "Bob"
        assert bob.welcome["people"] == ["Ada", "Bob"] == demo.get("/who")
        bob.says("hello")
        for person in (ada, bob):
            said = person.sees("said")
            assert (said["name"], said["text"]) == ("Bob", "hello")


@pytest.mark.parametrize("leave", [RawClient.abort, RawClient.close], ids=["RST", "FIN"])
def test_who_leaves_is_announced_at_once(demo: Demo, leave: Callable[[RawClient], float]) -> None:
    with Person(demo, "Ada") as ada, Person(demo, "Bob") as bob:
        ada.sees("joined")
        left_at = leave(bob)
        assert ada.sees("left")["name"] == "Bob"
        assert time.monotonic() - left_at < 2  # far less than the interval of the keep-alive comments
        assert demo.get("/who") == ["Ada"]


def test_who_left_cannot_speak(demo: Demo) -> None:
    with Person(demo, "Ada") as ada, Person(demo, "Bob") as bob:
        ada.sees("joined")
        bob.abort()
        ada.sees("left")
        status, answer = demo.post({"key": bob.welcome["key"], "text": "still here"})
        assert status == 403
        assert "not in the room" in answer["detail"]


def test_newcomer_gets_the_last_fifty_messages(demo: Demo) -> None:
    with Person(demo, "Ada") as ada:
        for number in range(60):
            ada.says(f"message {number}")
        with Person(demo, "Bob") as bob:
            assert [said["text"] for said in bob.welcome["history"]] == [f"message {n}" for n in range(10, 60)]


def test_same_name_is_told_apart(demo: Demo) -> None:
    with Person(demo, "Ada"), Person(demo, "ada") as second, Person(demo, " Ada ") as third:
        assert [second.name, third.name] == ["ada (2)", "Ada (3)"]
        second.says("which one?")
        assert third.sees("said")["name"] == "ada (2)"


@pytest.mark.parametrize("name", ["", "  ", "x" * 25, "\u200b \u200b"], ids=["empty", "blank", "long", "invisible"])
def test_bad_name_is_refused(demo: Demo, name: str) -> None:
    detail = demo.get("/events?" + urlencode({"name": name}))["detail"]
    assert [each["loc"] for each in detail] == [["query", "name"]]


@pytest.mark.parametrize(
    ("message", "field", "reason"),
    [
        ({"key": "k", "text": ""}, "text", "at least 1 character"),
        ({"key": "k", "text": " \n "}, "text", "at least 1 character"),
        ({"key": "k", "text": "x" * 2001}, "text", "at most 2000 characters"),
        ({"key": "k", "text": "\u200b"}, "text", "can be seen"),
        ({"key": "k", "text": 7}, "text", "valid string"),
        ({"key": "k"}, "text", "required"),
        ({"text": "hello"}, "key", "required"),
    ],
    ids=["empty", "blank", "long", "invisible", "number", "missing", "no-key"],
)
def test_bad_message_is_refused(demo: Demo, message: dict[str, Any], field: str, reason: str) -> None:
    status, answer = demo.post(message)
    assert status == 422
    assert [each["loc"] for each in answer["detail"]] == [["body", field]]
    assert reason in answer["detail"][0]["msg"]


@pytest.mark.parametrize(
    "text",
    [
        "one\ntwo\r\nthree\rfour",
        "<script>alert('&amp;')</script>",
        "data: x\n\nevent: left",
        "日本 \u2028 👩‍🚀",
        "x" * 2000,
    ],
    ids=["lines", "markup", "event", "unicode", "long"],
)
def test_message_arrives_as_it_was_written(demo: Demo, text: str) -> None:
    with Person(demo, "Ada") as ada:
        ada.says(text)
        assert ada.sees("said")["text"] == text


def test_half_a_character_is_replaced(demo: Demo) -> None:
    with Person(demo, "Ada") as ada:
        ada.says("half \ud83d")
        assert ada.sees("said")["text"] == "half ?"


def test_headers_of_the_stream(demo: Demo) -> None:
    with Person(demo, "Ada") as ada:
        assert ada.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert ada.headers["cache-control"] == "no-store"
        assert ada.headers["x-accel-buffering"] == "no"


def test_page_needs_nothing_from_elsewhere(demo: Demo) -> None:
    with RawClient(demo.port) as client:
        client.request("/", headers="Connection: close\r\n")
        status, body = client.response()
    assert status == 200
    assert b"<title>" in body
    assert not re.search(rb"(src|href)=\"(?!data:)|@import|innerHTML|insertAdjacentHTML|document\.write", body)


def test_idle_stream_is_kept_alive_and_misses_nothing() -> None:
    with Demo("-c", PROBED + "app.HEARTBEAT = 0.05\n__main__.main()") as demo, Person(demo, "Ada") as ada:
        for number in range(5):
            ada.hears_the_heart()
            ada.says(str(number))
            assert ada.sees("said")["text"] == str(number)


def test_who_does_not_read_is_dropped() -> None:
    """With what two thousand characters of four bytes fill: the socket's buffers, then the queue."""
    change = "app.room.queue = 5\n__main__.main()"
    with (
        Demo("-c", PROBED + change) as demo,
        Person(demo, "Ada") as ada,
        RawClient(demo.port, receive_buffer=4096) as sleeper,
    ):
        sleeper.request("/events?name=Sleeper")
        ada.sees("joined")
        events = []
        for _ in range(3000):
            ada.says("🙂" * 2000)
            events.append(ada.event()[0])
            if events[-1] == "left":
                break
        assert events[-1] == "left"
        assert demo.get("/who") == ["Ada"]


def test_nothing_remains_of_who_has_left() -> None:
    with Demo("-c", PROBED + "__main__.main()") as demo:
        before = demo.get("/stats")
        for number in range(50):
            with RawClient(demo.port) as hasty:  # gone before the first byte of the answer
                hasty.request("/events?name=Hasty")
                hasty.abort()
            with Person(demo, f"guest {number}") as guest:
                guest.abort() if number % 2 else guest.close()
        assert_soon(lambda: bool(demo.get("/stats") == before))


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_stops_at_once_with_open_streams(sig: int) -> None:
    with Demo() as demo, Person(demo, "Ada") as ada, Person(demo, "Bob"):
        ada.sees("joined")
        assert demo.stop(sig) == 0
        ada.rest()  # the stream has ended, it was not cut off
        assert ADDRESS.sub("", demo.text()) == "The chat room is open at  (Ctrl-C closes it)\n"


def test_stops_though_somebody_does_not_read() -> None:
    change = "app.room.queue = 10**6\napp.SEND_TIMEOUT = 3600\n__main__.main()"
    with (
        Demo("-c", PROBED + change) as demo,
        Person(demo, "Ada") as ada,
        RawClient(demo.port, receive_buffer=4096) as sleeper,
    ):
        sleeper.request("/events?name=Sleeper")
        ada.sees("joined")
        for _ in range(700):
            ada.says("🙂" * 2000)
            ada.sees("said")
        assert demo.stop(signal.SIGTERM) == 0
        assert len(demo.text().splitlines()) == 1, demo.text()


def test_taken_port_is_said_clearly(demo: Demo) -> None:
    command = [sys.executable, "-m", "examples.sse_chat", "--port", str(demo.port)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 2
    assert f"cannot listen on port {demo.port}" in done.stderr
    assert "Traceback" not in done.stderr
