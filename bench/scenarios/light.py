"""Light load: what most installations have most of the time. Latency, and CPU for each event, the INSERT's own
included.

The same INSERTs without a daemon show what of it is the application's.
"""

from __future__ import annotations

from bench.lab import Lab
from bench.producer import Stream
from bench.report import Report, Value
from bench.scenario import Option, Sizes
from bench.scenarios.latency import COMMIT_P50, COMMIT_P99, WARM_UP, loaded

QUESTION = "what does it cost when little happens, and is it quick then?"
OPTIONS = (
    Option("rate", 200, 200, "events per second"),
    Option("seconds", 20, 1, "of steady load"),
    Option("endpoints", 100, 20, "webhooks"),
)


async def run(lab: Lab, report: Report, sizes: Sizes) -> None:
    """One cell, and its INSERTs alone."""
    rate, seconds, endpoints = sizes["rate"], sizes["seconds"], sizes["endpoints"]
    name = f"{rate}/s"
    values = await loaded(lab, report, name, rate=rate, seconds=seconds, endpoints=endpoints)
    alone = await _inserts(lab, rate, seconds)
    report.row("the INSERTs alone", {"PostgreSQL µs": alone})
    report.bar(f"{name}: COMMIT to first byte, p50 ms", _number(values[COMMIT_P50]), at_most=0.7)
    report.bar(f"{name}: COMMIT to first byte, p99 ms", _number(values[COMMIT_P99]), at_most=2.2)
    daemon, postgres = _number(values["daemon µs"]), _number(values["PostgreSQL µs"])
    both = None if daemon is None or postgres is None else (daemon + postgres) / 1e3
    report.bar(f"{name}: daemon + PostgreSQL CPU ms per event", both, at_most=0.5)


async def _inserts(lab: Lab, rate: int, seconds: int) -> float | None:
    warm = int(rate * seconds * WARM_UP)
    events = warm + rate * seconds
    async with lab.cell("the INSERTs alone", events=events, endpoints=1) as cell:
        await cell.produce(Stream(first=0, count=events, rate=rate))
        cell.meter.take()
        spent = cell.meter.since(cell.ledger.due[warm], cell.ledger.acked[events - 1]).postgres_s
    return None if spent is None else spent / (events - warm) * 1e6


def _number(value: Value) -> float | None:
    return value if isinstance(value, int | float) else None
