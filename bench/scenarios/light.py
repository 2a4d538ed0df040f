"""Light load: what most installations have most of the time. Latency, and CPU for each event, the INSERT's own
included.

The same INSERTs without a daemon show what of it is the application's, and a bare listener in the daemon's place what
of it nobody can save.
"""

from __future__ import annotations

import dataclasses

from bench import bare, machine
from bench.histogram import Histogram
from bench.lab import Lab
from bench.meter import between
from bench.processes import Process
from bench.producer import Stream
from bench.report import Report, Value
from bench.scenario import Option, Sizes
from bench.scenarios.latency import COMMIT_P50, COMMIT_P99, WARM_UP, loaded

QUESTION = "what does it cost when little happens, and is it quick then?"
BARE = "a bare listener"
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
    alone = await _inserts(lab, report, rate, seconds)
    report.row("the INSERTs alone", {"PostgreSQL µs": alone})
    least = await _bare(lab, report, rate, seconds)
    report.row(BARE, least)
    report.bar(f"{name}: COMMIT to first byte, p50 ms", _number(values[COMMIT_P50]), at_most=0.7)
    report.bar(f"{name}: COMMIT to first byte, p99 ms", _number(values[COMMIT_P99]), at_most=2.2)
    both, floor = _cpu_ms(values), _cpu_ms(least)
    report.bar(f"{name}: daemon + PostgreSQL CPU ms per event", both, at_most=0.5)
    if both and floor:
        report.note(f"that is {both / floor:.2f} × what {BARE} and its INSERTs take, {floor:.2f} ms")


async def _inserts(lab: Lab, report: Report, rate: int, seconds: int) -> float | None:
    warm = int(rate * seconds * WARM_UP)
    events = warm + rate * seconds
    async with lab.cell("the INSERTs alone", events=events, endpoints=1) as cell:
        await cell.produce(Stream(first=0, count=events, rate=rate))
        cell.meter.take()
        balance = await cell.balance()
        if (balance.committed, balance.acknowledged) != (events, events):
            report.void(cell.name, f"{events:,} were to be committed, the database holds {balance.committed:,}")
        spent = cell.meter.since(cell.ledger.due[warm], cell.ledger.acked[events - 1]).postgres_s
    return None if spent is None else spent / (events - warm) * 1e6


async def _bare(lab: Lab, report: Report, rate: int, seconds: int) -> dict[str, Value]:
    """The floor of `bench.bare`, its own INSERTs included."""
    warm = int(rate * seconds * WARM_UP)
    events = warm + rate * seconds
    async with lab.cell(BARE, events=events, endpoints=1, turns=1) as cell:
        await cell.connection.execute(bare.CREATE)
        listener = await Process.start("bench.bare")
        try:
            await listener.say(dsn=cell.dsn, receiver=lab.receiver_address)
            assert await listener.hear() == "ready"
            await cell.produce(Stream(first=0, count=warm, rate=rate, table=bare.TABLE))
            began, before = cell.meter.take(), machine.cpu_s(listener.pid)
            await cell.produce(Stream(first=warm, count=events - warm, rate=rate, table=bare.TABLE))
            await cell.arrived(events, patience_s=1.0)
            ended, after = cell.meter.take(), machine.cpu_s(listener.pid)
        finally:
            await listener.end()
        if cell.ledger.distinct != events:
            report.note(f"{BARE}: {events - cell.ledger.distinct} events committed out of turn, and were missed")
        added = Histogram(cell.ledger.latencies_ns(range(warm, events), since="acked"))
    spent = None if before is None or after is None else after - before
    usage = dataclasses.replace(between(began, ended), daemon_s=spent)
    return {COMMIT_P50: added.ms(0.5), COMMIT_P99: added.ms(0.99), **usage.per(events - warm)}


def _cpu_ms(values: dict[str, Value]) -> float | None:
    daemon, postgres = _number(values["daemon µs"]), _number(values["PostgreSQL µs"])
    return None if daemon is None or postgres is None else (daemon + postgres) / 1e3


def _number(value: Value) -> float | None:
    return value if isinstance(value, int | float) else None
