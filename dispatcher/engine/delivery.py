"""What is in motion: an event in memory, the page it came on, one delivery of it, and the webhook it goes to.

Nothing here decides or moves: the deliverer, the outbox reader, the retries and the ledger share these.
"""

from __future__ import annotations

import math
from datetime import datetime
from enum import Enum
from typing import Any, Final

from dispatcher.core.lanes import Lane
from dispatcher.core.rendering import TEXT_BYTES_MAX, Payload
from dispatcher.core.signing import Signer
from dispatcher.errors import Undeliverable
from dispatcher.model import DeliveryKey, Endpoint
from dispatcher.moments import SECOND_US, to_datetime, whole_second

FIRST_KEY: Final = (-1, -1)
LAST_KEY: Final = (1 << 63, 0)


class Row(Enum):
    """Whether a delivery in memory has a pending row as well, and of which kind."""

    NONE = "none"
    DUE = "due"
    HELD = "held"


def payload_of(event_id: str, type_: str, created_us: int | None, data: str | None) -> Payload:
    """The payload of a row of the outbox, `created_us` a moment.

    Raises Undeliverable for what the store could make nothing of, too.
    """
    if created_us is None:
        raise Undeliverable("created_at is beyond the years 2 to 9998")
    if data is None:
        raise Undeliverable(f"data is over {TEXT_BYTES_MAX} bytes as written")
    return Payload(event_id, type_, whole_second(created_us // SECOND_US), data)


class Event:
    """One event in memory: where it lies in the outbox, and its payload; None where nobody is going to send it now."""

    __slots__ = ("payload", "seq", "traceparent", "written_us", "xid")

    def __init__(
        self, seq: int, xid: int, written_us: int, payload: Payload | None, traceparent: str | None = None
    ) -> None:
        self.seq = seq
        self.xid = xid
        self.written_us = written_us  # a moment
        self.payload = payload
        self.traceparent = traceparent  # what the application left there: 55 characters of its own choice

    @property
    def written_at(self) -> datetime:
        """When its row was written."""
        return to_datetime(self.written_us)


class OpenPage:
    """A page of the outbox with deliveries not resolved yet; the cursor may not pass it before `left` is zero."""

    __slots__ = ("after", "data_bytes", "left", "read_at")

    def __init__(self, after: Any, read_at: float, data_bytes: int = 0) -> None:
        self.after = after  # the cursor once this page is resolved
        self.left = 1  # one for the routing itself
        self.read_at = read_at  # loop time
        self.data_bytes = data_bytes  # of its events


class Delivery:
    """One event for one webhook, in memory."""

    __slots__ = ("attempts", "era", "event", "generation", "other_secret", "page", "row", "sent_wall", "subscriber")

    def __init__(
        self,
        event: Event,
        subscriber: Subscriber,
        page: OpenPage | None,
        *,
        generation: int = 0,
        attempts: int = 0,
        row: Row = Row.NONE,
    ) -> None:
        self.event = event
        self.subscriber = subscriber
        self.page = page
        self.generation = generation
        self.attempts = attempts  # made so far
        self.row = row
        self.era = 0  # the window's generation when the request began
        self.other_secret = False  # the second try during a rotation's grace
        self.sent_wall = 0.0

    @property
    def key(self) -> DeliveryKey:
        """Its name in the database."""
        return (self.subscriber.endpoint.id, self.event.seq, self.generation)

    def __repr__(self) -> str:
        return f"<Delivery {self.key} after {self.attempts} attempts, row {self.row.name}>"


class Subscriber:
    """A webhook in the engine: its settings, its lane and pool, how it signs, and where its backlog stands."""

    __slots__ = (
        "after", "answered_at", "awaited", "backlog", "behind", "endpoint", "error", "head", "head_key", "held", "lane",
        "origin", "parks", "resign_at", "signer", "unflushed",
    )  # fmt: skip

    def __init__(self, endpoint: Endpoint, lane: Lane[Delivery]) -> None:
        self.endpoint = endpoint
        self.lane = lane
        self.origin: Any = None  # None: the guard refuses its URL
        self.signer: Signer = Signer(None)
        self.head = ""  # request line and the header fields that never change, in Latin-1
        self.error: str | None = None
        self.resign_at = math.inf  # Unix time at which the previous secret ceases to sign
        self.held = False  # something may be held in the database
        self.backlog = False  # and new deliveries go behind it
        self.after: tuple[int, int] = FIRST_KEY  # (event sequence, generation) pulled so far
        self.behind: tuple[int, int] = LAST_KEY  # what a pull under way brings from behind this is out of date
        self.head_key: DeliveryKey | None = None  # ordered: the failed delivery the others wait for
        self.parks = 0  # times something was parked, ever
        self.unflushed = 0  # parked and not yet in the database
        self.awaited = 0  # ordered: how many of these must be there before anything is pulled
        self.answered_at = 0.0  # loop time of its last result

    def await_order(self) -> None:
        """Ordered: pull nothing before all that is parked by now is in the database. Something older is among it."""
        self.awaited = self.unflushed

    def rewind(self, to: tuple[int, int] = FIRST_KEY) -> None:
        """Pull again from behind `to`: something was put there."""
        self.after = min(self.after, to)
        self.behind = min(self.behind, to)

    def __repr__(self) -> str:
        return f"<Subscriber {self.endpoint.public_id} {self.lane}{', backlog' if self.backlog else ''}>"
