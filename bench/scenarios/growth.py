"""Does age slow it down? The same drain on an empty database, behind years of history, beside waiting deliveries, and
as a large backlog."""

from __future__ import annotations

from typing import Any, Final

from bench.cell import Cell, Mix
from bench.lab import Lab
from bench.report import Report
from bench.scenario import Option, Sizes

QUESTION = "does it get slower or larger with history, with waiting deliveries, with a backlog?"
OPTIONS = (
    Option("events", 100_000, 2_000, "drained in each cell", least=10),
    Option("history", 1_000_000, 5_000, "events and attempts there already"),
    Option("pending", 1_000_000, 5_000, "deliveries that wait for another day"),
    Option("backlog", 1_000_000, 6_000, "events to drain in the last cell", least=10),
    Option("endpoints", 100, 20, "webhooks"),
    Option(
        "rounds", 2, 1, "turns of all cells; the best of each counts, since what else the machine does only ever adds"
    ),
)
ATTEMPTS: Final = """
    INSERT INTO dispatcher.attempt (at, event_seq, event_xid, endpoint_id, generation, attempt, state, result, status,
                                    duration_us)
    SELECT now(), seq, xid, 1, 0, 1, 'delivered', '2xx', 200, 1000 FROM dispatcher.outbox
"""
PENDING: Final = """
    INSERT INTO dispatcher.pending (endpoint_id, event_seq, generation, event_xid, event_at, state, attempts, due_at)
    SELECT (SELECT min(id) FROM dispatcher.endpoint), n, 0, '1', now(), 'retrying', 1,
           now() + interval '1 day' + n * interval '1 millisecond'
    FROM generate_series(1, $1::bigint) n
"""
SKIP: Final = """
    UPDATE dispatcher.shard
    SET prev = pg_current_snapshot(), prev_at = clock_timestamp(), cur = NULL, at_xid = '0', at_seq = 0
"""
RSS_MAX_MB: Final = 400.0  # two queues of 20,000 deliveries, pages, and as much again


async def run(lab: Lab, report: Report, sizes: Sizes) -> None:
    """Four cells, in turns."""
    best: dict[str, dict[str, Any]] = {}
    for _ in range(sizes["rounds"]):
        for kind in ("empty", "history", "pending", "backlog"):
            values = await _cell(lab, report, kind, sizes)
            if (values["deliveries/s"] or 0) >= (best.get(kind, values)["deliveries/s"] or 0):
                best[kind] = values
    for kind, values in best.items():
        name = kind if kind == "empty" else f"{kind} {sizes[kind]:,}"
        report.row(name, values)
        report.column("deliveries/s", name, values["deliveries/s"])
    rates = {kind: values["deliveries/s"] for kind, values in best.items()}
    empty = rates["empty"]
    for kind in ("history", "pending", "backlog"):
        share = rates[kind] / empty if rates[kind] and empty else None
        report.bar(f"{kind}: drain in proportion to empty", share, at_least=0.9)
    highest = max(values["RSS MB"] or 0.0 for values in best.values())
    report.bar("highest RSS MB", highest or None, at_most=RSS_MAX_MB)


async def _cell(lab: Lab, report: Report, kind: str, sizes: Sizes) -> dict[str, Any]:
    events = sizes["backlog"] if kind == "backlog" else sizes["events"]
    async with lab.cell(kind, events=events, endpoints=sizes["endpoints"]) as cell:
        await _age(cell, kind, sizes.get(kind, 0))
        return await _drain(cell, report, events, sizes["endpoints"])


async def _age(cell: Cell, kind: str, count: int) -> None:
    """Make the database old without a daemon: the cursor is moved behind what was put there."""
    connection = cell.connection
    with cell.lab.watch.over(f"{cell.name}: growing old", 1):
        if kind == "history":
            await connection.execute(
                "INSERT INTO dispatcher.outbox (account, type, data)"
                " SELECT 'default', 'bench.history', '{\"n\": 1}' FROM generate_series(1, $1::bigint)",
                count,
                timeout=None,
            )
            await connection.execute(ATTEMPTS, timeout=None)
            await connection.execute(SKIP)
        elif kind == "pending":
            await connection.execute(PENDING, count, timeout=None)
            await connection.execute("SELECT setval('dispatcher.outbox_seq', $1)", count)
        await connection.execute("VACUUM ANALYZE")


async def _drain(cell: Cell, report: Report, events: int, endpoints: int) -> dict[str, Any]:
    await cell.fill(range(events), Mix(groups=endpoints))
    before = await cell.logged()
    await cell.daemon.start()
    await cell.arrived(events)
    await cell.until_logged(before + events)
    values = {**cell.meter.drain(), "RSS MB": cell.meter.rss_max_mb}
    await cell.close_books(report, logged_before=before)
    return values
