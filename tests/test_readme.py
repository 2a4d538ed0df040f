"""The README's command lines are command lines of these programs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from dispatcher.cli.customer import main as customer
from dispatcher.cli.operator import main as operator

README = Path(__file__).parents[1] / "README.md"
PROGRAMS: dict[str, click.Group] = {"trackpost": customer, "dispatcher": operator}


def _lines() -> list[str]:
    text = README.read_text("utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    quoted = re.findall(r"`((?:trackpost|dispatcher) [a-z][^`]*)`", text)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return list(dict.fromkeys(line for line in [*lines, *quoted] if line.startswith(tuple(f"{p} " for p in PROGRAMS))))


@pytest.mark.parametrize("line", _lines())
def test_a_command_line_of_the_readme_is_one(line: str) -> None:
    program, *words = shlex.split(line.replace("…", "x"), comments=True)
    command: click.Command = PROGRAMS[program]
    while isinstance(command, click.Group) and words and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    assert not isinstance(command, click.Group), words
    flags = {flag for each in command.params for flag in (*each.opts, *each.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= flags


def test_there_is_something_to_check() -> None:
    assert len(_lines()) > 25
