"""The configuration reference says what the code does."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from shell import Shell

from dispatcher.cli.reference import FILE, SHARE, example, meanings, reference
from dispatcher.config import KEYS, load

ROOT = Path(__file__).parents[2]
NAMES = [(section, name) for section, keys in KEYS.items() for name in keys]


def test_the_reference_in_the_repository_is_what_the_program_prints(shell: Shell) -> None:
    kept = (ROOT / "config" / "REFERENCE.md").read_text()
    assert kept == reference(), "dispatcher check-config --reference > config/REFERENCE.md"
    assert shell.run("dispatcher", "check-config", "--reference").out == kept


@pytest.mark.parametrize(("section", "name"), NAMES, ids=".".join)
def test_every_key_has_a_meaning_in_sentences(section: str, name: str) -> None:
    meaning = meanings(example())[section, name]
    assert meaning[0].isupper() or meaning.startswith(("/", '"', "false"))
    assert meaning.endswith(".")
    assert not meaning.startswith(("Reload", "Secret"))


def test_nothing_has_a_meaning_that_is_no_key() -> None:
    assert list(meanings(example())) == NAMES


def test_the_example_is_a_configuration_that_changes_nothing(shell: Shell, tmp_path: Path) -> None:
    printed = shell.run("dispatcher", "check-config", "--example").out
    assert printed == (ROOT / FILE).read_text()
    file = tmp_path / "dispatcher.toml"
    file.write_text(printed)
    assert load(file, {"HOME": "/h"}) == load(None, {"HOME": "/h"}, tmp_path / "none")


def test_the_file_is_installed_where_it_is_looked_for() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["shared-data"][str(FILE.parent)] == str(SHARE / FILE.parent)
