"""SECURITY.md: no sentence of its promises without a test, and no test that is not there."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import Final

import pytest

from dispatcher.config import Config
from dispatcher.engine.engine import BUFFERED_MAX
from dispatcher.web.door import CONNECTIONS_MAX

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "SECURITY.md").read_text()
WITHOUT_PROMISES: Final = {"Reporting a problem"}

_SENTENCE_ENDS: Final = re.compile(r"[.!?](?=\s+[A-Z*`])")
_PROOF: Final = re.compile(r"`([\w/]+\.py)::(test_\w+)`")


def sections() -> dict[str, str]:
    _, *parts = re.split(r"(?m)^## (.+)\n", PAGE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def promises() -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Each entry of the promises: its section, its words, and the tests below them."""
    found = []
    for title, text in sections().items():
        if title not in WITHOUT_PROMISES:
            before, *entries = re.split(r"(?m)^- ", text)
            assert before.strip() == "", f"{title}: a sentence outside the list"
            for entry in entries:
                lines = [line.strip() for line in entry.strip().splitlines()]
                assert all(lines), f"{title}: a sentence outside the list"
                words = " ".join(line for line in lines if not _PROOF.fullmatch(line))
                found.append(
                    (title, words, [tuple(proof.groups()) for line in lines if (proof := _PROOF.fullmatch(line))])
                )
    return found  # type: ignore[return-value]


@functools.cache
def defined_in(file: str) -> frozenset[str]:
    path = ROOT / file
    if not path.exists():
        return frozenset()
    return frozenset(
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


PROMISES = promises()


@pytest.mark.parametrize(("title", "words", "proofs"), PROMISES, ids=[words[:60] for _, words, _ in PROMISES])
def test_each_sentence_is_one_and_has_its_tests(title: str, words: str, proofs: list[tuple[str, str]]) -> None:
    assert words.endswith("."), f"{title}: not a sentence: {words}"
    assert not _SENTENCE_ENDS.search(words), f"{title}: more than one sentence above its tests: {words}"
    assert proofs, f"{title}: no test: {words}"
    for file, name in proofs:
        assert name in defined_in(file), f"there is no {file}::{name}"


def test_the_page_says_what_it_has_to() -> None:
    assert len(PROMISES) >= 40
    assert len(sections()) == 9
    assert sections()["Reporting a problem"].strip()


def test_the_bound_on_repeats_is_reckoned_with_the_numbers_in_force() -> None:
    assert f"2 × ({BUFFERED_MAX:,} + `max_in_flight`)" in PAGE


def test_listeners_are_on_this_host_alone_by_default() -> None:
    config = Config()
    assert config.server.address[0] == "127.0.0.1"
    assert config.metrics.address is not None
    assert config.metrics.address[0] == "127.0.0.1"


def test_the_connections_of_a_listener_are_counted_as_the_page_says() -> None:
    assert f"{CONNECTIONS_MAX:,} connections" in PAGE
