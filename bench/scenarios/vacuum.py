"""What the autovacuum settings of each table bring: the schema's against PostgreSQL's defaults, on the same churn.

The launcher's rule (dead or inserted rows above threshold + scale × rows) is applied here after every step, with
VACUUM and ANALYZE by hand: no naptime, no second worker, so a run repeats to the page. Time, WAL and sizes are what the
settings cost; `refill pages` is what the engine then pays to read the next thousand retries.
"""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any, Final

import asyncpg

from bench.cell import Cell
from bench.lab import Lab
from bench.report import Report
from bench.scenario import Option, Sizes
from dispatcher.store.database import statements

QUESTION = "what do the autovacuum settings of the tables cost and bring?"
OPTIONS = (
    Option("waiting", 200_000, 2_000, least=2_000, help="pending rows that wait while others come and go"),
    Option("churn", 600_000, 6_000, least=6_000, help="pending rows that come, fail again or are settled"),
    Option("flushes", 100_000, 1_000, least=1_000, help="updates of the shard's row"),
    Option("day", 1_000_000, 5_000, least=5_000, help="rows of one day's partition"),
)
STEP: Final = 1000
DAY_STEPS: Final = 100
FLUSH_STEP: Final = 500

SETTLE: Final = """
    WITH due AS (SELECT endpoint_id, event_seq, generation, row_number() OVER (ORDER BY due_at) AS n
                 FROM dispatcher.pending WHERE shard = 0 AND due_at < 'infinity' ORDER BY due_at LIMIT $1),
         again AS (UPDATE dispatcher.pending p SET due_at = p.due_at + interval '600 s', attempts = attempts + 1
                   FROM due d WHERE n % 2 = 0 AND (p.endpoint_id, p.event_seq, p.generation)
                                                  = (d.endpoint_id, d.event_seq, d.generation))
    DELETE FROM dispatcher.pending p USING due d
    WHERE n % 2 = 1 AND (p.endpoint_id, p.event_seq, p.generation) = (d.endpoint_id, d.event_seq, d.generation)
"""
FAIL: Final = """
    INSERT INTO dispatcher.pending (endpoint_id, event_seq, generation, event_xid, event_at, state, attempts, due_at)
    SELECT n % 100, n, 0, '1', now(), 'retrying', 1, now() + n * interval '1 ms' + (n * 7919 % 60000) * interval '1 ms'
    FROM generate_series($1::bigint, $2::bigint) n
"""
ATTEMPT: Final = """
    INSERT INTO dispatcher.attempt (at, event_seq, event_xid, endpoint_id, generation, attempt, state, result, status,
                                    duration_us, response_head)
    SELECT now(), n, '1', n % 100, 0, 1, 'delivered', '2xx', 200, 1000, '\\x485454502f312e31'
    FROM generate_series($1::bigint, $2::bigint) n
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """When autovacuum would come."""

    name: str
    vacuum: tuple[float, float] = (50, 0.2)  # threshold, scale: dead rows
    insert: tuple[float, float] = (1000, 0.2)  # inserted rows
    analyze: tuple[float, float] = (50, 0.1)
    freeze_min_age: int = 50_000_000


DEFAULT: Final = Rule("default")


def ours(options: dict[str, str]) -> Rule:
    """The rule that a table's storage parameters make."""

    def pair(kind: str, default: tuple[float, float]) -> tuple[float, float]:
        name = f"autovacuum_{kind}"
        return (
            float(options.get(f"{name}_threshold", default[0])),
            float(options.get(f"{name}_scale_factor", default[1])),
        )

    return Rule(
        "ours",
        pair("vacuum", DEFAULT.vacuum),
        pair("vacuum_insert", DEFAULT.insert),
        pair("analyze", DEFAULT.analyze),
        int(options.get("autovacuum_freeze_min_age", DEFAULT.freeze_min_age)),
    )


class Janitor:
    """Does to one table what autovacuum would, and counts what it costs."""

    def __init__(self, db: Any, table: str, rule: Rule, rows: int = 0) -> None:
        self._db, self._table, self._rule = db, table, rule
        self._rows, self._dead, self._inserted, self._changed = float(rows), 0, 0, 0
        self.vacuums, self.analyzes, self.ms, self.wal_bytes = 0, 0, 0.0, 0

    async def after(self, *, inserted: int = 0, deleted: int = 0, updated: int = 0) -> None:
        """So many rows changed: clean up if it is time."""
        rule = self._rule
        self._dead += deleted + updated
        self._inserted += inserted
        self._changed += inserted + deleted + updated
        if _is_time(self._dead, rule.vacuum, self._rows) or _is_time(self._inserted, rule.insert, self._rows):
            self.vacuums += 1
            await self.act(f"VACUUM {self._table}")
            self._dead = self._inserted = 0
        if _is_time(self._changed, rule.analyze, self._rows):
            self.analyzes += 1
            await self.act(f"ANALYZE {self._table}")
            self._changed = 0

    async def act(self, command: str) -> None:
        """Do it and count it."""
        await self._db.execute(f"SET vacuum_freeze_min_age = {self._rule.freeze_min_age}")
        wal, began = await self._db.fetchval("SELECT pg_current_wal_insert_lsn()"), time.perf_counter()
        await self._db.execute(command, timeout=None)
        self.ms += (time.perf_counter() - began) * 1e3
        self.wal_bytes += int(await self._db.fetchval("SELECT pg_current_wal_insert_lsn() - $1::pg_lsn", wal))
        self._rows = max(
            0.0, await self._db.fetchval("SELECT reltuples FROM pg_class WHERE oid = $1::regclass", self._table)
        )

    def figures(self) -> dict[str, Any]:
        """For the table."""
        return {
            "vacuums": self.vacuums,
            "analyzes": self.analyzes,
            "upkeep ms": round(self.ms, 1),
            "upkeep WAL MB": round(self.wal_bytes / 1e6, 2),
        }


def _is_time(changed: int, limit: tuple[float, float], rows: float) -> bool:
    return changed > limit[0] + limit[1] * rows


async def run(lab: Lab, report: Report, sizes: Sizes) -> None:
    """Each table in turn, under both rules."""
    async with lab.cell("vacuum", events=1, endpoints=1) as cell:
        db = cell.connection
        pending, shard, day = [
            await _options(db, table) for table in ("dispatcher.pending", "dispatcher.shard", await _today(db))
        ]
        await _never_by_itself(db)
        found: dict[str, dict[str, Any]] = {}
        for table, options, measure in (
            ("pending", pending, _pending), ("shard", shard, _shard), ("shard, old snapshot", shard, _shard_held),
            ("attempt, one day", day, _day),
        ):  # fmt: skip
            for rule in (DEFAULT, ours(options)):
                with lab.watch.over(f"{table}: {rule.name}", 1):
                    found[f"{table}: {rule.name}"] = values = await measure(cell, rule, sizes)
                report.row(f"{table}: {rule.name}", values)
                report.column("ms of upkeep", table, values["upkeep ms"], series=rule.name)
        _judge(report, found)


def _judge(report: Report, found: dict[str, dict[str, Any]]) -> None:
    a, b = found["pending: default"], found["pending: ours"]
    report.bar("pending: size with ours in proportion to default", b["MB"] / a["MB"], at_most=1.0)
    report.bar("shard: pages", found["shard: ours"]["pages"], at_most=16)
    a, b = found["attempt, one day: default"], found["attempt, one day: ours"]
    costs = [x["upkeep ms"] + x["freeze ms"] for x in (b, a)]
    report.bar("attempt: upkeep and freezing in proportion to default", costs[0] / costs[1], at_most=1.0)


async def _options(db: Any, table: str) -> dict[str, str]:
    options = await db.fetchval("SELECT reloptions FROM pg_class WHERE oid = $1::regclass", table)
    return dict(option.split("=", 1) for option in options or [])


async def _today(db: Any) -> str:
    return str(await db.fetchval("SELECT 'dispatcher.attempt_' || to_char(now() AT TIME ZONE 'UTC', 'YYYYMMDD')"))


async def _never_by_itself(db: Any) -> None:
    for table in ("dispatcher.pending", "dispatcher.shard", await _today(db)):
        await db.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = false)")


async def _pending(cell: Cell, rule: Rule, sizes: Sizes) -> dict[str, Any]:
    db = cell.connection
    await db.execute("TRUNCATE dispatcher.pending")
    waiting = sizes["waiting"]
    await db.execute(FAIL, 1, waiting, timeout=None)
    await db.execute("VACUUM ANALYZE dispatcher.pending")
    janitor = Janitor(db, "dispatcher.pending", rule, waiting)
    seq = waiting
    pages = 0
    for _ in range(sizes["churn"] // STEP):
        pages += await _refill_pages(db)
        await db.execute(SETTLE, STEP)
        await db.execute(FAIL, seq + 1, seq + STEP // 2)
        seq += STEP // 2
        await janitor.after(inserted=STEP // 2, deleted=STEP // 2, updated=STEP // 2)
    return {
        **janitor.figures(),
        **await _size(db, "dispatcher.pending"),
        "refill pages": pages / (sizes["churn"] // STEP),
    }


async def _refill_pages(db: Any) -> int:
    """Pages that the engine's refill touches for the next rows to come due."""
    sql = statements("pending")["refill"]
    for number, value in ((1, "0"), (2, "'-infinity'"), (3, "'infinity'"), (4, str(STEP))):
        sql = sql.replace(f"${number}", value)
    await db.execute("SET enable_seqscan = off; SET enable_sort = off; SET enable_bitmapscan = off")
    text = await db.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql}")
    plan = json.loads(text)[0]["Plan"]
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


async def _shard(cell: Cell, rule: Rule, sizes: Sizes) -> dict[str, Any]:
    db = cell.connection
    await db.execute("VACUUM FULL dispatcher.shard")
    janitor = Janitor(db, "dispatcher.shard", rule, 1)
    for _ in range(sizes["flushes"] // FLUSH_STEP):
        await db.execute(
            f"DO $$ BEGIN FOR i IN 1..{FLUSH_STEP} LOOP UPDATE dispatcher.shard SET prev = pg_current_snapshot(),"
            " prev_at = clock_timestamp(), at_seq = at_seq + 1; COMMIT; END LOOP; END $$"
        )
        await janitor.after(updated=FLUSH_STEP)
    return {**janitor.figures(), **await _size(db, "dispatcher.shard")}


async def _shard_held(cell: Cell, rule: Rule, sizes: Sizes) -> dict[str, Any]:
    """Somebody's transaction keeps a snapshot open all the while."""
    other = await asyncpg.connect(cell.dsn)
    try:
        async with other.transaction(isolation="repeatable_read"):
            await other.fetchval("SELECT version FROM dispatcher.registry")
            return await _shard(cell, rule, sizes)
    finally:
        await other.close()


async def _day(cell: Cell, rule: Rule, sizes: Sizes) -> dict[str, Any]:
    db = cell.connection
    table, step = await _today(db), max(1, sizes["day"] // DAY_STEPS)
    await db.execute(f"TRUNCATE {table}")
    await db.execute(f"ANALYZE {table}")
    janitor = Janitor(db, table, rule)
    for number in range(0, sizes["day"], step):
        await db.execute(ATTEMPT, number + 1, number + step, timeout=None)
        await janitor.after(inserted=step)
    freezing = Janitor(db, table, rule)  # what the day costs again when the age of its transaction ids calls for it
    await freezing.act(f"VACUUM (FREEZE) {table}")
    return {
        **janitor.figures(),
        **await _size(db, table),
        "freeze ms": round(freezing.ms, 1),
        "freeze WAL MB": round(freezing.wal_bytes / 1e6, 2),
    }


async def _size(db: Any, table: str) -> dict[str, Any]:
    row = await db.fetchrow(
        "SELECT pg_relation_size($1::regclass) / 8192 AS pages, pg_total_relation_size($1::regclass) / 1e6 AS mb", table
    )
    return {"pages": row["pages"], "MB": round(float(row["mb"]), 2)}
