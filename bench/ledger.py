"""Who sent what and when it came: one mapping in memory, shared by producer, receiver and harness.

**Problem.** A benchmark that loses count proves nothing, and one that logs a line per request measures its own logging.

**Rule.** Every event bears its number in its id, so an event and an endpoint name one cell of a table. The producer
writes when the event was due and when its COMMIT was acknowledged; the receiver counts requests per cell and keeps
the moment of the first byte of the first and of the last one. Both write plain integers into a file mapped by all: no
messages, no parsing, nothing to collect afterwards, and it outlives a crash of either. All moments are
CLOCK_MONOTONIC, one clock for every process.

**Invariant.** sent = received + missing, cell by cell; whatever else came is a duplicate (counted) or foreign (never
sent). A run with anything missing, foreign, astray (at a webhook it was not for) or forged (one in 64 is examined:
signature and body), or whose database holds another number of events than were acknowledged, is void.

**Layout**: 16 counters; `due` and `acked` per event; `first` and `last` per delivery (64 bits each); `count` per
delivery (a byte). An event that goes to `fanout` endpoints has that many neighbouring cells: its group's endpoints
are numbered without gaps.
"""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Final

HEAD: Final = 16
REQUESTS, DISTINCT, OPEN, FOREIGN, ACCEPTED, ASTRAY, EXAMINED, FORGED = range(8)  # counters, all kept by the receiver
REPEATS_MAX: Final = 255  # of one delivery; a byte each
NEVER: Final = 0

ID_PREFIX: Final = "evt_"
ID_DIGITS: Final = 32  # as long as the ids that the database makes
TYPE_PREFIX: Final = "bench.g"
GROUP_DIGITS: Final = 5


def event_id(number: int) -> str:
    """The id that an event of this number bears."""
    return f"{ID_PREFIX}{number:0{ID_DIGITS}d}"


def event_type(group: int) -> str:
    """The type that a group of endpoints subscribes to."""
    return f"{TYPE_PREFIX}{group:0{GROUP_DIGITS}d}"


def endpoint_path(endpoint: int) -> str:
    """Where an endpoint receives."""
    return f"/e{endpoint:0{GROUP_DIGITS}d}"


class Ledger:
    """The mapping, as any of the three sees it."""

    def __init__(self, path: Path, events: int, fanout: int) -> None:
        self.path = path
        self.events = events
        self.fanout = fanout
        cells = events * fanout
        size = 8 * (HEAD + 2 * events + 2 * cells) + cells
        if not path.exists():
            with path.open("wb") as file:
                file.truncate(size)
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)
        whole = memoryview(self._map)
        numbers = whole[: 8 * (HEAD + 2 * events + 2 * cells)].cast("q")
        self.head = numbers[:HEAD]
        at = HEAD
        self.due = numbers[at : (at := at + events)]
        self.acked = numbers[at : (at := at + events)]
        self.first = numbers[at : (at := at + cells)]
        self.last = numbers[at : at + cells]
        self.count = whole[8 * (HEAD + 2 * events + 2 * cells) :]
        self._views = (self.head, self.due, self.acked, self.first, self.last, self.count, numbers, whole)

    def __repr__(self) -> str:
        return f"<Ledger {self.requests} requests, {self.distinct} of {self.events * self.fanout} deliveries>"

    @property
    def requests(self) -> int:
        """How many came, duplicates included."""
        return self.head[REQUESTS]

    @property
    def distinct(self) -> int:
        """How many deliveries have come."""
        return self.head[DISTINCT]

    def cells(self, event: int) -> range:
        """The deliveries of an event."""
        return range(event * self.fanout, (event + 1) * self.fanout)

    def close(self) -> None:
        """Let go of the mapping."""
        for view in self._views:
            view.release()
        self._map.close()

    def latencies_ns(self, events: Iterable[int], *, since: str = "due") -> list[int]:
        """From `due` or `acked` of each event to the first byte of each of its deliveries that came."""
        start, first = (self.due if since == "due" else self.acked), self.first
        return [first[cell] - start[event] for event in events for cell in self.cells(event) if first[cell] != NEVER]

    def balance(self, events: Iterable[int], committed: int) -> Balance:
        """Close the books over events that had to arrive; `committed` is how many the database holds of all."""
        fanout, acked, count = self.fanout, self.acked, self.count
        sent = received = requests = 0
        for event in events:
            if acked[event] == NEVER:
                continue
            counts = count[event * fanout : (event + 1) * fanout].tolist()
            sent += fanout
            received += fanout - counts.count(0)
            requests += sum(counts)
        acknowledged = self.events - self.acked.tolist().count(NEVER)
        return Balance(
            sent=sent,
            received=received,
            duplicates=requests - received,
            foreign=self.head[FOREIGN],
            astray=self.head[ASTRAY],
            examined=self.head[EXAMINED],
            forged=self.head[FORGED],
            acknowledged=acknowledged,
            committed=committed,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Balance:
    """The books of one run."""

    sent: int  # deliveries that had to come
    received: int  # of these, how many came at least once
    duplicates: int
    foreign: int  # requests that nobody sent
    astray: int  # events that came to a webhook they were not for
    examined: int  # requests whose signature and body were looked at
    forged: int  # of these, those that were not what a subscriber is promised
    acknowledged: int  # events whose COMMIT the producer saw
    committed: int  # events the database holds

    @property
    def missing(self) -> int:
        """Deliveries that never came."""
        return self.sent - self.received

    @property
    def faults(self) -> list[str]:
        """Why this run is void; empty if it is not."""
        return [
            text
            for is_wrong, text in (
                (self.missing, f"{self.missing:,} of {self.sent:,} deliveries are missing"),
                (self.foreign, f"{self.foreign:,} requests came that nobody sent"),
                (self.astray, f"{self.astray:,} requests came to another webhook than the event was for"),
                (self.forged, f"{self.forged:,} of {self.examined:,} examined requests had a wrong signature or body"),
                (
                    self.acknowledged != self.committed,
                    f"the database holds {self.committed:,} events, {self.acknowledged:,} were acknowledged",
                ),
                (not self.sent, "nothing was sent"),
            )
            if is_wrong
        ]

    def to_json(self) -> dict[str, object]:
        """All of it."""
        return {**dataclasses.asdict(self), "missing": self.missing, "faults": self.faults}
