"""The log of deliveries: one wide line for each attempt that failed, and for a share of those that did not.

A line has all that is needed to go on from it: the ids by which API and dashboard know webhook, event and delivery,
what the request came to, and when it is tried again. The keys are stable and documented in the README.

It is asked about failures only, unless a share of successes is wanted; what succeeds then costs one comparison. What
is settled without a request (its webhook was deleted) has no line: there may be a hundred thousand at once, and all
are on record.

When hundreds of attempts a second fail, nobody reads each, and writing them down would slow what succeeds. Beyond
`LINES_PER_S` they are counted; once a second is over, the next line is preceded by one that says how many.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import datetime
from typing import Final

from dispatcher.core.attempt import Attempt
from dispatcher.core.ids import DeliveryIds
from dispatcher.core.traces import trace_id
from dispatcher.engine.delivery import Delivery
from dispatcher.logs import Wide
from dispatcher.model import DeliveryState

LINES_PER_S: Final = 250  # under 1 % of the loop, 0.1 MB
LEVELS: Final = {
    DeliveryState.DELIVERED.value: logging.INFO,
    DeliveryState.RETRYING.value: logging.INFO,
    DeliveryState.EXHAUSTED.value: logging.WARNING,
    DeliveryState.DISCARDED.value: logging.WARNING,
}


class Journal:
    """Writes the lines. `failures` and `successes` (a share, 0 to 1) may change at any time."""

    def __init__(
        self,
        ids: DeliveryIds,
        *,
        failures: bool = True,
        successes: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.failures = failures
        self.successes = successes
        self._ids = ids
        self._lines = Wide("dispatcher.deliveries")
        self._due = 0.0  # of a line for a success
        self._clock = clock
        self._second_ends = 0.0
        self._room = 0  # lines until then
        self._left_out = 0  # lines, and not told yet

    def failed(
        self, delivery: Delivery, attempt: Attempt, state: str, number: int, next_attempt_at: datetime | None
    ) -> None:
        """An attempt failed."""
        if self.failures:
            self._write(delivery, attempt, state, number, next_attempt_at)

    def succeeded(self, delivery: Delivery, attempt: Attempt, number: int) -> None:
        """An attempt succeeded: every so manieth has a line."""
        self._due += self.successes
        if self._due >= 1.0:
            self._due -= 1.0
            self._write(delivery, attempt, DeliveryState.DELIVERED.value, number, None)

    def discarded_event(self, event_id: str, account: str, type_: str, reason: str) -> None:
        """No body can be made of an event."""
        if self.failures:
            fields = {"account": account, "event_id": event_id, "type": type_, "reason": reason}
            self._lines.write(logging.WARNING, "event.discarded", fields)

    def _write(
        self, delivery: Delivery, attempt: Attempt, state: str, number: int, next_attempt_at: datetime | None
    ) -> None:
        level = LEVELS[state]
        if not self._lines.is_on(level) or not self._has_room():
            return
        endpoint, event = delivery.subscriber.endpoint, delivery.event
        payload = event.payload
        assert payload is not None, "nothing is sent unread"
        self._lines.write(
            level,
            f"delivery.{state}",
            {
                "account": endpoint.account,
                "webhook": endpoint.public_id,
                "delivery": self._ids.id_of(endpoint.id, event.seq, delivery.generation),
                "event_id": payload.event_id,
                "type": payload.type,
                "attempt": number,
                "result": attempt.result.value,
                "status": attempt.status or None,
                "duration_ms": round(attempt.duration_s * 1e3, 1),
                "error": attempt.error,
                "next_attempt_at": next_attempt_at and f"{next_attempt_at:%Y-%m-%dT%H:%M:%S.%f}Z",
                "trace_id": trace_id(event.traceparent),
            },
        )

    def _has_room(self) -> bool:
        """Whether another line may be written in this second; count it as left out if not."""
        now = self._clock()
        if now >= self._second_ends:
            self._second_ends, self._room = now + 1.0, LINES_PER_S
            if self._left_out:
                self._lines.write(logging.WARNING, "delivery.unlogged", {"lines": self._left_out})
                self._left_out = 0
        if not self._room:
            self._left_out += 1
            return False
        self._room -= 1
        return True
