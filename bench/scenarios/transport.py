"""The HTTP client alone: ours, aiohttp as well tuned as it gets, and a bare Protocol with httptools. See
bench/transport.py."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from bench.lab import Lab
from bench.processes import Broken
from bench.report import Report
from bench.scenario import Option, Sizes
from bench.transport import CLIENTS, measure_apart

QUESTION = "what does one request cost in our HTTP client, against aiohttp and against no client at all?"
OPTIONS = (
    Option("requests", 100_000, 1_000, "per cell; a tenth for aiohttp", least=1_000),
    Option(
        "shapes",
        "1x32,100x8,1000x1",
        "1x32",
        "endpoints x requests in flight to each, one or several",
        form=r"[1-9]\d{0,3}x[1-9]\d{0,3}(,[1-9]\d{0,3}x[1-9]\d{0,3})*",
    ),
)


async def run(lab: Lab, report: Report, sizes: Sizes) -> None:
    """Every client, plain and over TLS, in every shape."""
    if find_spec("trustme") is None:
        raise Broken("trustme makes the certificates, and is not there: pip install -e '.[embedded,bench]'")
    shapes = sizes["shapes"].split(",")
    cells: dict[tuple[bool, str, str], dict[str, Any]] = {}
    with lab.watch.over("transport", 2 * len(shapes) * len(CLIENTS)) as step:
        for tls in (False, True):
            for shape in shapes:
                for client in CLIENTS:
                    requests = sizes["requests"] // (10 if client == "aiohttp" else 1)
                    cells[tls, shape, client] = await measure_apart(client, tls, shape, requests)
                    step(len(cells))
    for tls in (False, True):
        for shape in shapes:
            _compare(report, tls, shape, {client: cells[tls, shape, client]["cpu_us"] for client in CLIENTS}, cells)


def _compare(
    report: Report, tls: bool, shape: str, cpu_us: dict[str, float], cells: dict[tuple[bool, str, str], dict[str, Any]]
) -> None:
    where = f"{'TLS' if tls else 'plain'}, {shape}"
    rates = {f"{client} 1/s": cells[tls, shape, client]["rate"] for client in CLIENTS}
    for client, cost in cpu_us.items():
        report.column("µs of CPU per request", where, cost, series=client)
    report.row(where, {**{f"{client} µs": cost for client, cost in cpu_us.items()}, **rates})
    report.bar(f"{where}: times aiohttp", cpu_us["aiohttp"] / cpu_us["ours"], at_least=4 if tls else 6)
    report.bar(f"{where}: share of bare", cpu_us["bare"] / cpu_us["ours"], at_least=0.7)
