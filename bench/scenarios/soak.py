"""Minutes of everything at once: subscribers that are well, slow, flaky, overloaded or silent, and a daemon that is
killed, restarted and cut off from its database in turn. Whatever can be delivered must have been, in the end."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Final

import asyncpg

from bench.cell import Cell
from bench.histogram import Histogram
from bench.lab import Lab
from bench.ledger import NEVER
from bench.producer import Stream
from bench.receiver import Behaviour
from bench.report import Report
from bench.scenario import Option, Sizes

QUESTION = "after minutes of faults, has everything arrived, and did anything grow?"
OPTIONS = (
    Option("seconds", 600, 3, "of load"),
    Option("every", 30, 1, "seconds between two faults"),
    Option("rate", 300, 200, "events per second"),
    Option("endpoints", 100, 20, "webhooks", least=10),
    Option("timeout", 5, 1, "seconds a request may take; a restart waits for what is out"),
    Option("patience", 90, 30, "seconds without a delivery before the rest counts as missing"),
)
INTERVALS: Final = 60  # of the plot
WEIGH_S: Final = 2.0
CUT: Final = """
    SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
    WHERE application_name LIKE 'dispatcher %' AND datname = current_database()
"""
# What is written again and again: rows that come and go, and one that is updated with each flush. Of the rows of those
# that hang and fail there are more and more, so what tells is how much each takes.
WEIGHT: Final = """
    SELECT pg_total_relation_size('dispatcher.pending') + pg_total_relation_size('dispatcher.shard'),
           (SELECT count(*) FROM dispatcher.pending)
"""

Series = list[tuple[float, float]]


async def run(lab: Lab, report: Report, sizes: Sizes) -> None:
    """One cell."""
    endpoints, rate, seconds = sizes["endpoints"], sizes["rate"], sizes["seconds"]
    fifth = endpoints // 5
    behaviours = [
        Behaviour(delay_s=0.2, first=2 * fifth, last=3 * fifth - 1),
        Behaviour(status=500, fails_first=True, first=3 * fifth, last=4 * fifth - 1),
        Behaviour(status=503, first=4 * fifth, last=4 * fifth + fifth // 2 - 1),
        Behaviour(hangs=True, first=4 * fifth + fifth // 2, last=endpoints - 1),
    ]
    events = int(rate * seconds)
    config: dict[str, dict[str, object]] = {
        "retry": {"schedule": ["1s", "5s", "10s"]},
        "delivery": {"timeout_s": sizes["timeout"], "drain_s": sizes["timeout"] + 1},
    }
    async with lab.cell(
        "soak", events=events, endpoints=endpoints, behaviours=behaviours, config=config, tick_s=1.0
    ) as cell:
        await cell.daemon.start()
        await cell.daemon.ready()
        stream = Stream(first=0, count=events, rate=rate, groups=endpoints)
        load = asyncio.create_task(cell.produce(stream), name="load")
        weighing = asyncio.create_task(_weigh(cell, load), name="weighing")
        faults = await _harass(cell, load, sizes["every"])
        await load
        weight = await weighing
        mine = [n for n in range(events) if stream.group_of(n) < 4 * fifth]
        count = cell.ledger.count
        flaky = range(3 * fifth, 4 * fifth)
        done = [(n, 2 if stream.group_of(n) in flaky else 1) for n in mine]
        await cell.arrived(
            len(mine),
            among=lambda: sum(count[n] >= least for n, least in done),
            patience_s=sizes["patience"],
            every_s=1.0,
        )
        balance = await cell.close_books(report, mine, logged=False, repeats=True)
        if lost := await cell.unaccounted():
            report.void(cell.name, f"{lost:,} events were read and are neither settled nor pending")
        retried = sum(least - 1 for _, least in done)
        if short := sum(count[n] < least for n, least in done if count[n]):
            report.void(cell.name, f"{short:,} flaky deliveries were not tried again")
        report.row(
            "all",
            {
                "faults": faults,
                "sent": balance.sent,
                "missing": balance.missing,
                "retried": retried,
                "repeated": balance.duplicates - retried,
                "RSS MB": cell.meter.rss_max_mb,
                "bytes on disk per waiting row": weight[-1][1],
            },
        )
        report.series["pending and shard on disk per waiting row, B"] = weight
        _over_time(cell, report, stream, 2 * fifth)
        report.bar("RSS, last third in proportion to the second", _growth(cell.meter.rss_series()), at_most=1.1)
        report.bar("bytes on disk per waiting row, the same", _growth(weight), at_most=1.1)


async def _harass(cell: Cell, load: asyncio.Task[Histogram], every_s: float) -> int:
    """One fault after the other while the load lasts; return how many. The daemon runs afterwards."""
    for number in itertools.count():
        await asyncio.wait([load], timeout=every_s)
        if load.done():
            await cell.daemon.ready()
            return number
        match number % 3:
            case 0:
                await cell.daemon.kill()
                await cell.daemon.start()
            case 1:
                await cell.connection.execute(CUT)
            case _:
                await cell.daemon.stop()
                await cell.daemon.start()
    raise AssertionError("counting does not end")


async def _weigh(cell: Cell, load: asyncio.Task[Histogram]) -> Series:
    """(seconds since it began, bytes on disk per waiting row) while the load lasts."""
    connection = await asyncpg.connect(cell.dsn)
    began, found = time.monotonic(), Series()
    try:
        while True:
            on_disk, rows = await connection.fetchrow(WEIGHT)
            found.append((time.monotonic() - began, on_disk / max(rows, 1)))
            if load.done():
                return found
            await asyncio.wait([load], timeout=WEIGH_S)
    finally:
        await connection.close()


def _growth(series: Series) -> float | None:
    """The highest of the last third of the time, in proportion to the highest of the second."""
    third_s = series[-1][0] / 3 if series else 0.0
    second, last = ([value for at_s, value in series if n * third_s < at_s <= (n + 1) * third_s] for n in (1, 2))
    return max(last) / max(second) if second and last else None


def _over_time(cell: Cell, report: Report, stream: Stream, healthy: int) -> None:
    """Memory, and the p99 of those that are well, in intervals."""
    ledger = cell.ledger
    well = [n for n in stream.numbers if stream.group_of(n) < healthy and ledger.first[n] != NEVER]
    if not well:
        return
    start_ns, end_ns = ledger.due[well[0]], ledger.due[well[-1]]
    width_ns = max(1, (end_ns - start_ns) // INTERVALS + 1)
    report.latencies("healthy, faults included", Histogram(ledger.latencies_ns(well)))
    report.series["RSS, MB"] = cell.meter.rss_series()
    points = []
    for at, numbers in itertools.groupby(well, lambda n: (ledger.due[n] - start_ns) // width_ns):
        points.append((at * width_ns / 1e9, Histogram(ledger.latencies_ns(numbers)).ms(0.99)))
    report.row("healthy", report.latencies("healthy, faults included", Histogram()))
    report.series["p99 of the healthy, ms"] = points
    report.note(f"load ended {(time.monotonic_ns() - end_ns) / 1e9:.0f} s before the books were closed")
