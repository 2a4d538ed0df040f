"""The command: `python -m bench <scenario>`, `all` or `smoke`."""

from __future__ import annotations

import argparse
import asyncio
import signal
import subprocess
import sys
import tempfile
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, Final

import asyncpg
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
NO_RUN: Final = (
    Broken,
    DispatcherError,
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    subprocess.CalledProcessError,
)
"""What keeps a run from being one: the apparatus, the server or the machine did not do their part."""

LEFT_OUT_OF_ALL: Final = ("peers",)  # needs other people's packages


def parser(scenarios: dict[str, Scenario]) -> argparse.ArgumentParser:
    """The command line: what is common, and each scenario's sizes."""
    common = argparse.ArgumentParser(add_help=False)
    where = common.add_argument_group("where")
    server = where.add_mutually_exclusive_group()
    server.add_argument(
        "--dsn", default="", help="a PostgreSQL to use: postgresql://user@host/db; may create databases there"
    )
    server.add_argument(
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
            one.add_argument(
                f"--{option.name}", type=option.read, default=option.default, help=f"{option.help} [{option.default}]"
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
        reports = asyncio.run(_unless_stopped(_run(plans, options, smoke=smoke)))
    except NO_RUN as error:
        said = str(error) if isinstance(error, Broken | DispatcherError) else f"{type(error).__name__}: {error}"
        Console(stderr=True).print(said, style="bold red", highlight=False, markup=False, soft_wrap=True)
        return 2
    except Stopped as stopped:
        Console(stderr=True).print(f"stopped by {stopped.by.name}", style="bold red")
        return 128 + stopped.by
    missed = any(bar.is_met is False for report in reports for bar in report.bars)
    failed = any(report.is_void or not report.is_kept for report in reports)
    return int(failed or (options.strict and missed and not smoke))


class Stopped(Exception):
    """A signal came; everything that was started is ended."""

    def __init__(self, by: signal.Signals) -> None:
        super().__init__(by.name)
        self.by = by


async def _unless_stopped(run: Coroutine[Any, Any, list[Report]]) -> list[Report]:
    """End the run, and whatever it started, when somebody wants this process to end. Raises Stopped."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(run)
    came: list[signal.Signals] = []

    def stop(by: signal.Signals) -> None:
        if not came:  # the next one would interrupt what ends the others
            came.append(by)
            task.cancel()

    for by in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(by, stop, by)
    try:
        return await task
    except asyncio.CancelledError:
        if came:
            raise Stopped(came[0]) from None
        raise


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
                _keep(report, results, lab, console, is_smoke=smoke)
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


def _keep(report: Report, results: Path, lab: Lab, console: Console, *, is_smoke: bool = False) -> None:
    try:
        path = report.save(results, lab.surroundings(), is_smoke=is_smoke)
    except OSError as error:
        report.is_kept = False
        said = f"not saved in {results}: {error.strerror}"
        console.print(said, style="bold red", highlight=False, markup=False, soft_wrap=True)
    else:
        console.print(f"  {path}", style="dim", highlight=False, markup=False, soft_wrap=True)


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
    settings = lab.versions["PostgreSQL settings"]
    if unsafe := [f"{name} = {settings[name]}" for name in ("fsync", "synchronous_commit") if settings[name] == "off"]:
        said = f"this PostgreSQL may lose what it has confirmed ({', '.join(unsafe)}): figures are not comparable"
        console.print(said, style="bold yellow", highlight=False)
    if smoke:
        console.print("smoke: sizes are tiny, so the books count and the figures mean nothing", style="bold")


if __name__ == "__main__":
    sys.exit(main())
