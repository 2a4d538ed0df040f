"""What a scenario is, and where they are found: one file each in `bench/scenarios/`.

A file has `QUESTION` (what it answers, one line), `OPTIONS` (its sizes, each with what it is in a smoke run) and
`async def run(lab, report, sizes)`. That is all: flags, table, JSON, plot and the smoke run follow from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from bench import scenarios
from bench.lab import Lab
from bench.report import Report

ORDER: Final = (
    "transport", "throughput", "latency", "light", "isolation", "producers", "growth", "retries", "recovery", "memory",
    "soak", "vacuum", "peers",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """A size that can be chosen: `--name`. A number is at least `least`, a multiple of `of`; a text matches `form`."""

    name: str
    default: int | str
    smoke: int | str
    help: str
    least: int = 1
    of: int = 1
    form: str = ""

    def read(self, text: str) -> int | str:
        """What a command line says. Raises argparse.ArgumentTypeError."""
        if isinstance(self.default, str):
            if not re.fullmatch(self.form, text):
                raise argparse.ArgumentTypeError(f"expected {self.help}, like {self.smoke}, not {text!r}")
            return text
        if not re.fullmatch("[0-9]{1,12}", text) or int(text) < self.least or int(text) % self.of:
            kind = f"a multiple of {self.of}" if self.of > 1 else "a whole number"
            raise argparse.ArgumentTypeError(f"expected {kind}, {self.least:,} or more, not {text!r}")
        return int(text)


Sizes = Mapping[str, Any]
Run = Callable[[Lab, Report, Sizes], Awaitable[None]]


@dataclasses.dataclass(frozen=True, slots=True)
class Scenario:
    """One question and how it is answered."""

    name: str
    question: str
    options: tuple[Option, ...]
    run: Run

    def sizes(self, *, smoke: bool = False) -> dict[str, Any]:
        """What each option is unless somebody says otherwise."""
        return {option.name: option.smoke if smoke else option.default for option in self.options}


def all_scenarios() -> dict[str, Scenario]:
    """Every scenario there is: the known ones in the order in which they build on each other, then the others."""
    names = [module.name for module in pkgutil.iter_modules(scenarios.__path__)]
    names.sort(key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    return {name: _load(name) for name in names}


def _load(name: str) -> Scenario:
    module = importlib.import_module(f"bench.scenarios.{name}")
    return Scenario(name, module.QUESTION, module.OPTIONS, module.run)
