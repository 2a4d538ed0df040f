"""What must hold, judged from outside: by what is committed, what arrives, and what the engine says it holds.

    at every step       each delivery in memory has one owner, the sums agree, and what leaves memory is on record or
                        behind the cursor still (conservation)
    at every commit     the cursor passes nothing that is neither settled nor in a pending row; nothing is settled or
                        logged twice; a pending row goes only with its settlement; no retry is due early
    at every request    window, `ordered`, rate limit, pause, due time, signature
    at the end          everything committed is settled for every webhook subscribed at its commit, as its receiver
                        knows; nothing is left anywhere; repeats stay within what crashes and take-overs had in hand

A *reign* is what one process sends between two take-overs: the promises about concurrency and order are made by one
owner at a time, and a daemon that does not know yet that it lost its shard is bounded by the duplicates it may cause.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import model_postgres
import model_receivers
from model_postgres import HELD, Backend, Event, Key, ModelPostgres, Transaction
from model_receivers import Arrival

from dispatcher.core.ids import DeliveryIds

if TYPE_CHECKING:
    from world import Daemon

    from dispatcher.engine.engine import Engine

EARLY_S = 1e-3  # time stamps go through microseconds
RATE_SLACK_S = 0.030  # late starts made up for, and the way to the receiver
CALM_LATENCY_S = 5.0
CALM_PAUSE_S = 1.0
FINAL = {"delivered", "exhausted", "discarded"}
Pair = tuple[int, int]  # endpoint id, event sequence


class Violation(AssertionError):
    """A promise was broken."""


class Webhook:
    """What the judge knows of a webhook."""

    def __init__(self, row: dict[str, Any], settings: Any, now: float) -> None:
        self.id = row["id"]
        self.events = tuple(row["events"])
        self.settings = settings  # the world's
        self.enabled = True
        self.enabled_at = now
        self.paused_at: float | None = None

    def wants(self, kind: str) -> bool:
        return any(f in {"*", kind} or (f.endswith(".*") and kind.startswith(f[:-1])) for f in self.events)


class Judge(model_postgres.Watch, model_receivers.Watch):
    """Sees everything, changes nothing."""

    def __init__(
        self, server: ModelPostgres, ids: DeliveryIds, note: Callable[..., None], now: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:  # fmt: skip
        self.server = server
        self.note = note
        self.now = now
        self.wall = wall
        self.violation: str | None = None
        self.calm = False
        self.jitter = 0.0
        self.daemons: dict[str, Daemon] = {}  # alive, by process name
        self.webhooks: dict[int, Webhook] = {}
        self.open: dict[Pair, Event] = {}  # committed, subscribed, and neither settled nor pending yet
        self.owed: dict[Pair, Event] = {}  # and not settled yet
        self.committed_at: dict[int, float] = {}  # by event sequence
        self.began_at: dict[int, float] = {}  # when its transaction began to write
        self.finals: dict[Key, str] = {}
        self.replayed: set[Key] = set()  # queued by replays
        self.logged: dict[Key, int] = {}  # highest attempt on record
        self.allowance = 0  # repeats that are within the bound
        self.repeats = 0
        self.epochs: Counter[int] = Counter()  # by shard
        self.fenced: set[tuple[str, int]] = set()  # processes that another one has taken a shard from
        self.retired: set[tuple[str, int]] = set()  # those that had given it up before, or never had it
        self.reigns: Counter[tuple[str, int]] = Counter()
        self.arrivals: dict[tuple[Key, int], list[Arrival]] = defaultdict(list)
        self.first_at: dict[Pair, float] = {}
        self.busy: Counter[tuple[str, int, int]] = Counter()  # (process, reign, endpoint)
        self.starts: dict[tuple[str, int, int], list[float]] = defaultdict(list)
        self.youngest: dict[tuple[str, int, int], tuple[float, int]] = {}  # of the youngest event started
        self.paused: dict[tuple[str, int], float] = {}  # (process, endpoint) -> when it learnt of the pause
        self.latest_wall = 0.0  # before the clock was set back: what was due then is due
        self.is_unsound = False  # a crash has undone commits: order and repeats say nothing any more
        self._ids = ids
        self._seen: dict[Engine, tuple[Any, set[Key], bool]] = {}  # as they were when anything moved last

    def fail(self, what: str) -> None:
        if self.violation is None:
            self.violation = what
            self.note("VIOLATION", what)

    # ── at every step ──────────────────────────────────────────────────────────────────────────────────────────────

    def step(self) -> None:
        for daemon in self.daemons.values():
            for engine in daemon.engines:
                deliverer, ledger = engine.deliverer, engine.ledger
                if deliverer.balance:
                    self.fail(f"{daemon}: {deliverer.balance} deliveries nobody can account for")
                counts = (
                    deliverer.taken, deliverer.passed_on, deliverer.lanes.queued, len(deliverer.in_flight),
                    ledger.buffered, len(deliverer.rows), deliverer.running,
                )  # fmt: skip
                seen = self._seen.get(engine)
                if seen is None or seen[0] != counts:
                    self._look_into(daemon, engine, counts)
        if self.violation is not None:
            raise Violation(self.violation)

    def _look_into(self, daemon: Daemon, engine: Engine, counts: Any) -> None:
        """Something has moved: everything is somewhere, and in one place."""
        deliverer, ledger = engine.deliverer, engine.ledger
        try:
            deliverer.lanes.check()
        except AssertionError as error:
            self.fail(f"{daemon}: {error}")
        queued = [
            getattr(entry, "item", entry)
            for s in deliverer.subscribers.values()
            for entry in (*s.lane.due, *s.lane.todo)
        ]
        owned = [*queued, *deliverer.in_flight]
        keys = {delivery.key for delivery in owned}
        if len(keys) != len(owned):
            self.fail(f"{daemon}: a delivery has two owners")
        waiting = Counter(id(delivery.page) for delivery in owned if delivery.page is not None)
        opened = [ledger._open, *([ledger._doubt[1]] if ledger._doubt else [])]
        waiting.update(id(page) for page in ledger._open.pages)
        for delivery in owned:
            if delivery.page is not None and waiting[id(delivery.page)] > delivery.page.left:
                self.fail(f"{daemon}: the page of {delivery.key} is resolved before its deliveries are")
        for each in opened:
            keys.update((row[2], row[0], row[3]) for row in each.attempts)
            keys.update(each.pending)
        _, before, was_running = self._seen.get(engine, (None, set(), False))
        self._seen[engine] = (counts, keys, deliverer.running)
        for key in before - keys:
            if key in self.finals or key in self.server.pending:
                continue
            dropped = self.is_unsound or not (was_running and deliverer.running)  # it will be read again
            if not dropped or key[2] or (key[:2] in self.open and self._is_passed(self.open[key[:2]], engine.shard)):
                self.fail(f"{daemon}: {key} has left memory and is nowhere")

    # ── at every commit ────────────────────────────────────────────────────────────────────────────────────────────

    def committed(self, transaction: Transaction) -> None:
        for event in transaction.events:
            self.committed_at[event.seq] = self.now()
            self.began_at.setdefault(event.seq, 0.0)  # one of the engine's own: nobody saw its transaction begin
            self.note("commit", f"event {event.seq} {event.type} xid {event.xid}")
            for webhook in self.webhooks.values():
                if webhook.enabled and webhook.wants(event.type):
                    self.open[webhook.id, event.seq] = self.owed[webhook.id, event.seq] = event

    def registry_changed(self) -> None:
        rows = self.server.endpoints
        for webhook in self.webhooks.values():
            row = rows.get(webhook.id)
            enabled = row is not None and row["status"] != "disabled"
            if webhook.enabled and not enabled:
                self._excuse(webhook.id)
            if enabled and not webhook.enabled:
                webhook.enabled_at = self.now()
            webhook.enabled = enabled
            is_paused = row is not None and row["status"] == "paused"
            if is_paused != (webhook.paused_at is not None):
                webhook.paused_at = self.now() if is_paused else None
        self.note("registry", f"version {self.server.registry_version}")

    def created(self, row: dict[str, Any], settings: Any) -> None:
        """A webhook's creation has committed."""
        self.webhooks[row["id"]] = Webhook(row, settings, self.now())

    def _excuse(self, endpoint: int) -> None:
        """Whoever is disabled or deleted receives nothing; what was on its way is discarded or was never routed."""
        for owed in (self.open, self.owed):
            for pair in [pair for pair in owed if pair[0] == endpoint]:
                del owed[pair]

    def taken_over(self, backend: Backend | None, shard: int, epoch: int) -> None:
        owner = _owner(backend)
        self.epochs[shard] = epoch
        self.reigns[owner, shard] += 1
        self.fenced.discard((owner, shard))
        self.retired.discard((owner, shard))
        for name, daemon in self.daemons.items():
            if name == owner:
                continue
            ran = [engine for engine in daemon.engines if engine.shard == shard]
            if ran:
                self.fenced.add((name, shard))
                self.forgive(daemon, ran)
            elif (name, shard) not in self.fenced:
                self.retired.add((name, shard))
        self.note("take-over", f"epoch {epoch} of shard {shard} by {owner}")

    def forgive(self, daemon: Daemon, engines: Sequence[Engine] | None = None) -> None:
        """What this one has in its hands may be sent twice."""
        for engine in daemon.engines if engines is None else engines:
            out, buffered = len(engine.deliverer.in_flight), engine.ledger.buffered
            self.allowance += out + buffered
            self.note("forgiven", f"{daemon}: {out} + {buffered}")

    def flushed(
        self, backend: Backend | None, shard: int, epoch: int, rows: dict[str, list[tuple[Any, ...]]], moved: bool
    ) -> None:
        if epoch != self.epochs[shard]:
            self.fail(f"a flush of epoch {epoch} was written in epoch {self.epochs[shard]}")
        for endpoint in {row[2] for row in rows["attempts"]} | {row[0] for row in rows["pending"]}:
            if self.server.shard_of(endpoint) != shard:
                self.fail(f"shard {shard} wrote of webhook {endpoint}, which is another's")
        due = {(row[0], row[1], row[2]): row for row in rows["pending"]}
        for row in rows["attempts"]:
            self._logged(row, due)
        for key, row in due.items():
            self.open.pop(key[:2], None)
            if key in self.finals:
                self.fail(f"{key} is settled and gets a pending row")
            if row[7] is not HELD and row[6] > self.logged.get(key, 0):
                self.fail(f"{key} counts {row[6]} attempts, {self.logged.get(key, 0)} are on record")
        for key in rows["settled"]:
            if key not in self.finals:
                self.fail(f"the pending row of {key} went without its settlement")
        for seq, _ in rows["discarded"]:
            for owed in (self.open, self.owed):
                for pair in [pair for pair in owed if pair[1] == seq]:
                    del owed[pair]
        self.note("flush", _summary(rows, moved))
        if moved and self.open:
            self._passed(shard)

    def _logged(self, row: tuple[Any, ...], due: dict[Key, tuple[Any, ...]]) -> None:
        seq, _, endpoint, generation, number, state, result = row[:7]
        key = (endpoint, seq, generation)
        before = self.finals.get(key)
        if before is not None:
            self.fail(f"{key} was settled twice: {before}, then {state}")
        if result is not None and number <= self.logged.get(key, 0):
            self.fail(f"attempt {number} of {key} was logged twice")
        self.logged[key] = number
        arrivals = self.arrivals.get((key, number), ())
        if state in FINAL:
            self.finals[key] = state
            if generation == 0:
                self.open.pop(key[:2], None)
                self.owed.pop(key[:2], None)
        schedule_s = self.webhooks[endpoint].settings.schedule_s
        if state == "delivered" and not any(200 <= arrival.status < 300 for arrival in arrivals):
            self.fail(f"{key} is on record as delivered, and its receiver has not said so")
        if state == "exhausted" and number != len(schedule_s) + 1:
            self.fail(f"{key} was given up after {number} attempts of {len(schedule_s) + 1}")
        if state == "retrying":
            self._retrying(key, number, due.get(key), arrivals)

    def _retrying(self, key: Key, number: int, row: Any, arrivals: Any) -> None:
        if row is None:
            self.fail(f"{key} failed and has no pending row")
            return
        ended = [arrival for arrival in arrivals if arrival.done_at is not None]
        if ended and row[7] is not HELD:
            delay_s = self.webhooks[key[0]].settings.schedule_s[number - 1] * (1 - self.jitter)
            delay_s = max(delay_s, ended[-1].retry_after_s)
            if row[7].timestamp() < max(ended[-1].done_wall + delay_s, ended[-1].retry_at) - EARLY_S:
                self.fail(f"{key} is due {row[7]}, earlier than {delay_s} s after attempt {number}")

    def _passed(self, number: int) -> None:
        """A shard's cursor has moved: everything it says is read must be settled or pending."""
        for (endpoint, seq), event in self.open.items():
            if self.server.shard_of(endpoint) == number and self._is_passed(event, number):
                self.fail(f"event {seq} is lost for webhook {endpoint}: the cursor is beyond it")
                return

    def _is_passed(self, event: Event, number: int) -> bool:
        shard, visible = self.server.shards[number], self.server.visible
        if visible(event.xid, shard["prev"]):
            return True
        # A page's order: what was in progress in `prev` first, by transaction, then the others, by transaction.
        at = (shard["at_xid"], shard["at_seq"])
        return shard["cur"] is not None and visible(event.xid, shard["cur"]) and (event.xid, event.seq) <= at

    def rolled_back(self) -> None:
        """Asynchronous commits are gone: what they had settled is open again."""
        server = self.server
        before = sum(self.logged.values())
        self.finals = {(row[3], row[1], row[4]): row[6] for row in server.attempts if row[6] in FINAL}
        self.logged = {}
        for row in server.attempts:
            key = (row[3], row[1], row[4])
            self.logged[key] = max(self.logged.get(key, 0), row[5])
        self.allowance += before - sum(self.logged.values())
        self.is_unsound = True
        for seq, event in server.event_by_seq.items():
            for webhook in self.webhooks.values():
                key = (webhook.id, seq, 0)
                born = server.endpoints.get(webhook.id)
                if (
                    born is None or not webhook.enabled or not webhook.wants(event.type)
                    or seq in server.discarded_events or key in self.finals
                    or self.committed_at[seq] < webhook.enabled_at
                    or server.visible(event.xid, born["created_snapshot"])
                ):  # fmt: skip
                    continue
                self.owed[key[:2]] = event
                if key not in server.pending:
                    self.open[key[:2]] = event
        self.note("rolled back", f"{len(self.open)} open")

    def dropped(self, seqs: set[int]) -> None:
        self.note("dropped", f"events {sorted(seqs)}")
        needed = sorted(pair for pair in self.owed if pair[1] in seqs)
        needed += sorted(key[:2] for key in self.server.pending if key[1] in seqs)
        if needed:
            self.fail(f"retention dropped events of {needed[:5]}, which are not settled")

    def queued(self, keys: list[Key]) -> None:
        if not self.replayed.isdisjoint(keys):
            self.fail(f"a replay has queued {sorted(self.replayed.intersection(keys))} twice")
        self.replayed.update(keys)
        self.note("replay", f"queued {keys}")

    def told_registry(self, backend: Backend | None, shard: int, version: int) -> None:
        owner = _owner(backend)
        for endpoint, webhook in self.webhooks.items():
            if self.server.shard_of(endpoint) != shard:
                continue
            if webhook.paused_at is None:
                self.paused.pop((owner, endpoint), None)
            else:
                self.paused.setdefault((owner, endpoint), self.now())

    # ── at every request ───────────────────────────────────────────────────────────────────────────────────────────

    def arrived(self, arrival: Arrival) -> None:
        found = self._ids.key_of(arrival.delivery_id)
        assert found is not None
        endpoint, seq, generation = key = found
        webhook = self.webhooks[endpoint]
        settings = webhook.settings
        name = str(arrival.process)
        rule = (name, self.server.shard_of(endpoint))
        place = (name, self.reigns[rule], endpoint)
        self.note("request", f"{name} -> {endpoint}: event {seq}.{generation} attempt {arrival.attempt}")
        event = self.server.event_by_seq.get(seq)
        if event is None or event.id != arrival.event_id:
            self.fail(f"{key} arrived and was never committed")
            return
        before = self.arrivals[key, arrival.attempt]
        is_again = self._is_excused(before, arrival)
        if rule in self.retired:
            self.fail(f"{name} sent {key} after it had given up shard {rule[1]}")
        if rule in self.fenced:
            self.allowance += 1  # what it sends before it knows is sent by its successor, too
        if before and not is_again:
            self.repeats += 1
            self.note("repeat", f"{key} attempt {arrival.attempt}")
        before.append(arrival)
        if settings.secrets and arrival.by_legacy < 0:
            self.fail(f"{key} was signed by none of its secrets")
        arrival.place = place
        self.busy[place] += 1
        if self.busy[place] > settings.concurrency:
            self.fail(f"webhook {endpoint} has {self.busy[place]} requests at once, {settings.concurrency} allowed")
        self._judge_pause(webhook, name, key)
        if generation == 0:
            self._judge_latency((endpoint, seq))
        if is_again or rule in self.fenced:
            return
        if arrival.attempt > 1:
            self._judge_due(key, arrival)
        if settings.rate_limit is not None:
            self._judge_rate(place, settings.rate_limit)
        if settings.ordered and generation == 0 and not self.is_unsound:
            self._judge_order(place, seq)

    def ended(self, arrival: Arrival) -> None:
        found = self._ids.key_of(arrival.delivery_id)
        assert found is not None
        self.busy[arrival.place] -= 1
        self.note("response", f"{found[0]}: event {found[1]}.{found[2]} attempt {arrival.attempt}: {arrival.status}")

    @staticmethod
    def _is_excused(before: list[Arrival], arrival: Arrival) -> bool:
        """The second try during a rotation, or after a connection that was perhaps stale: no attempt was counted."""
        own = [other for other in before if other.process is arrival.process]
        is_second_try = bool(own) and own[-1].status in {401, 403}
        return is_second_try or (bool(before) and before[-1].reused and before[-1].cut)

    def _judge_due(self, key: Key, arrival: Arrival) -> None:
        row = self.server.pending.get(key)
        if row is None:
            self.fail(f"{key} is tried again and has no pending row")
        elif row[6] != arrival.attempt - 1:
            self.fail(f"attempt {arrival.attempt} of {key} is out, its row counts {row[6]}")
        elif row[7] is not HELD and row[7].timestamp() > max(arrival.wall, self.latest_wall) + EARLY_S:
            self.fail(f"attempt {arrival.attempt} of {key} is {row[7].timestamp() - arrival.wall:.3f} s early")

    def _judge_rate(self, place: tuple[str, int, int], rate: float) -> None:
        starts = self.starts[place]
        now = self.now()
        if starts and now - starts[-1] < 1 / rate - RATE_SLACK_S:
            self.fail(f"webhook {place[2]} got two requests within {now - starts[-1]:.3f} s at {rate}/s")
        starts.append(now)

    def _judge_order(self, place: tuple[str, int, int], seq: int) -> None:
        began_at, youngest = self.youngest.get(place, (0.0, 0))
        if youngest != seq and self.committed_at[seq] < began_at:
            self.fail(f"webhook {place[2]} is ordered and got event {seq} after event {youngest}")
        if self.began_at[seq] >= began_at:
            self.youngest[place] = (self.began_at[seq], seq)

    def _judge_pause(self, webhook: Webhook, name: str, key: Key) -> None:
        known_at = self.paused.get((name, webhook.id))
        # A request that waits for a connection has begun.
        if known_at is not None and self.now() > known_at + webhook.settings.timeout_s + 0.2:
            self.fail(f"{key} was sent {self.now() - known_at:.2f} s after {name} knew that its webhook is paused")
        if self.calm and webhook.paused_at is not None and self.now() > webhook.paused_at + CALM_PAUSE_S:
            self.fail(f"{key} was sent {self.now() - webhook.paused_at:.2f} s after its webhook was paused")

    def _judge_latency(self, pair: Pair) -> None:
        if pair not in self.first_at:
            self.first_at[pair] = self.now()
            late_s = self.now() - self.committed_at[pair[1]]
            settings = self.webhooks[pair[0]].settings
            if self.calm and settings.is_prompt and late_s > CALM_LATENCY_S:
                self.fail(f"event {pair[1]} came to webhook {pair[0]} after {late_s:.2f} s of nothing going on")

    # ── at the end ─────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def is_settled(self) -> bool:
        jobs = self.server.replays.values()
        return not (self.owed or self.server.pending or any(job["status"] == "running" for job in jobs))

    def conclude(self) -> None:
        if self.replayed - self.finals.keys():
            self.fail(f"replays queued {sorted(self.replayed - self.finals.keys())}, which never ended")
        if self.repeats > self.allowance:
            self.fail(f"{self.repeats} requests were repeats, the bound is {self.allowance}")
        if not self.is_unsound:
            for webhook in self.webhooks.values():
                if webhook.settings.ordered:
                    self._conclude_order(webhook)
        if self.violation is not None:
            raise Violation(self.violation)

    def _conclude_order(self, webhook: Webhook) -> None:
        youngest, began_at = 0, 0.0
        for _, flush in itertools.groupby(self.server.attempts, key=lambda row: row[0]):
            # Rows of one flush have one time, and say nothing of their order: requests are judged as they come.
            settled = [
                row[1] for row in flush
                if row[3] == webhook.id and not row[4] and row[6] in FINAL and row[7] is not None
            ]  # fmt: skip
            for seq in settled:
                if self.committed_at[seq] < began_at:
                    self.fail(f"webhook {webhook.id} is ordered and had event {seq} settled after event {youngest}")
            for seq in settled:
                if self.began_at[seq] >= began_at:
                    youngest, began_at = seq, self.began_at[seq]


def _owner(backend: Backend | None) -> str:
    return str(getattr(backend, "owner", None))


def _summary(rows: dict[str, list[tuple[Any, ...]]], moved: bool) -> str:
    attempts = " ".join(f"{row[2]}:{row[0]}.{row[3]}#{row[4]}={row[5]}" for row in rows["attempts"])
    pending = " ".join(
        f"{row[0]}:{row[1]}.{row[2]}@{'held' if row[7] is HELD else f'{row[7]:%H:%M:%S.%f}'}" for row in rows["pending"]
    )
    settled = " ".join(f"{row[0]}:{row[1]}.{row[2]}" for row in rows["settled"])
    return f"attempts [{attempts}] pending [{pending}] settled [{settled}]{' cursor' if moved else ''}"
