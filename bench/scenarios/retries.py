"""A storm of retries: thousands of deliveries have failed and come due in the same second. First attempts must not
notice.

Every delivery of the storm fails honestly, as fast as the machine goes: that is what it can do at all. Then their due
times are moved, in the table, into one second, and others are put far behind it. The daemon starts anew and finds
them. A calm stream runs all the time. Its latencies are compared: before the storm, and while the retries come. A
retry may never be early, and how late they may be follows from what the machine can do.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from datetime import UTC, datetime
from typing import Final

import asyncpg

from bench.cell import Cell, Mix
from bench.histogram import Histogram
from bench.lab import Lab
from bench.ledger import ID_DIGITS
from bench.processes import Broken
from bench.producer import Stream
from bench.receiver import Behaviour
from bench.report import Report
from bench.scenario import Option, Sizes

QUESTION = "thousands of retries due in the same second: do first attempts notice, and are retries on time?"
OPTIONS = (
    Option("retries", 20_000, 500, "due within one second", least=10),
    Option("waiting", 100_000, 1_000, "more of them, due in an hour"),
    Option("rate", 200, 200, "first attempts per second beside them"),
    Option("before", 10, 1, "seconds of first attempts alone, before"),
    Option("endpoints", 100, 20, "webhooks for each of the two"),
)
SECOND_NS: Final = 1_000_000_000
SETTLED_S: Final = 1.0  # before anything counts
FAIL_S: Final = 60.0
MOVE_S: Final = 5.0  # for a million rows it may take longer: then the storm comes as the daemon starts
START_S: Final = 3.0
SLOWEST_PER_S: Final = 4_000  # so long does the calm stream last
SHARE: Final = 0.25  # of what the machine can do flat out is what it can do on time beside others
LATE_MS: Final = 350.0  # a quarter of a second for the tick, and 100 ms
FAILED: Final = "SELECT count(*) FROM dispatcher.pending WHERE due_at < 'infinity'"
MOVE: Final = """
    UPDATE dispatcher.pending p
    SET due_at = $1::timestamptz + (right(o.id, $2::integer)::bigint - $3) * 1000 / $4::bigint * interval '1 ms'
    FROM dispatcher.outbox o WHERE o.seq = p.event_seq
"""
WAIT: Final = """
    INSERT INTO dispatcher.pending (endpoint_id, event_seq, generation, event_xid, event_at, state, attempts, due_at)
    SELECT 1 + n % 100, 1000000000 + n, 0, '1', now(), 'retrying', 1, now() + interval '1 hour' + n * interval '1 ms'
    FROM generate_series(1, $1::bigint) n
"""


async def run(lab: Lab, report: Report, sizes: Sizes) -> None:
    """One cell: the failures, calm, and the retries beside it."""
    retries, rate, quiet_s, endpoints = (sizes[name] for name in ("retries", "rate", "before", "endpoints"))
    seconds = SETTLED_S + quiet_s + 2 + retries / SLOWEST_PER_S
    calm = Stream(first=0, count=int(rate * seconds), rate=rate, groups=endpoints)
    storm = range(calm.count, calm.count + retries)
    async with lab.cell(
        f"{retries:,} retries",
        events=storm.stop,
        endpoints=2 * endpoints,
        behaviours=[Behaviour(status=500, fails_first=True, first=endpoints, last=2 * endpoints - 1)],
        config={"retry": {"schedule": ["1h"], "jitter": 0.0}},
    ) as cell:
        await cell.fill(storm, Mix(groups=endpoints, group=endpoints))
        possible = await _fail(cell, storm)
        await cell.connection.execute(WAIT, sizes["waiting"], timeout=None)
        due_ns = await _move(cell, storm, START_S + SETTLED_S + quiet_s)
        cell.meter.every_s = 1.0  # reading CPU takes milliseconds, and those are measured now
        await cell.daemon.start()
        await cell.daemon.ready()
        await asyncio.sleep(max(0.0, due_ns / SECOND_NS - time.monotonic() - SETTLED_S - quiet_s))
        began_ns = time.monotonic_ns() + int(SETTLED_S * SECOND_NS)
        load = asyncio.create_task(cell.produce(calm), name="calm")
        await cell.arrived(calm.count + 2 * retries, among=lambda: cell.ledger.requests, patience_s=quiet_s + 30)
        await load
        await cell.until_logged(calm.count + 2 * retries)
        balance = await cell.close_books(report, repeats=True)
        if balance.duplicates != retries:
            report.void(
                cell.name, f"{retries:,} retries were to come, {balance.duplicates:,} requests more than events came"
            )
        _judge(cell, report, storm, (began_ns, due_ns), possible)


async def _fail(cell: Cell, storm: range) -> float:
    """Let every delivery of the storm fail once, as fast as it goes; return how many a second did."""
    retries = len(storm)
    await cell.daemon.start()
    await cell.arrived(retries)
    deadline = time.monotonic() + FAIL_S
    while (failed := await cell.connection.fetchval(FAILED)) < retries:
        if time.monotonic() > deadline:
            raise Broken(f"{retries:,} deliveries were to fail, {failed:,} have a pending row")
        await asyncio.sleep(0.05)
    await cell.stop_daemon()
    came = sorted(cell.ledger.first[n] for n in storm)
    low, high = retries // 10, retries * 9 // 10
    return (high - low) / max(came[high] - came[low], 1) * SECOND_NS


async def _move(cell: Cell, storm: range, ahead_s: float) -> int:
    """Let what failed come due within the one second that begins in `ahead_s`, about; return when that is."""
    wall, now_ns = time.time(), time.monotonic_ns()
    due = math.ceil(wall + ahead_s + MOVE_S)
    at = datetime.fromtimestamp(due, UTC)
    await cell.connection.execute(MOVE, at, ID_DIGITS, storm.start, len(storm), timeout=None)
    await cell.connection.execute("VACUUM ANALYZE dispatcher.pending", timeout=None)
    with contextlib.suppress(asyncpg.InsufficientPrivilegeError):
        await cell.connection.execute("CHECKPOINT", timeout=None)  # or that of a million rows comes with the storm
    return now_ns + int((due - wall) * SECOND_NS)


def _judge(cell: Cell, report: Report, storm: range, quiet_ns: tuple[int, int], possible: float) -> None:
    ledger = cell.ledger
    due_ns = quiet_ns[1]
    late_ns = [
        ledger.last[n] - due_ns - at * 1000 // len(storm) * 1_000_000
        for at, n in enumerate(storm)
        if ledger.count[n] > 1
    ]
    came = sorted(ledger.last[n] for n in storm)
    busy_ns = (due_ns, came[-1])
    calm = range(storm.start)
    before = _during(cell, calm, quiet_ns)
    beside = _during(cell, calm, busy_ns)
    usage = cell.meter.since(*busy_ns)
    report.row(
        "first attempts before", {"deliveries": len(before), **report.latencies("first attempts before", before)}
    )
    report.row(
        "first attempts beside the retries",
        {"deliveries": len(beside), **report.latencies("beside the retries", beside)},
    )
    late = Histogram(max(0, each) for each in late_ns)
    report.row(
        "retries, behind their time",
        {
            "deliveries": len(late),
            **report.latencies("retries, behind their time", late),
            **usage.per(len(late) + len(beside)),
        },
    )
    seconds = (busy_ns[1] - busy_ns[0]) / SECOND_NS
    report.note(f"{possible:,.0f} of them failed per second; the retries came within {seconds:.2f} s")
    report.bar("early retries", sum(each < 0 for each in late_ns), at_most=0)
    if len(before) and len(beside):
        report.bar(
            "p99 of first attempts beside the retries, in proportion", beside.ms(0.99) / before.ms(0.99), at_most=1.5
        )
    if len(late) <= SHARE * possible:
        report.bar("retries' p99 behind their time, ms", late.ms(0.99), at_most=LATE_MS)
    else:
        report.note("that is more than this machine can do in one second beside others: lateness is shown, not judged")


def _during(cell: Cell, events: range, span_ns: tuple[int, int]) -> Histogram:
    """Latencies of what was due within a span."""
    due = cell.ledger.due
    return Histogram(cell.ledger.latencies_ns(n for n in events if span_ns[0] <= due[n] <= span_ns[1]))
