"""One queue per endpoint, taken in turns: nobody starves, nobody waits for somebody else's trouble.

**Problem.** Thousands of endpoints share one loop. In a single queue one that hangs stands in front of all; with a
pool per endpoint, finding out who may send next is a walk over all of them for every delivery.

**Rule, turns.** Every endpoint has a lane: a first-in-first-out queue and a `Window`. A lane with work and room takes
turns of one item, and who is next is the head of one of two rings, `new` before `old`. A lane enters `new` when work
comes to it and it is in no ring, and goes to the end of `old` after each turn, with or without work left; only when
its place in `old` comes up empty is it out and may be new again. So an endpoint with one event a minute goes ahead of
another one's backlog, and still nobody has a second turn before all who waited have had one: the way back into `new`
leads through the whole of `old`. Fresh lanes cannot starve old ones that way, as they would if being idle sufficed.

**Rule, blocked.** A lane with work but no room is in no ring, and the result that makes room puts it back: blocked
lanes are never scanned. One that loses its room while it has a place (its window shrank, it was paused) is dropped
when the place comes up, so nothing is ever searched for. Each look at a lane is paid for by a turn it had or by work
that came: O(1) throughout.

**Rule, rate.** A lane with a `rate_limit` keeps the moment of its next start and waits for it in a heap that holds
such lanes only. Starts are spaced evenly (GCRA, the leaky bucket as a meter), so there is no burst at the top of a
second for the subscriber to fall over. Waking late by up to 10 ms is made up for, else a limit of 1,000/s would yield
a fraction of it on a loop that turns every 5 ms; the spacing is wider by the same 10 ms in a second, so that at most
⌈rate⌉ starts fall in any second nevertheless, at 99 % of the rate in the long run.

**Bounds.** In flight in all; queued in all; queued per lane, and never more than it leaves for all others
(`room_for_lane`); retries queued in all, so that a storm of retries leaves room for first attempts. Where a bound is
met `offer` says so and nothing is kept: the caller writes a pending row, or stops reading.

**Rule, retries.** What comes due again goes into a queue of its own beside the lane's, and the two take turns: a first
attempt stands behind one retry, not behind hundreds, and neither starves the other. Nor do retries make a lane `new`:
whoever has nothing else waits in `old`. What was merely held (its endpoint was paused or full) is no such retry: it
keeps its place in the order of events, before what happened later.

**Invariant.** A lane that may start has exactly one place, in `new`, `old` or the heap. Every item offered and
queued leaves once: by `next`, or by `release` (also when the lane dies), in the order of its queue. `queued` and
`in_flight` equal the sums over the lanes. `check` asserts all that it can see; the tests call it after every step.

**Edge.** An item offered to a dead lane whose time is over opens the probe; the rest waits behind it, bounded like
any queue. A lane that was forgotten still takes the results of what it has in flight, and nothing else.

**Source.** FQ-CoDel, RFC 8290 §4.2 (new and old flows, and why an empty new one must pass through old); ITU-T I.371
(GCRA); Choudhury and Hahne (1998) for `room_for_lane`; the windows are `core/window.py`.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Callable
from enum import Enum
from itertools import count
from typing import Final, Generic, TypeVar

from dispatcher.core.window import Health, Signal, Turn, Window

LATE_S: Final = 0.010  # a late wake-up that does not cost a rate-limited lane its start: some turns of a busy loop
LATENCY_START_S: Final = 1.0  # nobody has measured this endpoint yet: count it as slow, so that its excess is spilled
LATENCY_SHARE: Final = 1 / 8  # of the newest measurement in the average: TCP's smoothed round-trip time, RFC 6298

T = TypeVar("T")


class Offer(Enum):
    """What became of an item that was offered."""

    QUEUED = "queued"
    FULL = "full"  # a bound is met
    DEAD = "dead"  # the endpoint is, until `lane.window.dead_until`
    HELD = "held"  # the lane is paused


class Place(Enum):
    """Where a lane waits for its turn."""

    NOWHERE = "nowhere"  # nothing to do, or no room
    NEW = "new"
    OLD = "old"
    TIMED = "timed"  # in the heap, for its rate limit
    FORGOTTEN = "forgotten"  # no longer ours; what it has in flight may still come back


# A class attribute lookup costs 115 ns on an Enum in CPython 3.11, a module's name 16.
_QUEUED: Final = Offer.QUEUED
_FULL: Final = Offer.FULL
_NOWHERE: Final = Place.NOWHERE
_NEW: Final = Place.NEW
_OLD: Final = Place.OLD
_TIMED: Final = Place.TIMED
_FORGOTTEN: Final = Place.FORGOTTEN
_READY: Final = Health.READY
_DEAD: Final = Health.DEAD


class _Retry(Generic[T]):
    """What was held, in the queue of first attempts: marked, because its bound is given back when it leaves."""

    __slots__ = ("item",)

    def __init__(self, item: T) -> None:
        self.item = item


class Lane(Generic[T]):
    """One endpoint's queue, window and rate. Outsiders read; only its `Lanes` writes, but for `observe`."""

    __slots__ = (
        "busy",
        "due",
        "due_next",
        "interval_s",
        "key",
        "latency_s",
        "next_at",
        "paused",
        "place",
        "quiet",
        "ticket",
        "todo",
        "window",
    )

    def __init__(self, key: int, limit: int, interval_s: float) -> None:
        self.key = key
        self.window = Window(limit)
        self.todo: deque[T | _Retry[T]] = deque()  # in the order of events
        self.due: deque[T] = deque()  # retries that came due
        self.due_next = False  # it is their turn, if there are both
        self.busy = 0  # in flight
        self.place = _NOWHERE
        self.paused = False
        self.interval_s = interval_s  # between two starts; 0.0 without a rate limit
        self.next_at = 0.0  # not before this moment may the next one start
        self.ticket = 0  # of its valid entry in the heap
        self.latency_s = 0.0  # moving average; 0.0 before the first measurement
        self.quiet = False  # was idle when a sweep looked, and nothing came back since

    @property
    def has_room(self) -> bool:
        """Whether another request may go out, apart from the rate."""
        return self.busy < self.window.size and not self.paused

    @property
    def queued(self) -> int:
        """How many wait, of either kind."""
        return len(self.todo) + len(self.due)

    def is_idle(self, now: float) -> bool:
        """Whether nothing would be lost with it but what its window has learned."""
        at_rest = not (self.todo or self.due or self.busy or self.paused) and self.place is _NOWHERE
        return at_rest and self.window.health is _READY and self.next_at <= now

    def observe(self, duration_s: float) -> None:
        """Take in how long an attempt took."""
        average = self.latency_s
        self.latency_s = average + (duration_s - average) * LATENCY_SHARE if average else duration_s

    def drain_estimate_s(self, waited_s: float = LATENCY_START_S) -> float:
        """Return about how long the queue as it stands takes, from what attempts took so far.

        Before the first result they are taken to last as long as the caller has waited for it, `waited_s`. It looks
        back: an endpoint that began to hang a second ago still looks fast, so whoever waits bounds the wait.
        """
        each_s = (self.latency_s or waited_s) / max(1, self.window.size)
        return self.queued * max(each_s, self.interval_s)

    def __repr__(self) -> str:
        window = self.window
        paused = ", paused" if self.paused else ""
        return (
            f"<Lane {self.key} {window.health.name} {self.busy}/{window.size} busy, "
            f"{self.queued} queued, {window.outlook}{paused}>"
        )


class Lanes(Generic[T]):
    """All lanes and whose turn it is. Items are opaque; `now` is monotonic seconds.

    `offer`, `next` and `done` run once per delivery and are written for speed: 0.7 µs the three of them, 1.2
    with 10,000 lanes out of the processor's cache.
    """

    def __init__(self, *, queued_max: int, lane_queued_max: int, retries_queued_max: int, in_flight_max: int) -> None:
        self.queued_max = queued_max
        self.lane_queued_max = lane_queued_max
        self.retries_queued_max = retries_queued_max
        self.in_flight_max = in_flight_max
        self.queued = 0
        self.retries_queued = 0  # of `queued`
        self.in_flight = 0
        self._lanes: dict[int, Lane[T]] = {}
        self._healths = dict.fromkeys(Health, 0)
        self._new: deque[Lane[T]] = deque()
        self._old: deque[Lane[T]] = deque()
        self._timed: list[tuple[float, int, Lane[T]]] = []  # a heap of (next_at, ticket, lane); other tickets are void
        self._tickets = count(1)
        self._rota: deque[Lane[T]] = deque()  # every lane, in the order `sweep` looks at them

    def lane(self, key: int, *, limit: int, rate_limit: float | None = None, ordered: bool = False) -> Lane[T]:
        """Return the lane of an endpoint, made if need be; of one that is there the settings stay (see `update`).

        Ask anew for each item rather than keep the answer: `sweep` forgets idle lanes.
        """
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = Lane(key, 1 if ordered else limit, _interval_s(rate_limit))
            self._healths[_READY] += 1
            self._rota.append(lane)
        return lane

    def find(self, key: int) -> Lane[T] | None:
        """Return the lane of an endpoint if there is one."""
        return self._lanes.get(key)

    def update(self, lane: Lane[T], *, limit: int, rate_limit: float | None = None, ordered: bool = False) -> None:
        """Take the endpoint's changed settings over."""
        lane.window.resize(1 if ordered else limit)
        interval_s = _interval_s(rate_limit)
        if interval_s != lane.interval_s:
            # The wait goes on by the new rate from the last start; its entry in the heap has the wrong time.
            lane.next_at += interval_s - lane.interval_s
            lane.interval_s = interval_s
            if lane.place is _TIMED:
                self._line_up(lane)

    def pause(self, lane: Lane[T]) -> None:
        """Let nothing more start. What is queued stays until `release`."""
        lane.paused = True

    def resume(self, lane: Lane[T]) -> None:
        """End a pause."""
        lane.paused = False
        if lane.place is _NOWHERE and lane.queued and lane.has_room:
            self._line_up(lane)

    def revive(self, lane: Lane[T]) -> None:
        """Let a dead endpoint be probed at once: its owner says it is back, or it has another address now."""
        self._announce(lane, lane.window.wake(lane.window.dead_until))

    def forget(self, lane: Lane[T]) -> list[T]:
        """Drop the lane of an endpoint that is no more; return its queue."""
        assert lane.place is not _FORGOTTEN, f"{lane} was forgotten before"
        items = self.release(lane)
        lane.place = _FORGOTTEN
        lane.paused = True  # so that `offer` finds out at no cost
        lane.ticket = 0
        self._healths[lane.window.health] -= 1
        del self._lanes[lane.key]
        return items

    def sweep(self, now: float, lanes_max: int = 1000) -> list[int]:
        """Look at the next `lanes_max` lanes and forget those idle since the last look; return their keys.

        An endpoint heard of again starts at the initial window, as a TCP connection does after idling. A dead one is
        remembered until it answers. Meant to be called every few seconds: 0.4 µs a lane, 1.2 for one forgotten.
        """
        rota = self._rota
        keys = []
        for _ in range(min(lanes_max, len(rota))):
            lane = rota.popleft()
            if lane.place is _FORGOTTEN:
                continue
            idle = lane.is_idle(now)
            if idle and lane.quiet:
                self.forget(lane)
                keys.append(lane.key)
            else:
                lane.quiet = idle
                rota.append(lane)
        return keys

    def offer(self, lane: Lane[T], item: T, now: float, retry: bool = False, due: bool = False) -> Offer:
        """Queue an item, or say why not; then nothing was kept.

        `retry`: it counts against the bound for retries. `due`: it is one that came due and queues beside the others.
        """
        if lane.paused:
            assert lane.place is not _FORGOTTEN, f"{lane} was forgotten: ask for the lane anew"
            return Offer.HELD
        window = lane.window
        if window.health is _DEAD:
            turn = window.wake(now)
            if turn is None:
                return Offer.DEAD
            self._announce(lane, turn)
        todo = lane.todo
        queued = len(todo) + len(lane.due)
        if queued >= self.lane_queued_max or queued >= self.queued_max - self.queued:
            return _FULL
        if retry or due:
            if self.retries_queued >= self.retries_queued_max:
                return _FULL
            self.retries_queued += 1
            if due:
                self.queued += 1
                lane.due.append(item)
                if lane.place is _NOWHERE and lane.busy < window.size:
                    self._line_up(lane)
                return _QUEUED
            todo.append(_Retry(item))
        else:
            todo.append(item)
        self.queued += 1
        if lane.place is _NOWHERE and lane.busy < window.size:
            lane.place = _NEW
            self._new.append(lane)
        return _QUEUED

    def next(self, now: float) -> tuple[Lane[T], T] | None:
        """Take the next item whose request is to start now; None if there is none or enough is in flight.

        The caller notes `lane.window.generation` with the item and hands it to `done`.
        """
        if self.in_flight >= self.in_flight_max:
            return None
        if self._timed and self._timed[0][0] <= now:
            self._ripen(now)
        while ring := self._new or self._old:
            lane = ring.popleft()
            todo, busy, size = lane.todo, lane.busy, lane.window.size
            if not (todo or lane.due) or busy >= size or lane.paused:
                if lane.place is not _FORGOTTEN:
                    lane.place = _NOWHERE
                continue
            if lane.interval_s:
                if lane.next_at > now:
                    self._wait(lane)
                    continue
                lane.next_at = max(lane.next_at, now - LATE_S) + lane.interval_s
            due = lane.due
            is_due = False
            if due:
                is_due = lane.due_next or not todo
                lane.due_next = not is_due
            entry = due.popleft() if is_due else todo.popleft()
            lane.busy = busy = busy + 1
            self.queued -= 1
            self.in_flight += 1
            if busy >= size and (todo or due):
                lane.place = _NOWHERE  # blocked: `done` brings it back
            else:
                lane.place = _OLD  # empty ones too: see "turns" above
                self._old.append(lane)
            if is_due:
                self.retries_queued -= 1
            elif isinstance(entry, _Retry):
                self.retries_queued -= 1
                return lane, entry.item
            return lane, entry  # type: ignore[return-value]  # the queue of retries marks none
        return None

    def done(
        self, lane: Lane[T], signal: Signal, generation: int, now: float, dead_delay_s: Callable[[int], float]
    ) -> list[T] | None:
        """Take in one result. If it was the endpoint's death, return the queue for the caller to put back, else None.

        `generation` is what the window's was at `next`; `dead_delay_s(deaths)` gives the seconds to stay dead.
        """
        window = lane.window
        turn = window.learn(signal, lane.busy, generation, now, dead_delay_s)
        lane.busy -= 1
        self.in_flight -= 1
        lane.quiet = False
        if turn is not None:
            self._announce(lane, turn)
            if window.health is _DEAD:
                return self.release(lane)
        if lane.place is _NOWHERE and lane.busy < window.size and (lane.todo or lane.due):
            lane.place = _OLD
            self._old.append(lane)
        return None

    def release(self, lane: Lane[T]) -> list[T]:
        """Empty the lane's queues and return them, each oldest first: the retries, then the others."""
        items: list[T] = list(lane.due)
        self.retries_queued -= len(items)
        lane.due.clear()
        for entry in lane.todo:
            if isinstance(entry, _Retry):
                self.retries_queued -= 1
                items.append(entry.item)
            else:
                items.append(entry)
        lane.todo.clear()
        self.queued -= len(items)
        if items and lane.place is _NOWHERE:
            self._line_up(lane)  # or it would be new again without having passed through `old`
        return items

    def next_wake(self) -> float | None:
        """Return when the first of the lanes that wait for their rate limit may go on; None if none waits.

        Worth asking after `next` returned None: a lane that has not had its turn is not waiting yet.
        """
        timed = self._timed
        while timed and timed[0][1] != timed[0][2].ticket:
            heapq.heappop(timed)
        return timed[0][0] if timed else None

    @property
    def room_for_lane(self) -> int:
        """How long any one queue may be now: no longer than what is left for all others together.

        A lane alone may fill half of the space; when many are slow the share of each shrinks, so that the slow ones
        spill before the space is gone and the fast ones, whose queues are short, never notice. Choudhury and Hahne,
        "Dynamic queue length thresholds for shared-memory packet switches" (1998), with a factor of one.
        """
        return min(self.lane_queued_max, self.queued_max - self.queued)

    @property
    def full(self) -> bool:
        """Whether the engine has all the work it can hold: the reader stops."""
        return self.queued >= self.queued_max

    @property
    def healths(self) -> dict[Health, int]:
        """How many lanes are in each health."""
        return self._healths.copy()

    def __len__(self) -> int:
        return len(self._lanes)

    def __repr__(self) -> str:
        queued, in_flight = f"{self.queued}/{self.queued_max}", f"{self.in_flight}/{self.in_flight_max}"
        return f"<Lanes {len(self._lanes)}, {queued} queued, {in_flight} in flight>"

    def _announce(self, lane: Lane[T], turn: Turn | None) -> None:
        if turn is not None and lane.place is not _FORGOTTEN:
            old, new = turn
            self._healths[old] -= 1
            self._healths[new] += 1

    def _line_up(self, lane: Lane[T]) -> None:
        lane.ticket = 0
        lane.place = _OLD
        self._old.append(lane)

    def _wait(self, lane: Lane[T]) -> None:
        lane.place = _TIMED
        lane.ticket = next(self._tickets)
        heapq.heappush(self._timed, (lane.next_at, lane.ticket, lane))

    def _ripen(self, now: float) -> None:
        while self._timed and self._timed[0][0] <= now:
            _, ticket, lane = heapq.heappop(self._timed)
            if ticket == lane.ticket:
                self._line_up(lane)

    def check(self) -> None:
        """Assert the invariants, in time proportional to the number of lanes: for tests."""
        rings = {_NEW: self._new, _OLD: self._old, _TIMED: [e[2] for e in self._timed if e[1] == e[2].ticket]}
        found = Counter((place, lane) for place, ring in rings.items() for lane in ring if lane.place is not _FORGOTTEN)
        placed = {(lane.place, lane) for lane in self._lanes.values() if lane.place is not _NOWHERE}
        assert found == Counter(placed), f"places disagree: {set(found) ^ placed}"
        for lane in self._lanes.values():
            _check_lane(lane)
        lanes = self._lanes.values()
        assert self.queued == sum(lane.queued for lane in lanes), "the queues do not add up"
        held = sum(isinstance(entry, _Retry) for lane in lanes for entry in lane.todo)
        assert self.retries_queued == held + sum(len(lane.due) for lane in lanes)
        assert self.in_flight >= sum(lane.busy for lane in lanes), "more is busy than in flight"
        assert self._healths == {health: sum(lane.window.health is health for lane in lanes) for health in Health}
        assert 0 <= self.retries_queued <= min(self.queued, self.retries_queued_max)
        assert 0 <= self.queued <= self.queued_max
        assert 0 <= self.in_flight <= self.in_flight_max


def _check_lane(lane: Lane[T]) -> None:
    assert lane.place is not _FORGOTTEN, f"{lane} is forgotten and known"
    assert lane.busy >= 0, f"{lane} has more results than requests"
    is_lost = lane.queued and lane.has_room and lane.place is _NOWHERE
    assert not is_lost, f"{lane} could go on and has no place"
    assert lane.place is not _TIMED or lane.interval_s, f"{lane} waits for a rate it does not have"
    if lane.window.health is _DEAD:
        assert lane.window.size == 0, f"{lane} is dead and has room"
        assert not lane.queued, f"{lane} is dead and has work"


def _interval_s(rate_limit: float | None) -> float:
    """Return the spacing of starts that keeps any second, late wake-ups made up for, at the limit."""
    assert rate_limit is None or (rate_limit > 0 and math.isfinite(rate_limit)), f"no rate: {rate_limit}"
    return (1 + LATE_S) / rate_limit if rate_limit else 0.0
