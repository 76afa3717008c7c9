"""The log and its readers, against a store that lags, forgets, loses and begins anew; in process, without Redis."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Awaitable
from typing import Any, NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastapi_cancel._feed import Burst
from fastapi_cancel.broker.log import Entry, Event, Gap, Log, Place, Subscription

KEPT = 4  # by the store
REMEMBERED = 2  # by the process
PAGE = 2
TURNS = 12  # of the event loop, until everybody has done what he can


class Asked(NamedTuple):
    """A question on its way to the store, with the answer once it has been executed."""

    place: Place | None
    known: Place
    answer: asyncio.Future[tuple[Place, list[Entry]]]
    found: list[tuple[Place, list[Entry]]]


class Store:
    """What Redis does, one command at a time. Every event says how many there were before it."""

    def __init__(self, kept: int) -> None:
        self.kept = kept
        self.published = 0
        self.clock = 100
        self.lost: set[str | None] = set()  # what nobody has heard of before is missed by nobody
        self.harmed = False  # something has been trimmed away or lost
        self.forget()
        self.harmed = False

    def forget(self) -> None:
        self.clock += 1
        self.newest = Place(self.clock, 0)
        self.entries: list[Entry] = []
        self.same_life = self.harmed = True

    def begin_anew(self, lost: int) -> None:
        """Without the last so many events."""
        self.same_life = False
        if lost and self.entries:
            self.harmed = True
            self.lost |= {entry.event.data for entry in self.entries[-lost:]}
            del self.entries[-lost:]
            if self.entries:
                self.newest = self.entries[-1].place
            else:
                self.forget()

    def publish(self) -> Entry:
        after = None
        if not self.same_life:
            self.same_life = True
            self.clock += 1
            after, self.newest = self.newest, Place(self.clock, 0)
        self.newest = Place(self.newest.epoch, self.newest.number + 1)
        self.published += 1
        entry = Entry(self.newest, Event(str(self.newest), b"data: %d\r\n\r\n" % self.published), after)
        self.entries.append(entry)
        if len(self.entries) > self.kept:
            del self.entries[0]
            self.harmed = True
        return entry

    def read(self, place: Place | None) -> tuple[Place, list[Entry]]:
        found = [entry for entry in self.entries if place is not None and entry.place > place]
        return self.newest, found[:PAGE]


class Reader:
    """Reads without end, and notes what it got. It may be one that is pushed to."""

    def __init__(self, machine: Machine, after: Place | None, follows: bool) -> None:
        self.seen = 0  # the last event's number in the order of all
        self.gap = False
        self.counted: int | None = 0
        self.events = Subscription(machine.log, machine, after)
        if follows:
            self.events.follow(self.offer)
        self.machine = machine
        self.sending: asyncio.Future[None] | None = None
        self.task = machine.loop.create_task(self.read())

    async def read(self) -> None:
        async for event in self.events:
            if isinstance(event, Gap):
                assert self.machine.store.harmed, f"a gap, but nothing is missing: {event}"
                self.gap = True
                known = self.counted is not None and event.missed is not None
                self.counted = self.counted + event.missed if known else None  # type: ignore[operator]
                continue
            self.note(int(event.data or ""))

    def note(self, number: int) -> None:
        assert number > self.seen, f"{number} came after {self.seen}"
        missing = {str(each) for each in range(self.seen + 1, number)} - self.machine.store.lost
        assert self.gap or not missing, f"{missing} before {number}"
        if self.gap and self.counted is not None:
            assert len(missing) == self.counted, f"{self.counted} missing after {self.seen}: {number}"
        self.seen, self.gap, self.counted = number, False, 0

    def offer(self, burst: Burst) -> Awaitable[None] | bool:
        if self.machine.offers == "refused" or self.sending is not None:
            return False
        for number in re.findall(rb"data: (\d+)", burst[0]):
            self.note(int(number))
        if self.machine.offers == "taken":
            return True
        self.sending = self.machine.loop.create_future()
        return self.send(self.sending)

    async def send(self, sending: asyncio.Future[None]) -> None:
        await sending
        self.sending = None


class Machine(RuleBasedStateMachine):
    kept = KEPT

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.store = Store(self.kept)
        self.log = Log(self.store.newest, REMEMBERED, 3600)
        self.flying: deque[Entry] = deque()
        self.asked: list[Asked] = []
        self.listens = True
        self.readers: list[Reader] = []
        self.ids: list[tuple[Place, int]] = []
        self.offers = "taken"

    # -- what a process asks of the store ----------------------------------------------------

    async def read(self, place: Place) -> tuple[Place, list[Entry]]:
        return await self.ask(place)

    def ask(self, place: Place | None) -> asyncio.Future[tuple[Place, list[Entry]]]:
        asked = Asked(place, self.log.place, self.loop.create_future(), [])
        self.asked.append(asked)
        return asked.answer

    def turn(self) -> None:
        for _ in range(TURNS):
            self.loop.call_soon(self.loop.stop)
            self.loop.run_forever()
        for reader in self.readers:
            if reader.task.done():
                reader.task.result()

    # -- what can happen, in any order -------------------------------------------------------

    @rule()
    def publish(self) -> None:
        entry = self.store.publish()
        self.ids.append((entry.place, self.store.published))
        if self.listens:
            self.flying.append(entry)

    @precondition(lambda self: self.flying)
    @rule(twice=st.booleans())
    def hear(self, twice: bool) -> None:
        entry = self.flying.popleft()
        for _ in range(1 + twice):
            self.log.append(entry.place, entry.event)
        self.turn()

    @precondition(lambda self: any(not asked.found for asked in self.asked))
    @rule(data=st.data())
    def execute(self, data: Any) -> None:
        asked = data.draw(st.sampled_from([asked for asked in self.asked if not asked.found]))
        asked.found.append(self.store.read(asked.place))

    @precondition(lambda self: any(asked.found for asked in self.asked))
    @rule(data=st.data())
    def answer(self, data: Any) -> None:
        asked = data.draw(st.sampled_from([asked for asked in self.asked if asked.found]))
        self.asked.remove(asked)
        (found,) = asked.found
        self.log.move_to(found[0], asked.known)
        asked.answer.set_result(found)
        self.turn()

    @rule(heard=st.integers(0, 3))
    def lose_the_connection(self, heard: int) -> None:
        """Some of what was on its way still arrives."""
        self.listens = False
        while len(self.flying) > heard:
            self.flying.pop()

    @precondition(lambda self: not self.listens)
    @rule()
    def listen_again(self) -> None:
        self.listens = True
        self.ask(None)

    @rule(lost=st.integers(0, 3))
    def begin_anew(self, lost: int) -> None:
        self.lose_the_connection(1)
        self.store.begin_anew(lost)

    @rule()
    def forget(self) -> None:
        self.store.forget()

    @rule(what=st.sampled_from(["taken", "refused", "to be waited for"]))
    def offers_are(self, what: str) -> None:
        self.offers = what

    @rule()
    def sent(self) -> None:
        """What was waited for."""
        for reader in self.readers:
            if reader.sending is not None and not reader.sending.done():
                reader.sending.set_result(None)
        self.turn()

    @rule(follows=st.booleans())
    def come(self, follows: bool) -> None:
        """Where this process is, not where the world is."""
        reader = Reader(self, self.log.place, follows)
        known = [number for place, number in self.ids if place == self.log.place]
        reader.seen = known[0] if known else 0
        reader.gap, reader.counted = not known, None
        self.readers.append(reader)
        self.turn()

    @precondition(lambda self: self.ids)
    @rule(data=st.data(), follows=st.booleans())
    def come_back(self, data: Any, follows: bool) -> None:
        """Perhaps from another worker, with an id of which this one has not heard yet."""
        place, number = data.draw(st.sampled_from(self.ids))
        reader = Reader(self, place, follows)
        reader.seen = number
        self.readers.append(reader)
        self.turn()

    @invariant()
    def memory_is_bounded(self) -> None:
        assert len(self.log._entries) <= REMEMBERED

    def teardown(self) -> None:
        """In the end all answers come; then everybody has got everything."""
        try:
            self.sent()
            for _ in range(2):  # what is heard behind the first look may be lost: the next one says so
                self.look()
            assert self.log.place == self.store.newest
            for reader in self.readers:
                assert reader.events.position == str(self.store.newest)
                if self.store.entries:
                    assert reader.seen >= int(self.store.entries[-1].event.data or "")
        finally:
            for reader in self.readers:
                reader.task.cancel()
                if reader.sending is not None:
                    reader.sending.cancel()
            self.turn_quietly()
            self.loop.close()

    def look(self) -> None:
        """As is done after a return, and now and then; and all answers come."""
        self.listens = True
        self.ask(None)
        for _ in range(200):
            while self.flying:
                entry = self.flying.popleft()
                self.log.append(entry.place, entry.event)
            while self.asked:
                asked = self.asked.pop()
                found = asked.found[0] if asked.found else self.store.read(asked.place)
                self.log.move_to(found[0], asked.known)
                asked.answer.set_result(found)
            self.turn()
            if not self.asked:
                return
        raise AssertionError("it asks without end")

    def turn_quietly(self) -> None:
        for _ in range(TURNS):
            self.loop.call_soon(self.loop.stop)
            self.loop.run_forever()


class Harmless(Machine):
    """Nothing is forgotten, whatever else happens: then there is no gap."""

    kept = 1_000

    @rule()
    def begin_anew(self) -> None:
        self.lose_the_connection(1)
        self.store.begin_anew(0)

    def forget(self) -> None:
        raise NotImplementedError


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
TestHarmless = Harmless.TestCase
TestHarmless.settings = settings(max_examples=50, stateful_step_count=60, deadline=None)


# -- the races, one by one -------------------------------------------------------------------


def event(number: int) -> Event:
    return Event(f"1-{number}", b"\r\n")


def log_of(*numbers: int) -> Log:
    log = Log(Place(1, 0), 10, 3600)
    for number in numbers:
        log.append(Place(1, number), event(number))
    return log


def test_events_are_joined_once_for_all_who_are_at_the_same_place() -> None:
    log = log_of(1)
    assert log.burst_behind(log.place) is None
    before = log.place
    for number in (2, 3):
        log.append(Place(1, number), event(number))
    found = log.burst_behind(before)
    assert found == (Place(1, 3), (event(2).frame + event(3).frame, 2, "1-3"))
    assert log.burst_behind(before) is found
    assert log.burst_behind(log.place) is None


def in_memory(log: Log) -> list[int]:
    return [entry.place.number for _, entry in log._entries]


def test_a_look_knows_more_than_has_been_heard() -> None:
    log = log_of(1)
    log.move_to(Place(1, 3))
    assert (log.last, in_memory(log)) == (3, [1])
    log.append(Place(1, 2), event(2))
    assert (log.last, in_memory(log)) == (3, [1, 2])


def test_a_look_is_older_than_what_has_been_heard() -> None:
    log = log_of(1, 2)
    log.move_to(Place(1, 1), Place(1, 1))
    assert (log.last, in_memory(log)) == (2, [1, 2])


def test_a_look_is_behind_what_was_known_when_it_was_asked_for() -> None:
    log = log_of(1, 2)
    log.move_to(Place(1, 1), Place(1, 2))
    assert (log.last, in_memory(log)) == (1, [])


def test_heard_twice_and_out_of_turn() -> None:
    log = log_of(1, 2, 2, 1)
    assert in_memory(log) == [1, 2]


def test_a_hole_empties_the_memory() -> None:
    assert in_memory(log_of(1, 2, 5)) == [5]


def test_late_news_of_an_epoch_that_is_over() -> None:
    log = log_of(1)
    log.append(Place(2, 7), Event("2-7", b"\r\n"))
    log.append(Place(1, 2), event(2))
    assert (log.place, in_memory(log)) == (Place(2, 7), [7])
