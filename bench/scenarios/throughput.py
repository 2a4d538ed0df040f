"""Drain: events are committed while the daemon is down; it starts and delivers them all.

The figure that counts is taken between 10 and 90 % of the deliveries, where nothing is starting or ending; the whole
drain, from the first request to the last, stands beside it. With endpoints that take their time the limit is how many
requests may be out at once.
"""

from __future__ import annotations

from typing import Any, Final

from bench.cell import Mix
from bench.lab import Lab
from bench.ledger import ACCEPTED, NEVER
from bench.receiver import Behaviour
from bench.report import Report
from bench.scenario import Option, Sizes

QUESTION = "how many deliveries per second, and what does each cost?"
OPTIONS = (
    Option("events", 200_000, 2_000, "deliveries per cell (a tenth of the events at a fan-out of 10)", least=10),
    Option("endpoints", 100, 20, "webhooks", of=10, least=10),
    Option(
        "cell", "all", "all", "one of the four, 1x0, 10x0, 1x50, 10x50 (fan-out x ms), or all", form="all|(1|10)x(0|50)"
    ),
)
SLOW_S: Final = 0.05
IN_FLIGHT_MAX: Final = 2000  # the configuration's default, and
CONCURRENCY_MAX: Final = 16  # that of one webhook


async def run(lab: Lab, report: Report, sizes: Sizes) -> None:
    """Four cells: fan-out 1 and 10, endpoints that answer at once and after 50 ms."""
    for delay_s in (0.0, SLOW_S):
        for fanout in (1, 10):
            if sizes["cell"] not in {"all", f"{fanout}x{delay_s * 1e3:.0f}"}:
                continue
            name = f"fan-out {fanout}, {delay_s * 1e3:.0f} ms"
            values = await drain(lab, report, name, sizes["events"], sizes["endpoints"], fanout=fanout, delay_s=delay_s)
            _judge(report, name, values, sizes["endpoints"], delay_s)


async def drain(
    lab: Lab, report: Report, name: str, deliveries: int, endpoints: int, *, fanout: int = 1, delay_s: float = 0.0
) -> dict[str, Any]:
    """Measure one drain, add its row and return it."""
    events = deliveries // fanout
    async with lab.cell(
        name, events=events, endpoints=endpoints, fanout=fanout, behaviours=[Behaviour(delay_s=delay_s)]
    ) as cell:
        await cell.fill(range(events), Mix(groups=endpoints // fanout))
        await cell.daemon.start()
        await cell.arrived(events * fanout)
        await cell.until_logged(events * fanout)
        came = [at for at in cell.ledger.first if at != NEVER]
        whole_s = (max(came) - min(came)) / 1e9 if came else 0.0
        balance = await cell.close_books(report)
        values = {
            **cell.meter.drain(),
            "whole drain/s": len(came) / whole_s if whole_s else None,
            "RSS MB": cell.meter.rss_max_mb,
            "connections": cell.ledger.head[ACCEPTED],
            "duplicates": balance.duplicates,
        }
    report.row(name, values)
    report.column("deliveries/s", name, values["deliveries/s"])
    return values


def _judge(report: Report, name: str, values: dict[str, Any], endpoints: int, delay_s: float) -> None:
    if delay_s:
        slots = min(IN_FLIGHT_MAX, endpoints * CONCURRENCY_MAX)
        limit = slots / delay_s
        at_least = min(0.95 * limit, 30_000)
        report.bar(
            f"{name}: deliveries/s ({slots:,} slots ÷ {delay_s:g} s = {limit:,.0f})",
            values["deliveries/s"],
            at_least=at_least,
        )
        return
    report.bar(f"{name}: deliveries/s", values["deliveries/s"], at_least=30_000, stretch=40_000)
    report.bar(f"{name}: daemon CPU µs per delivery", values["daemon µs"], at_most=30)
    report.bar(f"{name}: PostgreSQL CPU µs per delivery", values["PostgreSQL µs"], at_most=8)
