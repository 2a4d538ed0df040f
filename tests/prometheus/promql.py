"""Which series a PromQL expression asks for, read off its text: enough for the expressions that are shipped."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

CONFIG = Path(__file__).parents[2] / "config"
RULES = CONFIG / "prometheus" / "rules.yml"
ALERTS = CONFIG / "prometheus" / "alerts.yml"
RUNBOOK = CONFIG / "prometheus" / "RUNBOOK.md"
DASHBOARD = CONFIG / "grafana" / "dispatcher.json"

_LABEL_LIST = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\s*(\{[^}]*\})?(?=\s*([(\w]?))")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
_WORDS = {"and", "or", "unless", "bool", "offset"}
OF_SCRAPING = {"job", "instance"}  # labels that Prometheus adds


@dataclasses.dataclass(frozen=True)
class Selector:
    """A metric's name, and what its labels must be."""

    name: str
    matchers: tuple[tuple[str, str, str], ...]

    def matches(self, name: str, labels: Mapping[str, str]) -> bool:
        return name == self.name and all(
            _fits(labels.get(label, ""), operator, value)
            for label, operator, value in self.matchers
            if label not in OF_SCRAPING
        )


def _fits(found: str, operator: str, value: str) -> bool:
    is_equal = re.fullmatch(value, found) is not None if "~" in operator else found == value
    return is_equal != operator.startswith("!")


def selectors(expression: str) -> Iterator[Selector]:
    """Every series selector of an expression."""
    text = re.sub(r"\[[^\]]*\]", "", _LABEL_LIST.sub("", expression))
    for name, braces, follows in _SELECTOR.findall(text):
        if not braces and (follows == "(" or name in _WORDS or re.match(r"\d", name)):
            continue
        if braces or re.match(r"dispatcher_|process_|job|up$", name):
            yield Selector(name, tuple(_MATCHER.findall(braces)))


def rules(path: Path) -> list[dict[str, Any]]:
    """The rules of a file, over all groups."""
    return [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]
