"""The runbook: a section for each alert, and nothing in it that does not exist."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import click
import pytest
from prometheus_client.parser import text_string_to_metric_families
from promql import ALERTS, CONFIG, RUNBOOK, rules

from dispatcher.cli import customer, operator
from dispatcher.store.database import statements

TEXT = RUNBOOK.read_text()
SECTIONS = dict(re.findall(r"(?ms)^### (\w+)\n(.*?)(?=^##|\Z)", TEXT))
PROGRAMS: dict[str, click.Group] = {"dispatcher": operator.main, "trackpost": customer.main}
CODE = re.findall(r"`([^`\n]+)`", TEXT) + re.findall(r"(?s)```sh\n(.*?)```", TEXT)[0].splitlines()


def test_every_alert_has_a_section_and_every_section_an_alert() -> None:
    assert list(SECTIONS) == [rule["alert"] for rule in rules(ALERTS)]


@pytest.mark.parametrize("alert", SECTIONS)
def test_a_section_says_what_it_means_how_to_confirm_and_what_to_do(alert: str) -> None:
    assert re.findall(r"(?m)^\*\*(.+?)\*\*", SECTIONS[alert]) == ["Means.", "Confirm.", "Do."]


def test_sections_that_are_referred_to_exist() -> None:
    assert set(re.findall(r"\bDispatcher[A-Z]\w+", TEXT)) <= set(SECTIONS)


def commands() -> list[list[str]]:
    words = [re.split(r"[|#]", code)[0].split() for code in CODE]
    return [each for each in words if each and each[0] in PROGRAMS]


def test_there_are_commands() -> None:
    assert {"status", "doctor", "prune"} <= {each[1] for each in commands()}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_exists(words: list[str]) -> None:
    command: Any = PROGRAMS[words[0]]
    for word in words[1:]:
        if word.startswith("-"):
            assert any(word in option.opts for option in command.params), word
        elif isinstance(command, click.Group):
            assert word in command.commands, word
            command = command.commands[word]


def test_options_named_apart_from_their_command_exist() -> None:
    options = {option for root in PROGRAMS.values() for command in walk(root) for option in option_names(command)}
    for code in CODE:
        if code.startswith("--"):
            assert {word for word in code.split() if word.startswith("--")} <= options


def walk(command: click.Command) -> list[click.Command]:
    below = command.commands.values() if isinstance(command, click.Group) else ()
    return [command, *(each for one in below for each in walk(one))]


def option_names(command: click.Command) -> list[str]:
    return [name for option in command.params for name in option.opts]


def test_every_metric_exists(exposition: str) -> None:
    said = {sample.name for f in text_string_to_metric_families(exposition) for sample in f.samples}
    said |= {re.sub(r"_(bucket|sum|count)$", "", name) for name in said}
    named = set(re.findall(r"\b(?:dispatcher|process)_\w+", TEXT)) - {"dispatcher_producer"}
    assert named <= said


def test_every_setting_exists() -> None:
    shown = re.sub(r"(?m)^#(?=\w+ = )", "", (CONFIG / "dispatcher.toml").read_text())
    known = tomllib.loads(shown)
    for section, key in re.findall(r"`\[(\w+)\] (\w+)(?: = [^`]+)?`", TEXT):
        assert key in known[section], f"[{section}] {key}"


async def test_every_statement_runs(exposition: str, database: str) -> None:
    import asyncpg

    connection = await asyncpg.connect(database)
    selects = [code for code in CODE if code.startswith("SELECT")]
    assert selects
    for statement in selects:
        await connection.fetch(statement)
    await connection.close()


def test_the_lock_it_looks_for_is_ours() -> None:
    (number,) = re.findall(r"classid = (\d+)", TEXT)
    assert number in statements("shard")["try_lease"]
