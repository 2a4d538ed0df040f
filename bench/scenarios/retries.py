"""A storm of retries: thousands of deliveries fail in the same second and come due in the same second. First attempts
must not notice.

A calm stream runs all the time. Its latencies are compared: before the storm, and while the retries are due. A retry
may never be early.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

from bench.histogram import Histogram
from bench.lab import Cell, Lab, Mix
from bench.ledger import NEVER
from bench.producer import Stream
from bench.receiver import Behaviour
from bench.report import Report
from bench.scenario import Option, Sizes

QUESTION = "thousands of retries due in the same second: do first attempts notice, and are retries on time?"
OPTIONS = (
    Option("retries", 20_000, 500, "due within about a second"),
    Option("rate", 200, 200, "first attempts per second beside them"),
    Option("delay", 10, 1, "seconds from a failure to its retry"),
    Option("endpoints", 100, 20, "webhooks for each of the two"),
)
SECOND_NS: Final = 1_000_000_000
SETTLED_S: Final = 1.0  # before anything counts


async def run(lab: Lab, report: Report, sizes: Sizes) -> None:
    """One cell: calm, storm, calm, the retries."""
    retries, rate, delay_s, endpoints = (sizes[name] for name in ("retries", "rate", "delay", "endpoints"))
    calm = Stream(first=0, count=int(rate * (3 * delay_s + 2)), rate=rate, groups=endpoints)
    storm = range(calm.count, calm.count + retries)
    async with lab.cell(
        f"{retries:,} retries",
        events=storm.stop,
        endpoints=2 * endpoints,
        behaviours=[Behaviour(status=500, fails_first=True, first=endpoints, last=2 * endpoints - 1)],
        config={"retry": {"schedule": [f"{delay_s}s"], "jitter": 0.0}},
        tick_s=1.0,
    ) as cell:
        await cell.daemon.start()
        await cell.daemon.ready()
        began_ns = time.monotonic_ns()
        load = asyncio.create_task(cell.produce(calm), name="calm")
        await asyncio.sleep(delay_s)
        storm_ns = time.monotonic_ns()
        await cell.fill(storm, Mix(groups=endpoints, group=endpoints), rest=False)
        await load
        await cell.arrived(calm.count + 2 * retries, among=lambda: cell.ledger.requests, patience_s=delay_s + 30)
        await cell.until_logged(calm.count + 2 * retries)
        balance = await cell.close_books(report, repeats=True)
        if balance.duplicates != retries:
            report.void(
                cell.name, f"{retries:,} retries were to come, {balance.duplicates:,} requests more than events came"
            )
        _judge(cell, report, storm, delay_s, (began_ns + int(SETTLED_S * SECOND_NS / 2), storm_ns))


def _judge(cell: Cell, report: Report, storm: range, delay_s: float, quiet_ns: tuple[int, int]) -> None:
    ledger = cell.ledger
    waits = [ledger.last[n] - ledger.first[n] for n in storm if ledger.first[n] != NEVER and ledger.count[n] > 1]
    early = sum(wait < delay_s * SECOND_NS for wait in waits)
    came = sorted(ledger.last[n] for n in storm)
    busy_ns = (came[0], came[-1])
    calm = range(storm.start)
    before = _during(cell, calm, quiet_ns)
    beside = _during(cell, calm, busy_ns)
    report.row(
        "first attempts before", {"deliveries": len(before), **report.latencies("first attempts before", before)}
    )
    report.row(
        "first attempts beside the retries",
        {"deliveries": len(beside), **report.latencies("beside the retries", beside)},
    )
    late = Histogram(wait - int(delay_s * SECOND_NS) for wait in waits)
    report.row(
        "retries, behind their time", {"deliveries": len(waits), **report.latencies("retries, behind their time", late)}
    )
    report.note(f"the retries came within {(busy_ns[1] - busy_ns[0]) / 1e9:.2f} s; {early} were early")
    report.bar("early retries", early, at_most=0)
    if len(before) and len(beside):
        report.bar(
            "p99 of first attempts beside the retries, in proportion", beside.ms(0.99) / before.ms(0.99), at_most=1.5
        )


def _during(cell: Cell, events: range, span_ns: tuple[int, int]) -> Histogram:
    """Latencies of what was due within a span."""
    due = cell.ledger.due
    return Histogram(cell.ledger.latencies_ns(n for n in events if span_ns[0] <= due[n] <= span_ns[1]))
