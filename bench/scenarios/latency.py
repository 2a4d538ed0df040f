"""Open loop: from the moment an event is due to the first byte of its delivery at the receiver, the INSERT's own
COMMIT included.

`after commit` counts from the database's acknowledgement instead: what the dispatcher adds. (It can be close to 0: a
notification and the acknowledgement leave the server together.)
"""

from __future__ import annotations

from typing import Final

from bench.cell import Cell, Mix
from bench.histogram import Histogram
from bench.lab import Lab
from bench.producer import Stream
from bench.report import Report, Value
from bench.scenario import Option, Sizes

QUESTION = "how long from COMMIT to the first byte at the receiver: idle, at 1,000/s, at half of what it can do?"
COMMIT_P50: Final = "after commit p50 ms"
COMMIT_P99: Final = "p99 ms after commit"
OPTIONS = (
    Option("seconds", 15, 1, "of steady load per cell, after a fifth of that or an event for each webhook"),
    Option("endpoints", 100, 20, "webhooks"),
    Option(
        "capacity", 0, 2_000, "events per second that the machine writes and delivers; 0: measure that first", least=0
    ),
    Option("calibration", 100_000, 1_000, "events for measuring that", least=100),
)
IDLE_RATE: Final = 8.0  # far apart enough to fall asleep in between
WARM_UP: Final = 0.2
BATCHES_PER_S: Final = 500.0  # at high rates events share a transaction: what is measured is not INSERT


async def run(lab: Lab, report: Report, sizes: Sizes) -> None:
    """Three cells, the third at half of what the machine can do while the INSERTs share it."""
    seconds, endpoints = sizes["seconds"], sizes["endpoints"]
    capacity = sizes["capacity"] or await _capacity(lab, report, sizes["calibration"], endpoints)
    for name, rate in (
        ("idle", IDLE_RATE),
        ("1,000/s", 1000.0),
        (f"half of capacity, {capacity / 2:,.0f}/s", capacity / 2),
    ):
        batch = max(1, round(rate / BATCHES_PER_S)) if rate > 1000 else 1
        values = await loaded(lab, report, name, rate=rate, seconds=seconds, endpoints=endpoints, batch=batch)
        if rate == IDLE_RATE:
            report.bar("idle: COMMIT to first byte, p50 ms", _number(values[COMMIT_P50]), at_most=0.9)
            report.bar("idle: COMMIT to first byte, p99 ms", _number(values[COMMIT_P99]), at_most=2.5)
        elif rate == capacity / 2:
            report.bar("half of capacity: due to first byte, p99 ms", _number(values["p99 ms"]), at_most=20)


async def loaded(
    lab: Lab, report: Report, name: str, *, rate: float, seconds: float, endpoints: int, batch: int = 1
) -> dict[str, Value]:
    """Measure one cell of open load, add its row and return it. It is warm once every webhook has had an event."""
    warm = max(endpoints, int(rate * seconds * WARM_UP))
    events = warm + max(10, int(rate * seconds))
    async with lab.cell(name, events=events, endpoints=endpoints, tick_s=min(1.0, seconds / 10)) as cell:
        await cell.daemon.start()
        await cell.daemon.ready()
        late = await cell.produce(Stream(first=0, count=events, rate=rate, groups=endpoints, batch=batch))
        await cell.arrived(events)
        values = {
            **_latencies(cell, report, name, range(warm, events)),
            "sent late p99 ms": late.ms(0.99),
            **_cost(cell, warm),
        }
        await cell.until_logged(events)
        await cell.close_books(report)
    report.row(name, values)
    return values


def _latencies(cell: Cell, report: Report, name: str, events: range) -> dict[str, Value]:
    added = Histogram(cell.ledger.latencies_ns(events, since="acked"))
    return {
        **report.latencies(name, Histogram(cell.ledger.latencies_ns(events))),
        COMMIT_P50: added.ms(0.5),
        COMMIT_P99: added.ms(0.99),
    }


def _cost(cell: Cell, warm: int) -> dict[str, Value]:
    """CPU for each event between the end of the warm-up and the last event."""
    ledger = cell.ledger
    usage = cell.meter.since(ledger.due[warm], ledger.acked[ledger.events - 1])
    return {"per second": usage.rate, **usage.per(usage.requests), "RSS MB": cell.meter.rss_max_mb}


async def _capacity(lab: Lab, report: Report, events: int, endpoints: int) -> float:
    """What arrives while more is written than can be delivered: at the rate of a drain, where nobody writes."""
    name = "calibration"
    async with lab.cell(name, events=events, endpoints=endpoints) as cell:
        await cell.fill(range(events), Mix(groups=endpoints))
        await cell.daemon.start()
        await cell.arrived(events)
        drain = (cell.meter.steady() or cell.meter.since(min(cell.ledger.first), max(cell.ledger.first))).rate
        await cell.until_logged(events)
        await cell.close_books(report)
    async with lab.cell(name, events=events, endpoints=endpoints) as cell:
        await cell.daemon.start()
        await cell.daemon.ready()
        batch = max(1, round(drain / BATCHES_PER_S))
        await cell.produce(Stream(first=0, count=events, rate=drain, groups=endpoints, batch=batch))
        ledger = cell.ledger
        rate = cell.meter.since(ledger.due[int(events * WARM_UP)], max(ledger.acked)).rate
        await cell.arrived(events)
        await cell.until_logged(events)
        await cell.close_books(report)
    report.note(
        f"a drain of {events:,} events went at {drain:,.0f}/s; with the INSERTs beside it {rate:,.0f}/s arrived"
    )
    return rate


def _number(value: Value) -> float | None:
    return value if isinstance(value, int | float) else None
