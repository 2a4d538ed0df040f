"""The command: `python -m bench <scenario>`, `all` or `smoke`."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from bench.lab import Lab
from bench.processes import Broken
from bench.report import Report
from bench.scenario import Scenario, all_scenarios
from dispatcher.config import Log
from dispatcher.errors import DispatcherError
from dispatcher.logs import start_logging

RESULTS: Final = Path(__file__).resolve().parent / "results"
CEILING_S: Final = 1.0
TICK_S: Final = 0.2
SMOKE_TICK_S: Final = 0.05
PAGE_COLUMNS: Final = 160  # of the tables when they go into a file
LEFT_OUT_OF_ALL: Final = ("peers",)  # needs other people's packages


def parser(scenarios: dict[str, Scenario]) -> argparse.ArgumentParser:
    """The command line: what is common, and each scenario's sizes."""
    common = argparse.ArgumentParser(add_help=False)
    where = common.add_argument_group("where")
    where.add_argument(
        "--dsn", default="", help="a PostgreSQL to use: postgresql://user@host/db; may create databases there"
    )
    where.add_argument(
        "--postgres-bin", type=Path, help="bin directory of the PostgreSQL to start; else the embedded one"
    )
    where.add_argument("--directory", type=Path, help="where its data goes for the time being: a real disk [/var/tmp]")
    where.add_argument("--results", type=Path, help=f"where JSON and SVG go [{RESULTS}; smoke: nowhere]")
    common.add_argument("--seed", type=int, default=1, help="of the producers' jitter [1]")
    common.add_argument(
        "--strict", action="store_true", help="exit 1 when a bar is missed, not only when a run is void"
    )
    common.add_argument("--quiet", action="store_true", help="no progress bar")
    top = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measures the dispatcher from outside. A run whose ledger does not balance is void: exit 1.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="SCENARIO")
    for scenario in scenarios.values():
        one = commands.add_parser(
            scenario.name, parents=[common], help=scenario.question, description=scenario.question
        )
        for option in scenario.options:
            kind = type(option.default)
            one.add_argument(
                f"--{option.name}", type=kind, default=option.default, help=f"{option.help} [{option.default}]"
            )
    commands.add_parser("all", parents=[common], help="every scenario but peers, at its full size")
    smoke = commands.add_parser(
        "smoke", parents=[common], help="every scenario in seconds: does it work? The figures mean nothing"
    )
    smoke.add_argument("--only", nargs="+", choices=list(scenarios), help="these scenarios")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; return 0: done, 1: void or not saved (or, with --strict, a bar missed), 2: no run
    at all."""
    scenarios = all_scenarios()
    options = parser(scenarios).parse_args(arguments)
    smoke = options.command == "smoke"
    match options.command:
        case "all":
            chosen = [s for s in scenarios.values() if s.name not in LEFT_OUT_OF_ALL]
        case "smoke":
            chosen = [
                scenarios[name] for name in options.only or scenarios if name not in LEFT_OUT_OF_ALL or options.only
            ]
        case name:
            chosen = [scenarios[name]]
    plans = [(s, _sizes(s, options, smoke=smoke)) for s in chosen]
    start_logging(Log(level="warning"))  # migrations and the embedded server are no news here
    try:
        reports = asyncio.run(_run(plans, options, smoke=smoke))
    except (Broken, DispatcherError) as error:
        Console(stderr=True).print(str(error), style="bold red", highlight=False, soft_wrap=True)
        return 2
    missed = any(bar.is_met is False for report in reports for bar in report.bars)
    failed = any(report.is_void or not report.is_kept for report in reports)
    return int(failed or (options.strict and missed))


def _sizes(scenario: Scenario, options: argparse.Namespace, *, smoke: bool) -> dict[str, Any]:
    """What was asked for, if this scenario was; else its own."""
    given = vars(options) if options.command == scenario.name else {}
    return {name: given.get(name, value) for name, value in scenario.sizes(smoke=smoke).items()}


async def _run(
    plans: Sequence[tuple[Scenario, dict[str, Any]]], options: argparse.Namespace, *, smoke: bool
) -> list[Report]:
    console = Console(width=None if sys.stdout.isatty() else PAGE_COLUMNS)
    results = options.results or (None if smoke else RESULTS)
    if results is not None:
        _check(results)
    reports = []
    async with Lab(
        directory=options.directory,
        dsn=options.dsn,
        postgres_bin=options.postgres_bin,
        seed=options.seed,
        tick_s=SMOKE_TICK_S if smoke else TICK_S,
        quiet=options.quiet,
    ) as lab:
        await lab.measure_ceiling(CEILING_S / (5 if smoke else 1))
        _introduce(console, lab, smoke=smoke)
        for scenario, sizes in plans:
            report = Report(scenario.name, scenario.question, sizes)
            await scenario.run(lab, report, sizes)
            report.show(console, judged=not smoke)
            if results is not None:
                _keep(report, results, lab, console)
            reports.append(report)
    return reports


def _check(results: Path) -> None:
    """Raise Broken when nothing can be written there: before the run, not behind it."""
    try:
        results.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=results):
            pass
    except OSError as error:
        raise Broken(f"no results can be written to {results}: {error.strerror}") from error


def _keep(report: Report, results: Path, lab: Lab, console: Console) -> None:
    try:
        path = report.save(results, lab.surroundings())
    except OSError as error:
        report.is_kept = False
        console.print(f"not saved in {results}: {error.strerror}", style="bold red", highlight=False, soft_wrap=True)
    else:
        console.print(f"  {path}", style="dim", highlight=False, soft_wrap=True)


def _introduce(console: Console, lab: Lab, *, smoke: bool) -> None:
    around = lab.surroundings()
    here = around["machine"]
    console.print(f"{here['cpu']}, {here['cores']} cores, {here['kernel']}", highlight=False)
    console.print(
        f"{here['python']}, uvloop {here['uvloop']}, asyncpg {here['asyncpg']}, "
        f"PostgreSQL {lab.versions['PostgreSQL']}, dispatcher {here['dispatcher']} at {here['git']}",
        highlight=False,
    )
    micro = lab.ceiling["µs"]
    cost = f", {micro:.1f} µs of its CPU each" if micro else ""
    console.print(f"the receiver alone takes {lab.ceiling['requests/s']:,.0f} requests/s{cost}", highlight=False)
    if smoke:
        console.print("smoke: sizes are tiny, so the books count and the figures mean nothing", style="bold")


if __name__ == "__main__":
    sys.exit(main())
