"""One bad subscriber must not be anybody else's problem, with no setting changed.

Of a thousand webhooks a tenth hangs, a tenth refuses connections, a tenth answers 500, and one gets more than it can
take. Measured are the others, against the same load on a thousand healthy ones; the two kinds of run take turns, and
the turns are pooled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Final

from bench.cell import Cell, Mix
from bench.histogram import Histogram
from bench.lab import Lab
from bench.ledger import NEVER
from bench.producer import Stream
from bench.receiver import Behaviour
from bench.report import Report
from bench.scenario import Option, Sizes

QUESTION = "does a subscriber that hangs, fails or floods cost the others anything?"
OPTIONS = (
    Option("endpoints", 1000, 40, "webhooks", least=20),
    Option("rate", 200, 200, "events per second for the healthy ones"),
    Option("flood", 1000, 500, "events per second for the flooded one"),
    Option("seconds", 20, 1, "of steady load"),
    Option("events", 100_000, 2_000, "of a drain", least=100),
    Option("rounds", 2, 1, "turns of each kind"),
)
FLOODED_S: Final = 0.05  # how long the flooded one takes: 16 at once make 320 a second
FLOOD_EVERY: Final = 6
WARM_UP: Final = 0.2
CONFIG: Final = {"delivery": {"drain_s": 1.0}}  # only how long the end of the run waits for what hangs


@dataclasses.dataclass(frozen=True, slots=True)
class Crowd:
    """Who is who: numbers from 0 on hang, refuse, answer 500, one is flooded, the rest is healthy."""

    endpoints: int
    is_ill: bool

    @property
    def tenth(self) -> int:
        return self.endpoints // 10

    @property
    def flooded(self) -> int:
        return 3 * self.tenth

    @property
    def healthy(self) -> range:
        return range(self.flooded + 1, self.endpoints)

    @property
    def behaviours(self) -> list[Behaviour]:
        tenth = self.tenth
        ill = [
            Behaviour(hangs=True, first=0, last=tenth - 1),
            Behaviour(status=500, first=2 * tenth, last=3 * tenth - 1),
            Behaviour(delay_s=FLOODED_S, first=self.flooded, last=self.flooded),
        ]
        return ill if self.is_ill else []

    def refuses(self, endpoint: int) -> bool:
        return self.is_ill and self.tenth <= endpoint < 2 * self.tenth

    @property
    def name(self) -> str:
        return "30 % ill, one flooded" if self.is_ill else "all healthy"


async def run(lab: Lab, report: Report, sizes: Sizes) -> None:
    """Open load first, then drains."""
    crowds = [Crowd(sizes["endpoints"], is_ill) for is_ill in (False, True)]
    rates: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(sizes["rounds"]):
        for crowd in crowds:
            await _load(lab, report, crowd, sizes)
        for crowd in crowds:
            rates[crowd.is_ill].append(await _drain(lab, report, crowd, sizes["events"]))
    well, ill = (report.histograms[crowd.name] for crowd in crowds)
    for crowd in crowds:
        report.row(f"{sizes['rate']}/s, {crowd.name}", report.latencies(crowd.name, Histogram()))
    for crowd in crowds:
        report.row(f"drain, {crowd.name}", {"to the healthy/s": max(rates[crowd.is_ill])})
    report.bar("p99 of the healthy beside the ill, in proportion", ill.ms(0.99) / max(well.ms(0.99), 1e-6), at_most=1.5)
    report.bar("p99 of the healthy beside the ill, ms", ill.ms(0.99), at_most=5)
    report.bar("deliveries/s to the healthy, in proportion", max(rates[True]) / max(*rates[False], 1e-6), at_least=0.9)


async def _load(lab: Lab, report: Report, crowd: Crowd, sizes: Sizes) -> None:
    healthy, ill = len(crowd.healthy), crowd.flooded
    seconds, rate = sizes["seconds"] * (1 + WARM_UP), sizes["rate"]
    main = Stream(first=0, count=int(rate * seconds), rate=rate, group=crowd.healthy.start, groups=healthy)
    other_rate = rate * ill / healthy
    others = Stream(
        first=main.count, count=int(other_rate * seconds), rate=other_rate, group=0, groups=ill, connections=2
    )
    flood = Stream(
        first=main.count + others.count,
        count=int(sizes["flood"] * seconds),
        rate=sizes["flood"],
        batch=10,
        connections=2,
        group=crowd.flooded if crowd.is_ill else crowd.healthy.start,
        groups=1 if crowd.is_ill else healthy,
    )
    name = f"{rate}/s, {crowd.name}"
    async with _cell(lab, name, crowd, main.count + others.count + flood.count, tick_s=1.0) as cell:
        await cell.daemon.start()
        await cell.daemon.ready()
        await cell.produce(main, others, flood)
        await cell.arrived(main.count, among=lambda: main.count - bytes(cell.ledger.count[: main.count]).count(0))
        counted = range(int(main.count * WARM_UP / (1 + WARM_UP)), main.count)
        report.latencies(crowd.name, Histogram(cell.ledger.latencies_ns(counted)))
        await _close(cell, report, crowd, main.numbers)


async def _drain(lab: Lab, report: Report, crowd: Crowd, events: int) -> float:
    """Deliveries per second to the healthy ones, between a tenth and nine tenths of them."""
    mix = Mix(groups=crowd.endpoints)
    if crowd.is_ill:
        events = events * FLOOD_EVERY // (FLOOD_EVERY - 1)
        mix = Mix(groups=crowd.endpoints, flood=crowd.flooded, flood_every=FLOOD_EVERY)
    mine = [n for n in range(events) if mix.group_of(n) in crowd.healthy]
    async with _cell(lab, f"drain, {crowd.name}", crowd, events) as cell:
        await cell.fill(range(events), mix)
        await cell.daemon.start()
        count = cell.ledger.count
        await cell.arrived(len(mine), among=lambda: sum(map(bool, map(count.__getitem__, mine))), every_s=0.25)
        came = sorted(at for at in map(cell.ledger.first.__getitem__, mine) if at != NEVER)
        await _close(cell, report, crowd, mine)
    low, high = len(came) // 10, len(came) * 9 // 10
    return (high - low) / ((came[high] - came[low]) / 1e9) if high > low else 0.0


def _cell(
    lab: Lab, name: str, crowd: Crowd, events: int, tick_s: float | None = None
) -> AbstractAsyncContextManager[Cell]:
    return lab.cell(
        name,
        events=events,
        endpoints=crowd.endpoints,
        behaviours=crowd.behaviours,
        refused=crowd.refuses,
        config=CONFIG,
        tick_s=tick_s,
    )


async def _close(cell: Cell, report: Report, crowd: Crowd, healthy: Sequence[int]) -> None:
    """Books over the healthy; the ill ones' events must all be on record or pending."""
    if not crowd.is_ill:
        await cell.arrived(cell.ledger.events)
    await cell.close_books(report, healthy if crowd.is_ill else None, logged=not crowd.is_ill)
    lost = await cell.unaccounted()
    if lost:
        report.void(cell.name, f"{lost:,} events were read and are neither settled, pending nor still to be read")
