"""`kill -9` under load: nothing may be lost, what comes twice is counted, and deliveries go on as soon as the next
process runs."""

from __future__ import annotations

import asyncio
import time

from bench.cell import Cell
from bench.lab import Lab
from bench.ledger import NEVER
from bench.producer import Stream
from bench.report import Report
from bench.scenario import Option, Sizes

QUESTION = "what does kill -9 under load lose, repeat and delay?"
OPTIONS = (
    Option("kills", 5, 2, "how often"),
    Option("rate", 2000, 500, "events per second"),
    Option("every", 4, 1, "seconds between two kills"),
    Option("endpoints", 100, 20, "webhooks"),
)


async def run(lab: Lab, report: Report, sizes: Sizes) -> None:
    """One cell, a row for each kill."""
    kills, rate, every_s, endpoints = (sizes[name] for name in ("kills", "rate", "every", "endpoints"))
    events = int(rate * every_s * (kills + 1))
    async with lab.cell(f"{kills} kills", events=events, endpoints=endpoints) as cell:
        await cell.daemon.start()
        await cell.daemon.ready()
        load = asyncio.create_task(
            cell.produce(Stream(first=0, count=events, rate=rate, groups=endpoints, batch=max(1, rate // 500))),
            name="load",
        )
        restarts = []
        for _ in range(kills):
            await asyncio.sleep(every_s)
            await cell.daemon.kill()
            restarts.append(time.monotonic_ns())
            await cell.daemon.start()
        await load
        await cell.daemon.ready()
        await cell.arrived(events)
        await cell.until_logged(events)
        balance = await cell.close_books(report, logged=False, repeats=True)
        await _check_log(cell, report, events)
        delays = [_first_after(cell, at) for at in restarts]
    for number, delay_s in enumerate(delays, 1):
        report.row(f"kill {number}", {"start to first delivery s": delay_s})
        report.column("s from start to first delivery", f"kill {number}", delay_s)
    report.row(
        "all",
        {
            "sent": balance.sent,
            "lost": balance.missing,
            "duplicates": balance.duplicates,
            "a kill": balance.duplicates / kills,
        },
    )
    report.bar("lost", balance.missing, at_most=0)


async def _check_log(cell: Cell, report: Report, events: int) -> None:
    """Each delivery must be on record as delivered exactly once, however often it was sent."""
    once = await cell.connection.fetchval(
        "SELECT count(*) FROM (SELECT FROM dispatcher.attempt WHERE state = 'delivered'"
        " GROUP BY event_seq, endpoint_id HAVING count(*) = 1) AS t"
    )
    if once != events:
        report.void(cell.name, f"{once:,} of {events:,} deliveries are on record as delivered exactly once")


def _first_after(cell: Cell, at_ns: int) -> float | None:
    """Seconds from a moment to the next request."""
    later = [t for times in (cell.ledger.first, cell.ledger.last) for t in times if t not in (NEVER,) and t > at_ns]
    return (min(later) - at_ns) / 1e9 if later else None
