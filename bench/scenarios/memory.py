"""What it weighs: idle, before and after somebody looked at its pages, with thousands of open connections, with a
million waiting deliveries, and while a dead webhook is written to."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from bench.cell import Cell, Mix
from bench.lab import Lab
from bench.producer import Stream
from bench.receiver import Behaviour
from bench.report import Report
from bench.scenario import Option, Sizes

QUESTION = "how much memory, and does it stay bounded?"
OPTIONS = (
    Option("connections", 10_000, 200, "open at once"),
    Option("pending", 1_000_000, 5_000, "deliveries waiting, half of them due within ten minutes"),
    Option("rate", 2000, 500, "events per second to a dead webhook"),
    Option("seconds", 30, 1, "of that"),
)
INITIAL_WINDOW: Final = 4  # requests a webhook gets at once before it has answered any
REST_S: Final = 1.0
IDLE_MIB_MAX: Final = 64  # binary, as the limits of containers are
PAGES: Final = ("/sign-in", "/docs")  # load the dashboard, and make the API's description
PENDING: Final = """
    INSERT INTO dispatcher.pending (endpoint_id, event_seq, generation, event_xid, event_at, state, attempts, due_at)
    SELECT (SELECT min(id) FROM dispatcher.endpoint), n, 0, '1', now(), 'retrying', 1,
           now() + CASE WHEN n % 2 = 0 THEN interval '2 minutes' + n % 500000 * interval '1 millisecond'
                        ELSE interval '1 day' END
    FROM generate_series(1, $1::bigint) n
"""


async def run(lab: Lab, report: Report, sizes: Sizes) -> None:
    """Four cells."""
    await _idle(lab, report)
    await _connections(lab, report, sizes["connections"])
    await _pending(lab, report, sizes["pending"])
    await _dead(lab, report, sizes["rate"], sizes["seconds"])


async def _idle(lab: Lab, report: Report) -> None:
    async with lab.cell("idle", events=1, endpoints=10) as cell:
        await cell.daemon.start()
        await cell.daemon.ready()
        idle = await _row(cell, report)
        report.bar("idle: RSS MiB (of 2^20 bytes)", idle / (1 << 20) if idle else None, at_most=IDLE_MIB_MAX)
        for path in PAGES:
            await cell.daemon.get(path)
        await _row(cell, report, name="idle, pages seen")


async def _connections(lab: Lab, report: Report, wanted: int) -> None:
    """As many webhooks as it takes, each with a first window of requests that nobody answers."""
    endpoints = -(-wanted // INITIAL_WINDOW)
    events = endpoints * INITIAL_WINDOW
    async with lab.cell(
        f"{events:,} connections",
        events=events,
        endpoints=endpoints,
        behaviours=[Behaviour(hangs=True)],
        config={"delivery": {"max_in_flight": max(2000, events)}},
    ) as cell:
        await cell.fill(range(events), Mix(groups=endpoints))
        await cell.daemon.start()
        began = cell.open_connections
        await cell.arrived(events, among=lambda: cell.open_connections - began, patience_s=10)
        opened = cell.open_connections - began
        await _row(cell, report, {"connections": opened})
        if opened < events:
            report.void(cell.name, f"only {opened:,} connections were opened")
        await cell.daemon.kill()
        report.close_books(cell.name, await cell.balance())


async def _pending(lab: Lab, report: Report, count: int) -> None:
    async with lab.cell(f"{count:,} pending", events=1, endpoints=1) as cell:
        await cell.connection.execute(PENDING, count, timeout=None)
        await cell.connection.execute("VACUUM ANALYZE dispatcher.pending")
        await cell.daemon.start()
        await cell.daemon.ready()
        await _row(cell, report, {"pending": count})


async def _dead(lab: Lab, report: Report, rate: int, seconds: int) -> None:
    events = rate * seconds
    async with lab.cell(f"dead webhook, {rate:,}/s", events=events, endpoints=1, refused=lambda _: True) as cell:
        await cell.daemon.start()
        await cell.daemon.ready()
        await cell.produce(Stream(first=0, count=events, rate=rate, batch=max(1, rate // 200)))
        await _until_read(cell, events)
        await _row(cell, report)
        await cell.stop_daemon()
        known = await _known(cell)
        report.row("", {"events": events, "pending or settled": known})
        if known != events:
            report.void(cell.name, f"{events:,} events were committed, {known:,} are pending or settled")


async def _until_read(cell: Cell, events: int) -> None:
    """Wait until every event has become a pending row or an attempt."""
    deadline = time.monotonic() + 30
    while await _known(cell) < events and time.monotonic() < deadline:
        await asyncio.sleep(0.2)


async def _known(cell: Cell) -> int:
    return int(
        await cell.connection.fetchval(
            "SELECT count(*) FROM (SELECT event_seq FROM dispatcher.pending"
            " UNION SELECT event_seq FROM dispatcher.attempt) AS t"
        )
    )


async def _row(cell: Cell, report: Report, values: dict[str, int] | None = None, *, name: str = "") -> int | None:
    """Let it rest a moment, then weigh it; return the bytes."""
    await asyncio.sleep(REST_S)
    now = cell.meter.take().rss_bytes
    report.row(
        name or cell.name, {"RSS MB": now / 1e6 if now else None, "highest MB": cell.meter.rss_max_mb, **(values or {})}
    )
    report.column("RSS, MB", name or cell.name, now / 1e6 if now else None)
    return now
