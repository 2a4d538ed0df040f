"""The HTTP client alone: ours, aiohttp as well tuned as it gets, and a bare Protocol with httptools. See
bench/transport.py."""

from __future__ import annotations

import asyncio
from typing import Any

from bench.lab import Lab
from bench.report import Report
from bench.scenario import Option, Sizes
from bench.transport import CLIENTS, measure

QUESTION = "what does one request cost in our HTTP client, against aiohttp and against no client at all?"
OPTIONS = (
    Option("requests", 100_000, 1_000, "per cell; a tenth for aiohttp"),
    Option("shapes", "1x32,100x8,1000x1", "1x32", "endpoints x requests in flight to each"),
)


async def run(lab: Lab, report: Report, sizes: Sizes) -> None:
    """Every client, plain and over TLS, in every shape."""
    shapes = sizes["shapes"].split(",")
    cells: dict[tuple[bool, str, str], dict[str, Any]] = {}
    with lab.watch.over("transport", 2 * len(shapes) * len(CLIENTS)) as step:
        for tls in (False, True):
            for shape in shapes:
                for client in CLIENTS:
                    requests = sizes["requests"] // (10 if client == "aiohttp" else 1)
                    cells[tls, shape, client] = await asyncio.to_thread(measure, client, tls, shape, requests)
                    step(len(cells))
    for tls in (False, True):
        for shape in shapes:
            _compare(report, tls, shape, {client: cells[tls, shape, client]["cpu_us"] for client in CLIENTS}, cells)


def _compare(
    report: Report, tls: bool, shape: str, cpu_us: dict[str, float], cells: dict[tuple[bool, str, str], dict[str, Any]]
) -> None:
    where = f"{'TLS' if tls else 'plain'}, {shape}"
    rates = {f"{client} 1/s": cells[tls, shape, client]["rate"] for client in CLIENTS}
    report.row(where, {**{f"{client} µs": cost for client, cost in cpu_us.items()}, **rates})
    report.bar(f"{where}: times aiohttp", cpu_us["aiohttp"] / cpu_us["ours"], at_least=4 if tls else 6)
    report.bar(f"{where}: share of bare", cpu_us["bare"] / cpu_us["ours"], at_least=0.7)
