"""Deliveries in motion: from a lane to the wire, and from what came back to the ledger.

**Owner.** A delivery has one owner at any instant: outbox row → lane → in flight → ledger → settled, or a pending row →
wheel or backlog → lane. Whatever takes it over here takes it whole, without an await between looking and changing.

**Where a delivery that cannot go waits.** In a pending row. A failed one is *due* at its time. One whose webhook is
paused, dead, full or waits for its head (`ordered`) is *held*: due at infinity, pulled oldest first when the webhook
can take more. As long as a webhook has a `backlog`, new deliveries queue up behind what is held.

**Conservation.** What was taken over is queued, in flight, or was handed on: to the ledger, which settles it or
writes its pending row, or back to where it came from. `balance` says by how much that is off, and is zero at every
step. What is in memory, the ledger's buffer included, and has or is about to get a pending row is in `rows`, until a
commit says that only one of the two is left.

**Never.** No exception of an endpoint's making passes here; nothing is dropped silently.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Protocol

from dispatcher.core.addresses import Guard, Target
from dispatcher.core.attempt import Attempt
from dispatcher.core.backoff import dead_delay_s, next_delay_s, retry_after_s
from dispatcher.core.catalogue import OWN_TYPES
from dispatcher.core.ids import DeliveryIds
from dispatcher.core.lanes import Lane, Lanes, Offer
from dispatcher.core.outcome import RELEASED, Outcome, Verdict, judge
from dispatcher.core.signing import Signer
from dispatcher.core.traces import is_traceparent
from dispatcher.core.window import Health
from dispatcher.engine.connection import Released
from dispatcher.engine.delivery import Delivery, Row, Subscriber
from dispatcher.engine.journal import Journal
from dispatcher.engine.ledger import Ledger
from dispatcher.engine.spans import Spans
from dispatcher.errors import AddressRefused, Undeliverable
from dispatcher.model import (
    BodyStyle,
    DeliveryKey,
    DeliveryState,
    Endpoint,
    EndpointId,
    EndpointStatus,
    Result,
)
from dispatcher.moments import BEGINNING_UNIX_S, SECOND_US
from dispatcher.store.shard import HELD_UNTIL
from dispatcher.telemetry import Telemetry

PULL_BELOW: Final = 64  # whoever has more than this queued is not asked whether it is hungry
LANE_DUE_MAX: Final = 128  # retries that come due behind so many others are held: a lane's part of their room
# What else is to be done waits behind no more than 4 ms of sending. It pays, too: answers are taken in while the next
# requests are made (10 endpoints, a drain: 33,000/s; all at once 29,000; 32 at a time 25,000).
SENDS_PER_TURN: Final = 128
RELEASE_DELAY_S: Final = 1.0  # our own fault (no file descriptors, …): soon, but not in a spin
_DELIVERED: Final = DeliveryState.DELIVERED.value
_RETRYING: Final = DeliveryState.RETRYING.value
_EXHAUSTED: Final = DeliveryState.EXHAUSTED.value
_DISCARDED: Final = DeliveryState.DISCARDED.value
_PENDING: Final = DeliveryState.PENDING.value
_COMPACT: Final = BodyStyle.COMPACT
# An Enum's member looked up on its class costs 115 ns in CPython 3.11, a module's name 16.
_QUEUED: Final = Offer.QUEUED
_TO_RELEASE: Final = Verdict.RELEASE
_TO_DELIVERED: Final = Verdict.DELIVERED
_TO_DISABLE: Final = Verdict.DISABLE
_TO_RETRY: Final = Verdict.RETRY
_NO_ROW: Final = Row.NONE
_DUE: Final = Row.DUE
_HELD: Final = Row.HELD


class Pools(Protocol):
    """What is asked of the transport; of a pool, no more than `submit` and the ways to end it."""

    def origin(self, target: Target, may_send: Callable[[], bool]) -> Any: ...  # noqa: D102
    async def close_origins(self, origins: set[Any]) -> None: ...  # noqa: D102


class Deliverer:
    """Every delivery in memory, and the acts upon it."""

    def __init__(
        self,
        *,
        lanes: Lanes[Delivery],
        ledger: Ledger,
        transport: Pools,
        guard: Guard,
        telemetry: Telemetry,
        ids: DeliveryIds,
        loop: asyncio.AbstractEventLoop,
        jitter: float,
        user_agent: str,
        header_prefix: str,
        wall: Callable[[], float] = time.time,
        dice: random.Random | None = None,
    ) -> None:
        self.lanes = lanes
        self.subscribers: dict[int, Subscriber] = {}
        self.rows: set[DeliveryKey] = set()  # in memory, and in a pending row too
        self.taken = 0  # deliveries taken over, ever
        self.passed_on = 0  # of these, to the ledger or back
        self.in_flight: dict[Delivery, None] = {}  # in the order they went out
        self.running = False  # False: nothing new goes out
        self.valid_until = math.inf  # loop time: nor does it after that, unless the lease is renewed
        self.journal = Journal(ids)
        self.logs_successes = False
        self.spans: Spans | None = None  # exported to OpenTelemetry, if at all
        self.on_hungry: Callable[[Subscriber], None] = lambda subscriber: None
        self.on_dismissed: Callable[[int], None] = lambda endpoint_id: None
        self._ledger = ledger
        self._transport = transport
        self._guard = guard
        self._telemetry = telemetry
        self._ids = ids
        self._loop = loop
        self._jitter = jitter
        self._user_agent = user_agent
        self._prefix = header_prefix
        self._wall = wall
        self._random = (dice or random.Random()).random  # noqa: S311  spreads load, guards nothing
        self._timer: asyncio.TimerHandle | None = None
        self._goes_on = False  # the next turn of the loop sends more
        self._idle: asyncio.Event = asyncio.Event()
        self._event_field = f"{header_prefix}Event: "
        self._delivery_field = f"\r\n{header_prefix}Delivery: "
        self._attempt_field = f"\r\n{header_prefix}Attempt: "

    @property
    def balance(self) -> int:
        """Deliveries nobody can account for: zero."""
        return self.taken - self.passed_on - self.lanes.queued - len(self.in_flight)

    # ── subscribers ────────────────────────────────────────────────────────────────────────────────────────────────

    def subscriber(self, endpoint: Endpoint) -> Subscriber:
        """The subscriber of a webhook, made or brought up to date."""
        found = self.subscribers.get(endpoint.id)
        if found is not None:
            if found.endpoint is not endpoint:
                self._update(found, endpoint)
            return found
        lane = self.lanes.lane(
            endpoint.id, limit=endpoint.max_concurrency, rate_limit=endpoint.rate_limit, ordered=endpoint.ordered
        )
        if endpoint.status is not EndpointStatus.ACTIVE:
            self.lanes.pause(lane)
        made = self.subscribers[endpoint.id] = Subscriber(endpoint, lane)
        self._equip(made)
        return made

    def _update(self, subscriber: Subscriber, endpoint: Endpoint) -> None:
        old, subscriber.endpoint = subscriber.endpoint, endpoint
        self.lanes.update(
            subscriber.lane, limit=endpoint.max_concurrency, rate_limit=endpoint.rate_limit, ordered=endpoint.ordered
        )
        if old.url != endpoint.url and subscriber.origin is not None:
            subscriber.origin.close()
            subscriber.origin = None
        is_resumed = old.status is not endpoint.status and endpoint.status is EndpointStatus.ACTIVE
        if is_resumed:
            self._ledger.forgive(endpoint.id)
        if old.url != endpoint.url or is_resumed:
            self.lanes.revive(subscriber.lane)
        if not endpoint.ordered:
            subscriber.head_key = None
        if old.status is EndpointStatus.DISABLED:  # what is not discarded yet comes before anything new
            subscriber.held = subscriber.backlog = True
            subscriber.rewind()
        self._equip(subscriber)

    def _equip(self, subscriber: Subscriber) -> None:
        endpoint = subscriber.endpoint
        now = self._wall()
        expires = endpoint.previous_secret_expires_at
        is_rotating = expires is not None and expires.timestamp() > now
        previous = endpoint.previous_secret if is_rotating else None
        subscriber.resign_at = expires.timestamp() if expires is not None and is_rotating else math.inf
        subscriber.signer = Signer(endpoint.secret, previous, prefix=self._prefix)
        try:
            target = self._guard.check_url(endpoint.url)
        except AddressRefused as error:
            subscriber.error = str(error)
            if subscriber.origin is not None:
                subscriber.origin.close()
                subscriber.origin = None
            return
        if subscriber.origin is None:
            subscriber.origin = self._transport.origin(target, self._may_send)
        own = "".join(f"{name}: {value}\r\n" for name, value in endpoint.headers)
        subscriber.head = (
            f"POST {target.path} HTTP/1.1\r\nHost: {target.host_header}\r\nContent-Type: application/json\r\n"
            f"User-Agent: {self._user_agent}\r\n{own}{self._event_field}"
        )

    def reconfigure(self, guard: Guard, jitter: float) -> None:
        """Take changed settings over; every webhook's URL is judged anew."""
        self._guard = guard
        self._jitter = jitter
        for subscriber in self.subscribers.values():
            self._equip(subscriber)

    def apply(self, endpoints: Callable[[EndpointId], Endpoint | None]) -> None:
        """Take a changed registry over: new settings now, and what is paused, disabled or gone stops at once."""
        for endpoint_id in self._ledger.learnt_of():  # also of webhooks that were swept, which nobody sees resumed
            known = endpoints(EndpointId(endpoint_id))
            if known is None or known.status is not EndpointStatus.ACTIVE:
                self._ledger.forgive(endpoint_id)
        for subscriber in list(self.subscribers.values()):
            endpoint = endpoints(subscriber.endpoint.id)
            if endpoint is None:
                self._dismiss(subscriber)
                continue
            if endpoint is not subscriber.endpoint:
                self._update(subscriber, endpoint)
            if endpoint.status is EndpointStatus.DISABLED:
                self._disable(subscriber)
            elif endpoint.status is EndpointStatus.PAUSED:
                self._hold(subscriber)
            elif subscriber.lane.paused:
                self.lanes.resume(subscriber.lane)
                self.on_hungry(subscriber)
        self.pump()

    def _hold(self, subscriber: Subscriber) -> None:
        if not subscriber.lane.paused:
            self.lanes.pause(subscriber.lane)
        self._put_back(subscriber, self.lanes.release(subscriber.lane))

    def _disable(self, subscriber: Subscriber) -> None:
        """Discard what waits. The subscriber stays: enabled again, it still has requests out and its head."""
        self.lanes.pause(subscriber.lane)
        for delivery in self.lanes.release(subscriber.lane):
            self.discard(delivery, "the webhook is disabled")
        self.on_dismissed(subscriber.endpoint.id)

    def _dismiss(self, subscriber: Subscriber) -> None:
        del self.subscribers[subscriber.endpoint.id]
        for delivery in self.lanes.forget(subscriber.lane):
            self.discard(delivery, "the webhook was deleted")
        if subscriber.origin is not None:
            subscriber.origin.close()
        self.on_dismissed(subscriber.endpoint.id)

    def sweep(self) -> None:
        """Forget webhooks that have been idle for a while; what is heard of again is made again."""
        for key in self.lanes.sweep(self._loop.time()):
            subscriber = self.subscribers[key]
            endpoint = subscriber.endpoint
            if subscriber.held or subscriber.unflushed or subscriber.head_key is not None:
                subscriber.lane = self.lanes.lane(
                    key, limit=endpoint.max_concurrency, rate_limit=endpoint.rate_limit, ordered=endpoint.ordered
                )
                continue
            del self.subscribers[key]
            if subscriber.origin is not None:
                subscriber.origin.close()

    # ── in ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def offer(self, delivery: Delivery) -> None:
        """Take a first attempt over: into its lane if that can take it, else held behind the others."""
        subscriber = delivery.subscriber
        self.taken += 1
        if (
            subscriber.backlog
            or delivery.event.payload is None
            or self.lanes.offer(subscriber.lane, delivery, self._loop.time()) is not _QUEUED
        ):
            self.park(delivery)

    def holds_all(self, endpoints: Sequence[Endpoint]) -> bool:
        """Whether a new event of all these webhooks would be parked: it is read again before it is sent."""
        subscribers = self.subscribers
        for endpoint in endpoints:
            subscriber = subscribers.get(endpoint.id)
            if subscriber is None or not subscriber.backlog:
                return False
        return True

    def recall(self, delivery: Delivery) -> bool:
        """Take over a delivery that has a pending row: it came due, or was pulled.

        False: its lane cannot take it now. Then a held one stays what it is, and one that came due is held.
        """
        subscriber = delivery.subscriber
        lane = subscriber.lane
        is_due = delivery.row is _DUE
        goes_beside = is_due and not subscriber.endpoint.ordered
        if not (is_due and len(lane.due) >= LANE_DUE_MAX) and (
            self.lanes.offer(lane, delivery, self._loop.time(), retry=True, due=goes_beside) is _QUEUED
        ):
            self.taken += 1
            self.rows.add(delivery.key)
            return True
        if is_due:
            self.hold(delivery)
        return False

    def hold(self, delivery: Delivery) -> None:
        """Take a delivery over and hold it, whatever its lane could do."""
        self.taken += 1
        self.park(delivery)

    def park(self, delivery: Delivery) -> None:
        """Hold a delivery in a pending row until its webhook can take it."""
        subscriber = delivery.subscriber
        subscriber.held = subscriber.backlog = True
        subscriber.parks += 1
        self.passed_on += 1
        if delivery.row is _HELD:
            self.rows.discard(delivery.key)
            subscriber.rewind()
            self.on_hungry(subscriber)
        else:
            subscriber.unflushed += 1
            self._write_row(delivery, HELD_UNTIL)

    def _write_row(self, delivery: Delivery, due: datetime, error: str | None = None) -> None:
        """Hand a delivery to the ledger for its pending row, which others may see before we hear of the commit."""
        self.rows.add(delivery.key)
        self._ledger.pending(delivery, _RETRYING if delivery.attempts else _PENDING, due, error)

    def _put_back(self, subscriber: Subscriber, deliveries: list[Delivery]) -> None:
        """Hold what was queued. Younger ones may have been parked before, in a batch that commits before this one."""
        if not deliveries:
            return
        for delivery in deliveries:
            self.park(delivery)
        subscriber.await_order()
        oldest = min([(delivery.event.seq, delivery.generation) for delivery in deliveries])
        subscriber.rewind((oldest[0], oldest[1] - 1))

    def discard(self, delivery: Delivery, reason: str) -> None:
        """Settle a delivery that will never be sent, without an attempt."""
        self.passed_on += 1
        self._ledger.attempt(delivery, None, _DISCARDED, delivery.attempts, reason)
        self._telemetry.deliveries[_DISCARDED] += 1
        if delivery.row is not _NO_ROW:
            self._ledger.settled(delivery)

    # ── out ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def pump(self) -> None:
        """Send whatever may go now: some of it at once, the rest in the next turns of the loop."""
        if self._goes_on or not self.running or self._ledger.full:
            return
        lanes, now = self.lanes, self._loop.time()
        if now > self.valid_until:  # we hung: the lease may be another's by now
            return
        room = SENDS_PER_TURN
        while (turn := lanes.next(now)) is not None:
            lane, delivery = turn
            delivery.era = lane.window.generation
            self.in_flight[delivery] = None
            self._send(delivery)
            room -= 1
            if not room:
                self._goes_on = True
                self._loop.call_soon(self._go_on)
                return
        wake = lanes.next_wake()
        if wake is not None and (self._timer is None or wake < self._timer.when()):
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(max(wake, now + 0.001), self._rated)

    def send_until(self, valid_until: float) -> None:
        """The lease is ours until then, loop time."""
        self.valid_until = valid_until
        self.pump()

    def _may_send(self) -> bool:
        return self._loop.time() <= self.valid_until

    def _go_on(self) -> None:
        self._goes_on = False
        self.pump()

    def _rated(self) -> None:
        self._timer = None
        self.pump()

    def _send(self, delivery: Delivery) -> None:
        subscriber = delivery.subscriber
        endpoint = subscriber.endpoint
        if subscriber.origin is None:
            self._loop.call_soon(self._done, delivery, Attempt(Result.BLOCKED, error=subscriber.error))
            return
        event = delivery.event
        payload = event.payload
        assert payload is not None, "nothing is sent unread"
        if endpoint.body_style is _COMPACT:
            body = payload.compact
        else:
            try:
                body = payload.body(endpoint.body_style)
            except Undeliverable as error:
                self._loop.call_soon(self._done, delivery, Attempt(Result.BLOCKED, error=str(error)))
                return
        delivery.sent_wall = wall = self._wall()
        if wall >= subscriber.resign_at:
            self._equip(subscriber)
        event_id, timestamp = payload.event_id, f"{int(wall)}"
        signer = subscriber.signer  # the grace may have ended with the answer that asked for the other secret
        by_previous = delivery.other_secret and signer.is_rotating
        signed = signer.headers(event_id, timestamp, body, by_previous=by_previous)
        if event.traceparent is not None or self.spans is not None:
            signed += self._trace(delivery)
        # One format of texts, encoded once: half the time of joining bytes.
        head = (
            f"{subscriber.head}{payload.type}"
            f"{self._delivery_field}{self._ids.id_of(endpoint.id, event.seq, delivery.generation)}"
            f"{self._attempt_field}{delivery.attempts + 1}\r\nwebhook-id: {event_id}\r\n"
            f"webhook-timestamp: {timestamp}\r\n{signed}Content-Length: {len(body)}\r\n\r\n"
        )
        request = head.encode("latin-1") + body
        subscriber.origin.submit(request, endpoint.timeout_s, self._done, delivery)

    def _trace(self, delivery: Delivery) -> str:
        """The header field that lets the subscriber's work be seen as part of what made the event."""
        given = delivery.event.traceparent
        if self.spans is not None:
            given = self.spans.begin(delivery)
        return f"traceparent: {given}\r\n" if given and is_traceparent(given) else ""

    def _done(self, delivery: Delivery, attempt: Attempt) -> None:
        """Take in what a request came to. Called once per request, by the transport."""
        if self.spans is not None:
            self.spans.end(delivery, attempt)
        subscriber = delivery.subscriber
        lane = subscriber.lane
        now = self._loop.time()
        if delivery not in self.in_flight:  # the shard was lost meanwhile: the delivery is somebody else's
            self.lanes.done(lane, RELEASED.signal, delivery.era, now, self._dead_delay_s)
            return
        if attempt.status in (401, 403) and self._has_other_secret(delivery):
            delivery.other_secret = True  # a rotation under way: the other secret, at once, not counted
            self._send(delivery)
            return
        del self.in_flight[delivery]
        self.passed_on += 1
        subscriber.answered_at = now
        outcome = RELEASED if type(attempt) is Released else judge(attempt.result, attempt.status)
        self._settle(delivery, attempt, outcome)
        dead = self.lanes.done(lane, outcome.signal, delivery.era, now, self._dead_delay_s)
        if dead is not None:
            self._put_back(subscriber, dead)
        if subscriber.held and len(lane.todo) < PULL_BELOW:
            self.on_hungry(subscriber)
        if not self.in_flight:
            self._idle.set()
        self.pump()

    def _has_other_secret(self, delivery: Delivery) -> bool:
        subscriber = delivery.subscriber
        may_send = self.running and not subscriber.lane.paused and self._may_send()
        return may_send and not delivery.other_secret and subscriber.signer.is_rotating

    def _dead_delay_s(self, deaths: int) -> float:
        return dead_delay_s(deaths, self._random())

    def _settle(self, delivery: Delivery, attempt: Attempt, outcome: Outcome) -> None:
        verdict = outcome.verdict
        telemetry = self._telemetry
        if verdict is _TO_RELEASE:
            self._release(delivery)
            return
        duration_s = attempt.duration_s
        telemetry.attempts[attempt.result] += 1
        telemetry.attempt_duration.observe(duration_s)
        subscriber = delivery.subscriber
        subscriber.lane.observe(duration_s)
        number = delivery.attempts + 1
        if number == 1 and attempt.sent_at and not delivery.generation:  # a replay's age says nothing of us
            written = delivery.event.written_us / SECOND_US + BEGINNING_UNIX_S
            telemetry.delivery_latency.observe(max(0.0, delivery.sent_wall - written))
        if verdict is _TO_DELIVERED:
            state = _DELIVERED
            subscriber.error = None
            if self.logs_successes:
                self.journal.succeeded(delivery, attempt, number)
        else:
            state, due = self._retry(delivery, attempt, outcome, number)
            subscriber.error = attempt.error or f"{attempt.status}"
            self.journal.failed(delivery, attempt, state, number, due)
        if verdict is _TO_DISABLE:
            self._ledger.disable(subscriber.endpoint.id, "the endpoint answered 410 Gone")
        telemetry.deliveries[state] += 1
        self._ledger.attempt(delivery, attempt, state, number, attempt.error)
        # What a webhook makes of our own news teaches nothing: there would be news of news without end.
        payload = delivery.event.payload
        assert payload is not None, "nothing is sent unread"
        if payload.type not in OWN_TYPES:
            self._ledger.learn(subscriber.endpoint, state, subscriber.error)
        if state is not _RETRYING and delivery.row is not _NO_ROW:
            self._ledger.settled(delivery)

    def _retry(
        self, delivery: Delivery, attempt: Attempt, outcome: Outcome, number: int
    ) -> tuple[str, datetime | None]:
        """Plan the next attempt, if there is to be one; return the delivery's state and when that is."""
        if outcome.verdict is not _TO_RETRY:
            return _DISCARDED, None
        subscriber = delivery.subscriber
        wall = self._wall()
        wait_s = retry_after_s(attempt.retry_after, wall) if outcome.honours_retry_after else None
        delay_s = next_delay_s(subscriber.endpoint.schedule_s, number, self._jitter, self._random(), wait_s)
        if delay_s is None:
            return _EXHAUSTED, None
        delivery.attempts = number
        delivery.other_secret = False
        due = datetime.fromtimestamp(wall + delay_s, UTC)
        self._write_row(delivery, due, attempt.error or str(attempt.status))
        if subscriber.endpoint.ordered:
            self._wait_for(delivery)
        return _RETRYING, due

    def _wait_for(self, delivery: Delivery) -> None:
        """An ordered webhook's delivery failed: whatever comes after it waits for its retry."""
        subscriber = delivery.subscriber
        subscriber.head_key = delivery.key
        subscriber.held = subscriber.backlog = True
        self._put_back(subscriber, self.lanes.release(subscriber.lane))

    def _release(self, delivery: Delivery) -> None:
        """Our fault or our end, not the endpoint's: not counted, and due again soon."""
        self._telemetry.released += 1
        delivery.other_secret = False
        due = datetime.fromtimestamp(self._wall() + RELEASE_DELAY_S, UTC)
        self._write_row(delivery, due)
        if delivery.subscriber.endpoint.ordered:
            self._wait_for(delivery)

    # ── what holds the cursor, and what ends ───────────────────────────────────────────────────────────────────────

    def insure(self, page_before: float, *, due_s: float) -> None:
        """Write pending rows for what is in flight since before `page_before` (loop time): the cursor may pass it.

        Stragglers: due `due_s` after their deadline, should this process not live to see their end.
        """
        late = [d for d in self.in_flight if d.page is not None and d.page.read_at < page_before]
        wall = self._wall()
        for delivery in late:
            due = datetime.fromtimestamp(wall + delivery.subscriber.endpoint.timeout_s + due_s, UTC)
            self._ledger.pending(delivery, _PENDING, due, None, straggler=True)
            delivery.row = _DUE
            self.rows.add(delivery.key)

    def spill_old(self, page_before: float) -> None:
        """Hold the queues with deliveries read before `page_before` (loop time), so that the cursor may pass them."""
        for subscriber in self.subscribers.values():
            if any(_is_older(entry, page_before) for entry in subscriber.lane.todo):
                self._put_back(subscriber, self.lanes.release(subscriber.lane))

    def spill_slow(self, drain_s: float, stalled_s: float) -> None:
        """Hold the queues that will take longer than `drain_s`, or have stood still for `stalled_s`.

        The room is for webhooks that answer.
        """
        before = self._loop.time() - stalled_s
        for subscriber in self.subscribers.values():
            lane = subscriber.lane
            if lane.queued and (
                self.drain_estimate_s(lane) > drain_s
                or (subscriber.answered_at < before and lane.todo and _is_older(lane.todo[0], before))
            ):
                self._put_back(subscriber, self.lanes.release(lane))

    def drain_estimate_s(self, lane: Lane[Delivery]) -> float:
        """About how long a lane's queue takes. Who never answered counts as fast while its oldest is young."""
        page = getattr(lane.todo[0], "page", None) if lane.todo else None
        return lane.drain_estimate_s() if page is None else lane.drain_estimate_s(self._loop.time() - page.read_at)

    def drop_queued(self) -> None:
        """Empty all lanes without a trace: outbox and pending rows will be read again."""
        for subscriber in self.subscribers.values():
            for delivery in self.lanes.release(subscriber.lane):
                self._telemetry.released += 1
                self.passed_on += 1
                self.rows.discard(delivery.key)
            subscriber.rewind()

    def forget_all(self) -> None:
        """Another daemon owns the shard now: what is in memory is not ours any more."""
        self.drop_queued()
        self.rows.clear()
        self.passed_on += len(self.in_flight)
        self.in_flight.clear()
        self._idle.set()
        for subscriber in list(self.subscribers.values()):
            del self.subscribers[subscriber.endpoint.id]
            self.lanes.forget(subscriber.lane)
            if subscriber.origin is not None:
                subscriber.origin.release_waiting("the shard was lost")
                subscriber.origin.close()

    async def drained(self, timeout_s: float) -> bool:
        """Wait until nothing is in flight; False when time is over first."""
        if not self.in_flight:
            return True
        self._idle.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Release what is in flight and close every connection. Returns when the results are in."""
        origins = {s.origin for s in self.subscribers.values() if s.origin is not None}
        await self._transport.close_origins(origins)

    def out(self, endpoint_id: int) -> set[tuple[int, int]]:
        """Which deliveries to a webhook have a request out, by (event sequence, generation)."""
        return {
            (delivery.event.seq, delivery.generation)
            for delivery in self.in_flight
            if delivery.subscriber.endpoint.id == endpoint_id
        }

    def troubled(self, most: int) -> list[Subscriber]:
        """The worst webhooks: not ready, or with the longest queues."""
        bad = [s for s in self.subscribers.values() if s.lane.window.health is not Health.READY or s.error or s.backlog]
        bad.sort(key=lambda s: (s.lane.window.health is Health.READY, -s.lane.queued))
        return bad[:most]


def _is_older(entry: Any, page_before: float) -> bool:
    """Whether an entry of a lane's queue, a first attempt that is, comes of a page read before that."""
    page = getattr(entry, "page", None)
    return page is not None and page.read_at < page_before
