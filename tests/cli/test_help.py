"""What `--help` tells: every command like a page of a manual, on a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest

from dispatcher.cli.customer import main as customer
from dispatcher.cli.operator import main as operator

PLAIN = {"TEXT", "INTEGER", "FLOAT", "PATH", "FILE_OR_TEXT"}  # what click says when nobody said what a value is


def _walk(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        for below, each in command.commands.items():
            yield from _walk(each, f"{name} {below}")


COMMANDS = dict([*_walk(customer, "trackpost"), *_walk(operator, "dispatcher")])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does_and_more(name: str) -> None:
    summary, *rest = (COMMANDS[name].help or "").strip().split("\n\n")
    assert summary.endswith((".", "`."))
    assert rest, "a sentence is no page"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_examples_that_name_it(name: str) -> None:
    command = COMMANDS[name]
    if isinstance(command, click.Group) and command.epilog is None:
        return  # its commands do
    shown = [line.strip() for line in (command.epilog or "").splitlines()]
    assert any(name in line for line in shown), command.epilog


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_means(name: str) -> None:
    command = COMMANDS[name]
    context = click.Context(command)
    options = [each for each in command.params if isinstance(each, click.Option)]
    assert [option.name for option in options if not option.help] == []
    assert [option.name for option in options if option.make_metavar(context) in PLAIN] == []


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if isinstance(command, click.Group)])
def test_no_summary_is_cut_short(name: str) -> None:
    context = click.Context(COMMANDS[name], info_name=name, terminal_width=80)
    _usage, *lines = COMMANDS[name].get_help(context).splitlines()
    assert [line for line in lines if line.endswith("...")] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_parse(name: str) -> None:
    """An option that an example names is an option of that command."""
    command = COMMANDS[name]
    known = {flag for each in command.params for flag in (*each.opts, *each.secondary_opts)} | {"--help"}
    for line in (command.epilog or "").splitlines():
        if line.strip().startswith(f"{name} ") and not isinstance(command, click.Group):
            own = line.partition(" | ")[0].partition(" > ")[0]
            assert {word for word in own.split() if word.startswith("--")} <= known, line
