"""What is shown of a body is what was there: every character of it, and nothing that hides."""

from __future__ import annotations

import html
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.web.dashboard.payloads import HEX_BYTES_MAX, exhibit, hexadecimal, indented, visible

documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(st.lists(documents) | st.dictionaries(st.text(), documents), st.sampled_from([None, 1]))
def test_indenting_changes_blanks_between_tokens_only(document, indent):
    text = json.dumps(document, indent=indent)
    assert indented(text) == json.dumps(document, indent=2)


def test_numbers_and_repeated_keys_stay_as_they_were_written():
    assert indented('{"a":1.0,"a":1E5,"b":-0,"c":[],"d":{}}') == (
        '{\n  "a": 1.0,\n  "a": 1E5,\n  "b": -0,\n  "c": [],\n  "d": {}\n}'
    )


@pytest.mark.parametrize("text", ["", "ok", "1", '"text"', "{", "{}}", "[" * 101 + "]" * 101, "[" * 100_000, "<html>"])
def test_what_is_no_document_is_not_indented(text):
    assert indented(text) is None


def test_a_body_that_is_indented_already_is_shown_once():
    assert exhibit(b'{\n  "a": 1\n}').pretty is None
    assert exhibit(b'{"a":1}').pretty == "{\n  &#34;a&#34;: 1\n}"


@given(st.text())
def test_every_character_is_there_once_and_nothing_is_markup(text):
    parts = re.split(r'<span class="escaped">([^<]*)</span>', visible(text))
    assert not any("<" in part for part in parts)
    plain, spelt = map(html.unescape, parts[::2]), [part.encode().decode("unicode_escape") for part in parts[1::2]]
    assert "".join(a + b for a, b in zip(plain, [*spelt, ""], strict=True)) == text


@pytest.mark.parametrize(
    ("character", "name"),
    [
        ("\x1b", r"\x1b"),
        ("\r", r"\x0d"),
        ("\u202e", r"\u202e"),
        ("\u2028", r"\u2028"),
        ("\x85", r"\x85"),
        ("\ufeff", r"\ufeff"),
    ],
)
def test_what_hides_is_spelt_out(character, name):
    assert visible(f"a{character}b") == f'a<span class="escaped">{name}</span>b'


@pytest.mark.parametrize(
    "text", ["äöü 电子邮件 مرحبا\n\t", "\U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301", "€ … – ½"]
)
def test_what_can_be_seen_stays(text):
    assert visible(text) == text


@pytest.mark.parametrize("body", [b"\xff\xfe", b"a\x00b", b"\xc3", b"\x1f\x8b\x08binary"])
def test_what_is_no_text_is_shown_in_hexadecimal(body):
    shown = exhibit(body)
    assert (shown.text, shown.pretty) == (None, None)
    assert shown.hex is not None
    assert bytes.fromhex(shown.hex[8:56].replace(" ", "")) == body


def test_a_letter_cut_in_half_does_not_make_it_binary():
    assert exhibit("grün".encode()[:-2], is_cut=True).text == "gr"
    assert exhibit("grün".encode()[:-2]).text is None


@given(st.binary(max_size=100))
def test_hexadecimal_is_what_hexdump_prints(data):
    rows = hexadecimal(data).splitlines()
    assert b"".join(bytes.fromhex(row[8:56]) for row in rows) == data
    assert [int(row[:6], 16) for row in rows] == list(range(0, len(data), 16))


def test_a_long_body_is_shown_in_part_and_says_so():
    assert hexadecimal(bytes(HEX_BYTES_MAX + 1234)).endswith("… 1,234 more bytes")
