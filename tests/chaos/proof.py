"""What must hold after any violence, reckoned from three sides: the writers, the subscribers and the database.

- Every committed event arrived at every webhook subscribed to it, and was answered by 200 there.
- Nothing else arrived: nothing rolled back, nothing of a type not asked for, one delivery id for each delivery.
- What arrived more often than it had to was *exposed* when a process was killed: it was out, or answered and not on
  record. Each such moment repeats it once at most. How much is exposed has the bound that SECURITY.md states.
- No outcome is logged twice.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatch
from typing import Any

from application import Application
from daemons import PATIENCE_S, Program, connected, subscribe
from subscribers import Key, Subscribers

from dispatcher.config import Config
from dispatcher.engine.engine import BUFFERED_MAX

EXPOSED_MAX = 2 * (BUFFERED_MAX + Config().delivery.max_in_flight)  # as SECURITY.md reckons
WEBHOOKS = {"/prompt/all": "*", "/slow/all": "*", "/failing/email": "email.*", "/prompt/billing": "billing.*"}
MUTE_S = 1.0  # until one that never answers has had its time
END_S = 2 * PATIENCE_S
LATE = timedelta(seconds=30)  # how long after its begin the statement of a dead daemon may still commit
ON_RECORD = """
    SELECT regexp_replace(p.url, '^.*//[^/]*', '') AS path, o.id, a.attempt, a.at
    FROM dispatcher.attempt a JOIN dispatcher.outbox o ON o.seq = a.event_seq
                              JOIN dispatcher.endpoint p ON p.id = a.endpoint_id
    WHERE a.at > $1
"""
PENDING = """
    SELECT count(*) FROM dispatcher.pending d JOIN dispatcher.endpoint p ON p.id = d.endpoint_id
    WHERE p.url NOT LIKE '%/mute/%'
"""


class Proof:
    """Keeps what is exposed at each crash, and judges in the end."""

    def __init__(self, dsn: str, application: Application, subscribers: Subscribers) -> None:
        self.crashes = 0
        self.webhooks = WEBHOOKS
        self._dsn = dsn
        self._application = application
        self._subscribers = subscribers
        self._exposed: Counter[Key] = Counter()
        self._most = 0
        self._recorded: set[Key] = set()
        self._read_to = datetime.min.replace(tzinfo=UTC) + LATE

    async def subscribe(self, daemon: Program) -> None:
        urls = {
            f"{self._subscribers.url}{path}": {"events": [events], "timeout_s": MUTE_S if "mute" in path else None}
            for path, events in self.webhooks.items()
        }
        await subscribe(self._dsn, daemon, urls)

    async def crashed(self, daemon: Program, *, is_gone: bool = True) -> None:
        """A daemon was killed, or stopped where it was: see what it had out or not on record."""
        name, connections = daemon.environment["DISPATCHER_BRAND_USER_AGENT"], self._subscribers.connections
        async with asyncio.timeout(PATIENCE_S):
            while is_gone and not {name, ""}.isdisjoint(list(connections.values())):  # until all it sent has arrived
                await asyncio.sleep(0.005)
        sent = {arrival.key for arrival in self._subscribers.arrivals[:] if arrival.daemon == name}
        exposed = sent - await self._on_record()
        self.crashes += 1
        self._most = max(self._most, len(exposed))
        self._exposed.update(exposed)

    async def _on_record(self) -> set[Key]:
        async with connected(self._dsn) as connection:
            rows = await connection.fetch(ON_RECORD, self._read_to - LATE)
        self._recorded |= {Key(row["path"], row["id"], row["attempt"]) for row in rows}
        self._read_to = max([self._read_to, *(row["at"] for row in rows)])
        return self._recorded

    async def holds(self) -> str:
        """Wait until all is delivered and on record, and judge; return the reckoning, for people."""
        wanted = {
            (path, event)
            for path, pattern in self.webhooks.items()
            if not path.startswith("/mute")
            for event, kind in self._application.committed.items()
            if fnmatch(kind, pattern)
        }
        answered = self._subscribers.answered
        try:
            async with asyncio.timeout(END_S):
                while wanted - answered.keys():
                    await asyncio.sleep(0.05)
        except TimeoutError:
            lost = sorted(wanted - answered.keys())
            raise AssertionError(f"{len(lost)} of {len(wanted)} deliveries are lost, among them {lost[:5]}") from None
        async with connected(self._dsn) as connection:
            await self._settled(connection, len(wanted))
            twice = await connection.fetchval(
                "SELECT count(*) FROM (SELECT FROM dispatcher.attempt GROUP BY event_seq, endpoint_id, attempt"
                " HAVING count(*) > 1) t"
            )
        assert twice == 0, f"{twice} outcomes are logged twice"
        return self._judge(wanted)

    async def _settled(self, connection: Any, count: int) -> None:
        async with asyncio.timeout(END_S):
            while (
                await connection.fetchval("SELECT count(*) FROM dispatcher.attempt WHERE state = 'delivered'") < count
                or await connection.fetchval(PENDING) > 0
            ):
                await asyncio.sleep(0.05)

    def _judge(self, wanted: set[tuple[str, str]]) -> str:
        arrivals = [arrival for arrival in self._subscribers.arrivals if not arrival.key.path.startswith("/mute")]
        came = Counter(arrival.key for arrival in arrivals)
        strangers = {(key.path, key.event) for key in came} - wanted
        assert not strangers, f"{len(strangers)} deliveries of what was rolled back or not asked for: {strangers}"
        names: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
        for arrival in arrivals:
            names[arrival.key.path, arrival.key.event].add(arrival.delivery)
        assert all(len(each) == 1 for each in names.values()), "a delivery changed its name"
        assert len(set().union(*names.values())) == len(names), "two deliveries bear one name"
        repeats = came - Counter(came.keys())
        beyond = repeats - self._exposed
        assert not beyond, f"repeated though on record, or more often than it was exposed: {beyond}"
        assert self._most <= EXPOSED_MAX
        return (
            f"{len(self._application.committed)} events committed, {len(self._application.rolled_back)} rolled back, "
            f"{len(wanted)} deliveries: 0 lost, 0 foreign, {repeats.total()} repeated "
            f"of {self._exposed.total()} exposed in {self.crashes} crashes (at most {self._most} in one)"
        )
