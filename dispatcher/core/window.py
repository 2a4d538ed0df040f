"""How many requests an endpoint gets at once, and whether it gets any: two questions, kept apart.

**Problem.** Nobody tells us what a subscriber can bear, and it changes. Too few requests at once and a fast endpoint
falls behind; too many and we are the outage. And an endpoint that is gone must stop costing sockets, deadlines and
attempts at once, yet be noticed soon after it is back.

**Rule, how many.** One step up after N successes at window N, one step down at the first failure of a cohort of N and
then once per N failures: feedback of 1/N each way. A window grows only when it is really in use
(`size < busy + initial`), so a quiet endpoint does not save up a flood. Never below 1, never above `limit`.

All of it is two counters of integers. The usual way, summing the float 1/N up to 1, stops short by a rounding error
at some N (ten times 0.1 is less than 1), and the guards against that change the behaviour measurably: half a step of
hysteresis loses the first-failure step. The counters equal the rule in exact fractions step for step; a test holds it.

**Rule, alive.**

    READY ──── failures in a row ≥ max(5, the window when the run began) ────▶ DEAD
    DEAD  ──── its time is over ────▶ PROBING      with one request
    PROBING ── any answer but a DOWN ────▶ READY   at the initial window, deaths forgotten
    PROBING ── DOWN ────▶ DEAD                     for twice as long; the caller's `dead_delay_s` holds the doubling

A whole cohort must fail before the endpoint is called dead, since N requests started together fail together and are
one piece of news; five at least, so that a window of 1 is not killed by one lost packet. HOLD (a 500: the handler is
broken, the host is not) says nothing about how many and ends a run of failures, because the endpoint did answer: one
that says nothing but 500 never dies. IGNORE (our own shutdown, a refused address) is no news about the endpoint.

**Invariant.** READY: 1 ≤ size ≤ limit. DEAD: size = 0. PROBING: size = 1. So `busy < size` is the whole test for
another request, in every state. Every change of health begins a new generation, and a result counts only in the
generation it began in: sixteen timeouts that trickle in after the death do not fail the probe, and a success that was
sent before it does not call the dead back.

**Edge.** Requests of an older generation still count as busy, so a probe waits for them: the limit on simultaneous
requests is a promise to the subscriber and outlives our opinion of him. A limit lowered at run time takes the size
with it at once; what is in flight above it finishes.

**Source.** Postfix 2.5, SCHEDULER_README, "Concurrency scheduling" (W. Venema, P. Rak, V. Duchovni): per-destination
concurrency, 1/N feedback, pseudo-cohorts, dead destinations. Its experiment with a server that accepts 5 at once
repeats here: 16.7 % refused at a mean window of 5.2. Ours are the generation, and probing with one request.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, StrEnum
from typing import Final, assert_never

INITIAL: Final = 4  # enough to find out in one round trip; Postfix starts with 5
DEATH_RUN_MIN: Final = 5  # failures in a row that a small window must see before it is called dead


class Health(StrEnum):
    """Whether the endpoint is believed to answer."""

    READY = "ready"
    DEAD = "dead"
    PROBING = "probing"


class Signal(Enum):
    """What one result teaches about the endpoint."""

    UP = "up"  # it answered and could bear more
    DOWN = "down"  # it refused, drowned or did not answer
    HOLD = "hold"  # it answered; that says nothing about how much it can bear
    IGNORE = "ignore"  # not its doing


Turn = tuple[Health, Health]
"""(old, new): one change of health."""

TRANSITIONS: Final[dict[Health, frozenset[Health]]] = {
    Health.READY: frozenset({Health.DEAD}),
    Health.DEAD: frozenset({Health.PROBING}),
    Health.PROBING: frozenset({Health.READY, Health.DEAD}),
}

# Looking a member up on its class costs 115 ns in CPython 3.11, a module's name 16: `learn` runs once per attempt.
_READY: Final = Health.READY
_DEAD: Final = Health.DEAD
_PROBING: Final = Health.PROBING
_UP: Final = Signal.UP


class Window:
    """One endpoint's concurrency and liveness. Time comes as monotonic seconds; nothing here waits or draws lots."""

    __slots__ = (
        "dead_until",
        "death_run",
        "deaths",
        "down",
        "failures",
        "generation",
        "health",
        "initial",
        "limit",
        "size",
        "up",
    )

    def __init__(self, limit: int) -> None:
        assert limit >= 1, f"a window needs room for one request, not {limit}"
        self.limit = limit
        self.initial = min(INITIAL, limit)
        self.size = self.initial
        self.up = self.size  # successes until the next step up
        self.down = 1  # failures until the next step down
        self.failures = 0  # in a row
        self.death_run = 0  # how many in a row are fatal; set when a run begins
        self.health = _READY
        self.generation = 0
        self.dead_until = 0.0
        self.deaths = 0  # since the last answer

    def learn(
        self, signal: Signal, busy: int, generation: int, now: float, dead_delay_s: Callable[[int], float]
    ) -> Turn | None:
        """Take in one result; return (old, new) if it changed the health.

        `busy` counts the requests in flight with this one still among them. `generation` is what `self.generation`
        was when the request began. `dead_delay_s(deaths)` gives the seconds to stay dead, `deaths` counted from 1.
        """
        if generation != self.generation:
            return None
        if signal is _UP and self.health is _READY:  # the ordinary case first
            self.failures = 0
            if self.size < self.limit and self.size < busy + self.initial:
                self.up -= 1
                if not self.up:
                    self._step(self.size + 1, down=1)
            return None
        return self._learn_rarer(signal, now, dead_delay_s)

    def wake(self, now: float) -> Turn | None:
        """Let a dead endpoint whose time is over be probed; return (old, new) if that is so."""
        return self._turn(_PROBING) if self.health is _DEAD and now >= self.dead_until else None

    def resize(self, limit: int) -> None:
        """Take a new limit. A higher one is grown into, a lower one holds at once."""
        assert limit >= 1, f"a window needs room for one request, not {limit}"
        self.limit = limit
        self.initial = min(INITIAL, limit)
        if self.size > limit:
            self._step(limit, down=min(self.down, limit))

    def _learn_rarer(self, signal: Signal, now: float, dead_delay_s: Callable[[int], float]) -> Turn | None:
        assert self.health is not _DEAD, "nothing begins while the endpoint is dead"
        match signal:
            case Signal.IGNORE:
                return None
            case Signal.DOWN if self.health is _PROBING:
                return self._die(now, dead_delay_s)
            case Signal.DOWN:
                return self._fail(now, dead_delay_s)
            case Signal.UP | Signal.HOLD if self.health is _PROBING:
                return self._turn(_READY)
            case Signal.UP | Signal.HOLD:
                self.failures = 0
                return None
            case _:
                assert_never(signal)

    def _fail(self, now: float, dead_delay_s: Callable[[int], float]) -> Turn | None:
        if not self.failures:
            self.death_run = max(DEATH_RUN_MIN, self.size)
        self.failures += 1
        if self.failures >= self.death_run:
            return self._die(now, dead_delay_s)
        self.down -= 1
        if not self.down:
            size = max(1, self.size - 1)
            self._step(size, down=size)
        return None

    def _step(self, size: int, *, down: int) -> None:
        self.size = self.up = size
        self.down = down

    def _die(self, now: float, dead_delay_s: Callable[[int], float]) -> Turn:
        self.deaths += 1
        self.dead_until = now + dead_delay_s(self.deaths)
        return self._turn(_DEAD)

    def _turn(self, new: Health) -> Turn:
        """Change the health: the only place that does."""
        old = self.health
        assert new in TRANSITIONS[old], f"{old} cannot become {new}"
        self.health = new
        self.generation += 1
        self.failures = 0
        if new is _READY:
            self.deaths = 0
        self._step({_READY: self.initial, _DEAD: 0, _PROBING: 1}[new], down=1)
        return old, new

    @property
    def outlook(self) -> str:
        """What happens next, for people: `up in 2`, `at its limit`, `dead until 31.5`, `one probe`."""
        if self.health is _DEAD:
            return f"dead until {self.dead_until:.1f}"
        if self.health is _PROBING:
            return "one probe"
        return f"up in {self.up}" if self.size < self.limit else "at its limit"

    def __repr__(self) -> str:
        return f"<Window {self.health.name} {self.size} of {self.limit}, {self.outlook}>"
