"""What the outbox's trigger costs those who write: events per second with no trigger, with ours, and with one that
always notifies.

Each writer is a session that inserts and commits in a loop inside the server, so that no client's speed is measured
and the commits meet as hard as they can. A daemon runs in every cell and nobody subscribes. It is awake in all of
them, woken by the harness before anything counts, and reads what is written as it is written: so what differs is the
trigger alone, and not how soon somebody reads.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, Final

import asyncpg

from bench.cell import Cell
from bench.lab import Lab
from bench.meter import between
from bench.producer import DATA
from bench.report import Report
from bench.scenario import Option, Sizes

QUESTION = "what does waking the dispatcher cost the applications that write?"
OPTIONS = (
    Option("seconds", 2, 1, "of each turn"),
    Option("rounds", 5, 1, "turns of each kind, pooled"),
    Option("writers", 32, 2, "at most; also 1 and a quarter of it"),
)
WARM_UP_S: Final = 0.4
WRITE: Final = f"""
    CREATE PROCEDURE bench_write(since timestamptz, until timestamptz, INOUT written bigint, INOUT counted bigint)
    LANGUAGE plpgsql AS $write$
    BEGIN
        WHILE clock_timestamp() < until LOOP
            INSERT INTO dispatcher.outbox (type, data) VALUES ('bench.nobody', '{DATA.replace("'", "''")}');
            COMMIT;
            written := written + 1;
            IF clock_timestamp() >= since THEN
                counted := counted + 1;
            END IF;
        END LOOP;
    END $write$"""
SILENT: Final = "ALTER TABLE dispatcher.outbox DISABLE TRIGGER ALL"
OURS: Final = "ALTER TABLE dispatcher.outbox ENABLE TRIGGER wake"
ALWAYS: Final = "ALTER TABLE dispatcher.outbox ENABLE TRIGGER bench_always"
MAKE_ALWAYS: Final = """
    CREATE FUNCTION bench_always() RETURNS trigger LANGUAGE plpgsql AS
    $wake$ BEGIN PERFORM pg_notify('dispatcher_wake', ''); RETURN NULL; END $wake$;
    CREATE TRIGGER bench_always AFTER INSERT ON dispatcher.outbox FOR EACH STATEMENT EXECUTE FUNCTION bench_always()"""
ASLEEP: Final = """
    SELECT EXISTS (SELECT FROM pg_locks l JOIN pg_database d ON d.oid = l.database
                   WHERE d.datname = current_database() AND l.locktype = 'advisory' AND l.classid = 1953656688
                     AND l.objid = 0 AND l.mode = 'ShareLock')"""
KINDS: Final = ("no trigger", "ours", "always notify")


async def run(lab: Lab, report: Report, sizes: Sizes) -> None:
    """Every kind with every number of writers, in short turns on one database: what drifts, drifts for all."""
    many = sizes["writers"]
    counts = sorted({1, max(1, many // 4), many})
    seconds, rounds = sizes["seconds"], sizes["rounds"]
    written: dict[tuple[str, int], int] = dict.fromkeys(((kind, n) for kind in KINDS for n in counts), 0)
    daemon_s = dict.fromkeys(KINDS, 0.0)
    async with lab.cell("producers", events=1, endpoints=0) as cell:
        await cell.connection.execute(WRITE)
        await cell.connection.execute(MAKE_ALWAYS)
        switch = {"no trigger": SILENT, "ours": f"{SILENT}; {OURS}", "always notify": f"{SILENT}; {ALWAYS}"}
        asleep: Counter[str] = Counter()
        await cell.daemon.start()
        await cell.daemon.ready()
        for _ in range(rounds):
            for writers in counts:
                for kind in KINDS:
                    await cell.connection.execute(switch[kind])
                    before = cell.meter.take()
                    written[kind, writers] += await _write(cell, report, writers, seconds)
                    daemon_s[kind] += between(before, cell.meter.take()).daemon_s or 0.0
                    asleep[kind] += await cell.connection.fetchval(ASLEEP)
    rates = {key: count / (seconds * rounds) for key, count in written.items()}
    _judge(report, rates, counts)
    total_s = (seconds + WARM_UP_S) * rounds * len(counts)
    shares = ", ".join(f"{kind} {spent_s / total_s:.0%}" for kind, spent_s in daemon_s.items())
    if asleep.total():
        turns = ", ".join(f"{kind} {count} of {rounds * len(counts)}" for kind, count in asleep.items() if count)
        report.note(f"turns at whose end the dispatcher was asleep: {turns}")
    report.note(f"the daemon, which reads all of it, took this much of a core meanwhile: {shares}")


def _judge(report: Report, rates: dict[tuple[str, int], float], counts: list[int]) -> None:
    for kind in KINDS:
        report.row(kind, {f"{n} writers, events/s": rates[kind, n] for n in counts})
        for n in counts:
            report.column("events/s", f"{n} writers" if n > 1 else "1 writer", rates[kind, n], series=kind)
    for kind in KINDS[1:]:
        shares = {n: rates[kind, n] / max(rates["no trigger", n], 1e-6) for n in counts}
        report.row(f"{kind}, of no trigger", {f"{n} writers, events/s": share for n, share in shares.items()})
        if kind == "ours":
            many = counts[-1]
            report.bar(f"ours at {many} writers, in proportion to no trigger", shares[many], at_least=0.85)


async def _write(cell: Cell, report: Report, writers: int, seconds: float) -> int:
    """Let them write; return how many events they committed after the warm-up.

    How many they committed in all must be how many there are more than before.
    """
    connections = await asyncio.gather(*(asyncpg.connect(cell.dsn) for _ in range(writers)))
    try:
        before = await _count(cell)
        with cell.lab.watch.over(f"{cell.name}: {writers} writers", 1):
            writing = asyncio.gather(*(_call(connection, seconds) for connection in connections))
            for _ in range(10):
                await cell.connection.execute("NOTIFY dispatcher_wake")
                await asyncio.sleep(WARM_UP_S / 10)
            found = await writing
        total = sum(written for written, _ in found)
        if (rows := await _count(cell) - before) != total:
            report.void(cell.name, f"{total:,} events were committed by {writers} writers, the outbox holds {rows:,}")
        return sum(counted for _, counted in found)
    finally:
        await asyncio.gather(*(connection.close() for connection in connections))


async def _call(connection: Any, seconds: float) -> tuple[int, int]:
    # A procedure commits only when called outside of a transaction, and without parameters.
    since = f"clock_timestamp() + interval '{WARM_UP_S} s'"
    row = await connection.fetchrow(f"CALL bench_write({since}, {since} + interval '{seconds} s', 0, 0)")
    return int(row[0]), int(row[1])


async def _count(cell: Cell) -> int:
    return int(await cell.connection.fetchval("SELECT count(*) FROM dispatcher.outbox"))
