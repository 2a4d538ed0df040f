"""What a run says: rows for a table, bars that are met or missed, why it is void if it is, and everything as JSON and
SVG."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from bench import plot
from bench.histogram import Histogram
from bench.ledger import Balance

Value = float | int | str | None
DASH: Final = "–"
FRAME: Final = 3  # characters around each cell of a table


@dataclasses.dataclass(frozen=True, slots=True)
class Bar:
    """A figure and what it has to be. Ratios travel between machines; absolute figures are of a two-core machine."""

    what: str
    value: float | None
    at_least: float | None = None
    at_most: float | None = None
    stretch: float | None = None

    @property
    def is_met(self) -> bool | None:
        """None: it could not be measured here."""
        if self.value is None:
            return None
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)

    @property
    def wanted(self) -> str:
        """The condition, for people."""
        parts = [f"≥ {shown(self.at_least)}"] if self.at_least is not None else []
        parts += [f"≤ {shown(self.at_most)}"] if self.at_most is not None else []
        parts += [f"(stretch {shown(self.stretch)})"] if self.stretch is not None else []
        return " ".join(parts)


class Report:
    """One scenario's outcome, filled in as it runs."""

    def __init__(self, scenario: str, question: str, sizes: Mapping[str, Any]) -> None:
        self.scenario, self.question, self.sizes = scenario, question, dict(sizes)
        self.began_unix_s = time.time()
        self.is_kept = True  # its files were written, or nobody wanted them
        self.rows: list[tuple[str, dict[str, Value]]] = []
        self.bars: list[Bar] = []
        self.books: dict[str, Balance] = {}
        self.faults: list[str] = []
        self.notes: list[str] = []
        self.histograms: dict[str, Histogram] = {}
        self.series: dict[str, list[tuple[float, float]]] = {}  # "what, unit": (seconds, value)
        self.columns: dict[str, dict[str, dict[str, float]]] = {}  # unit: group: series

    @property
    def is_void(self) -> bool:
        """Whether nothing may be concluded from it."""
        return bool(self.faults)

    def row(self, cell: str, values: Mapping[str, Value]) -> None:
        """A line of the table; columns are the union of all lines' keys, units in their names."""
        self.rows.append((cell, dict(values)))

    def column(self, unit: str, group: str, value: Value, *, series: str = "") -> None:
        """A column of the plot, beside the others of its group; one that could not be measured is left out."""
        if isinstance(value, int | float):
            self.columns.setdefault(unit, {}).setdefault(group, {})[series] = value

    def bar(
        self,
        what: str,
        value: float | None,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        stretch: float | None = None,
    ) -> None:
        """Something that has to hold."""
        self.bars.append(Bar(what, value, at_least, at_most, stretch))

    def close_books(self, cell: str, balance: Balance) -> None:
        """Keep a run's books; the report is void if they do not balance."""
        self.books[cell] = balance
        for fault in balance.faults:
            self.void(cell, fault)

    def void(self, cell: str, fault: str) -> None:
        """Nothing of this may be believed, and why."""
        self.faults.append(f"{cell}: {fault}")

    def note(self, text: str) -> None:
        """Something to know when reading the figures."""
        self.notes.append(text)

    def latencies(self, label: str, histogram: Histogram) -> dict[str, Value]:
        """Keep a distribution for JSON and plot, pooled with what bears the same label; return its columns."""
        self.histograms.setdefault(label, Histogram()).add(histogram)
        pooled = self.histograms[label]
        return {
            "p50 ms": pooled.ms(0.5),
            "p90 ms": pooled.ms(0.9),
            "p99 ms": pooled.ms(0.99),
            "p99.9 ms": pooled.ms(0.999),
            "max ms": pooled.highest_ns / 1e6,
        }

    def show(self, console: Console, *, judged: bool = True) -> None:
        """Print it; the bars only if the sizes were such that they mean something."""
        for table in self._tables(console):
            console.print(table)
        if self.bars and judged:
            console.print(self._bars())
        for note in self.notes:
            console.print(f"  {note}", style="dim", highlight=False, markup=False)
        for fault in self.faults:
            console.print(f"VOID  {fault}", style="bold red", highlight=False, markup=False)

    def _tables(self, console: Console) -> Iterator[Table]:
        """As many below each other as it takes for every figure to be seen."""
        names = list(dict.fromkeys(name for _, values in self.rows for name in values))
        heads = {name: self._head(name) for name in names}
        first = FRAME + max((len(cell) for cell, _ in self.rows), default=0)
        title: str | None = f"{self.scenario}: {self.question}"
        here: list[str] = []
        taken = first
        for name in names:
            width = FRAME + max(len(line) for line in [*heads[name], *self._figures(name)])
            if here and taken + width >= console.width:
                yield self._table(title, {name: heads[name] for name in here})
                title, here, taken = None, [], first
            here.append(name)
            taken += width
        yield self._table(title, {name: heads[name] for name in here})

    def _figures(self, name: str) -> list[str]:
        return [shown(values.get(name)) for _, values in self.rows]

    def _head(self, name: str) -> list[str]:
        """A column's name in lines no wider than its longest word or figure."""
        return textwrap.wrap(name, max(map(len, [*name.split(), *self._figures(name)])))

    def _table(self, title: str | None, heads: Mapping[str, Sequence[str]]) -> Table:
        table = Table(title=title and Text(title), title_justify="left", title_style="bold")
        table.add_column("", no_wrap=True)
        for lines in heads.values():
            table.add_column(Text("\n".join(lines)), justify="right", no_wrap=True)
        for cell, values in self.rows:
            if any(name in values for name in heads):
                table.add_row(Text(cell), *(Text(shown(values.get(name))) for name in heads))
        return table

    def _bars(self) -> Table:
        table = Table("bar", "wanted", "measured", "", box=None, pad_edge=False)
        for bar in self.bars:
            mark = {True: "[green]met[/]", False: "[red]missed[/]", None: "[dim]not measured[/]"}[bar.is_met]
            table.add_row(Text(bar.what), bar.wanted, shown(bar.value), mark)
        return table

    def to_json(self, surroundings: Mapping[str, Any]) -> dict[str, Any]:
        """Everything, to be compared later."""
        return {
            "scenario": self.scenario,
            "question": self.question,
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.began_unix_s)),
            "is_void": self.is_void,
            "faults": self.faults,
            "settings": self.sizes,
            **surroundings,
            "rows": [{"cell": cell, **values} for cell, values in self.rows],
            "bars": [{**dataclasses.asdict(bar), "is_met": bar.is_met} for bar in self.bars],
            "books": {cell: balance.to_json() for cell, balance in self.books.items()},
            "notes": self.notes,
            "histograms": {label: histogram.to_json() for label, histogram in self.histograms.items()},
            "series": self.series,
            "columns": self.columns,
        }

    def save(self, directory: Path, surroundings: Mapping[str, Any], *, is_smoke: bool = False) -> Path:
        """Write the JSON and the plot; return the path of the JSON. Raises OSError, and leaves no half of a file."""
        document = self.to_json(surroundings) | {"is_smoke": is_smoke}
        if is_smoke:
            document["bars"] = [bar | {"is_met": None} for bar in document["bars"]]
        began = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self.began_unix_s))
        path = _claim(directory, f"{began}-{self.scenario}")
        texts = {path: json.dumps(document, indent=1) + "\n", path.with_suffix(".svg"): self.draw()}
        try:
            for file, text in texts.items():
                if text:
                    file.write_text(text, encoding="utf-8")
        except OSError:
            for file in texts:
                file.unlink(missing_ok=True)
            raise
        return path

    def draw(self) -> str:
        """The plot that suits what was measured; empty if there is nothing to draw."""
        title = f"{self.scenario}: {self.question}" + ("  VOID" if self.is_void else "")
        if self.series:
            return plot.lines(title, self.series)
        if self.columns:
            ((unit, groups),) = self.columns.items()
            return plot.columns(title, groups, unit)
        return plot.quantiles(title, self.histograms)


def _claim(directory: Path, stem: str) -> Path:
    """A new file of that name, or with a number behind it: another run may have begun in the same second."""
    for number in itertools.count(1):
        path = directory / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")
        with contextlib.suppress(FileExistsError):
            path.touch(exist_ok=False)
            return path
    raise AssertionError("counting does not end")


def shown(value: Value) -> str:
    """A figure with as many digits as can be meant."""
    if value is None:
        return DASH
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


class Watch:
    """The progress bar, on standard error, for people; silent when nobody is looking."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[now]}"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            refresh_per_second=2,  # drawing costs CPU that the run should have
            disable=quiet or not self.console.is_terminal,
        )

    @contextlib.contextmanager
    def over(self, what: str, total: float) -> Iterator[Callable[[float], None]]:
        """Watch one phase; call what is yielded with how far it is."""
        task = self._progress.add_task(what, total=total, now="")
        began = time.monotonic()

        def step(done: float) -> None:
            elapsed_s = time.monotonic() - began
            rate = f"{done / elapsed_s:,.0f}/s" if elapsed_s > 0.5 else ""
            self._progress.update(task, completed=done, now=rate)

        with self._progress if not self._progress.live.is_started else contextlib.nullcontext():
            try:
                yield step
            finally:
                self._progress.remove_task(task)
