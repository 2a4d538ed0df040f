"""Bodies, byte for byte: against literal vectors, against both tiers, against `json`, and against a real ECMAScript."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import random
import shutil
import struct
import subprocess
import tracemalloc
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.core import rendering
from dispatcher.core.rendering import (
    BODY_BYTES_MAX,
    DEPTH_MAX,
    INTEGER_MAX,
    TEXT_BYTES_MAX,
    Payload,
    check_data,
    is_type,
    number_text,
    render,
)
from dispatcher.errors import Undeliverable
from dispatcher.model import BodyStyle

COMPACT, PYTHON = BodyStyle.COMPACT, BodyStyle.PYTHON
EVENT_ID = "evt_01h455vb4pex5vsknk084sn02q"
AT = datetime(2025, 1, 15, 10, 30, 2, 999_999, tzinfo=UTC)
HEAD = f'{{"id":"{EVENT_ID}","type":"email.delivered","version":"1.0","created_at":"2025-01-15T10:30:02Z","data":'
PYTHON_HEAD = HEAD.replace('":', '": ').replace(',"', ', "')

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="node is not on PATH: nothing to compare ECMAScript with")


def ask_node(question: str, items: list[Any]) -> list[Any]:
    assert NODE is not None
    script = Path(__file__).with_name("ecmascript.mjs")
    done = subprocess.run(
        [NODE, str(script), question], input=json.dumps(items), capture_output=True, check=True, encoding="utf-8"
    )
    answer: list[Any] = json.loads(done.stdout)
    return answer


def payload(data: str | bytes) -> Payload:
    return Payload(EVENT_ID, "email.delivered", AT, data)


def compact(data: str | bytes) -> str:
    """The data part of the compact body."""
    body = payload(data).body(COMPACT).decode()
    assert body.startswith(HEAD)
    return body[len(HEAD) : -1]


def python(data: str | bytes) -> str:
    body = payload(data).body(PYTHON).decode("ascii")
    assert body.startswith(PYTHON_HEAD)
    return body[len(PYTHON_HEAD) : -1]


def verdict(data: str | bytes) -> tuple[bytes, bytes] | str:
    """Both bodies, or why there are none."""
    try:
        both = payload(data)
        return both.body(COMPACT), both.body(PYTHON)
    except Undeliverable as refusal:
        return str(refusal)


def exact_verdict(data: str | bytes) -> tuple[bytes, bytes] | str:
    """The same by the exact tier alone."""
    with mock.patch.object(rendering, "_printed_if_plain", return_value=None):
        return verdict(data)


def only_fast_tier() -> Any:
    return mock.patch.object(rendering, "_parse_exactly", side_effect=AssertionError("went to the exact tier"))


# ---- The envelope


def test_the_envelope_has_its_five_keys_in_order() -> None:
    body = render(event_id=EVENT_ID, type="email.delivered", created_at=AT, data='{"a": 1}', style=COMPACT)
    assert body.decode() == HEAD + '{"a":1}}'


def test_the_python_envelope_is_spaced_as_json_dumps_spaces_it() -> None:
    body = render(event_id=EVENT_ID, type="email.delivered", created_at=AT, data='{"a":[1,2]}', style=PYTHON)
    assert body.decode() == PYTHON_HEAD + '{"a": [1, 2]}}'


def test_created_at_is_printed_in_utc_and_whole_seconds() -> None:
    berlin = datetime(2025, 1, 15, 0, 30, 2, 1, tzinfo=timezone(timedelta(hours=1)))
    for style in BodyStyle:
        body = json.loads(Payload(EVENT_ID, "a.b", berlin, "{}").body(style))
        assert body["created_at"] == "2025-01-14T23:30:02Z"


def test_early_years_keep_four_digits() -> None:
    body = json.loads(Payload(EVENT_ID, "a.b", datetime(1, 1, 1, tzinfo=UTC), "{}").body(COMPACT))
    assert body["created_at"] == "0001-01-01T00:00:00Z"


@pytest.mark.parametrize(
    "moment",
    [
        datetime.max,  # noqa: DTZ901 - how the driver spells `infinity`
        datetime.max.replace(tzinfo=timezone(timedelta(hours=-5))),
        datetime.min.replace(tzinfo=timezone(timedelta(hours=5))),
    ],
)
def test_a_time_that_is_none_makes_the_event_undeliverable(moment: datetime) -> None:
    with pytest.raises(Undeliverable, match="created_at is not a finite time"):
        Payload(EVENT_ID, "a.b", moment, "{}")


def test_the_version_is_the_callers() -> None:
    body = render(event_id=EVENT_ID, type="a.b", created_at=AT, data="{}", style=COMPACT, version="2.0")
    assert json.loads(body)["version"] == "2.0"


def test_each_style_is_rendered_once() -> None:
    both = payload('{"a": 5.0}')
    for style in BodyStyle:
        assert both.body(style) is both.body(style)


def test_a_payload_knows_its_event_and_type() -> None:
    both = payload("{}")
    assert (both.event_id, both.type) == (EVENT_ID, "email.delivered")


def test_repr_shows_no_data() -> None:
    assert repr(payload('{"to":"someone"}')) == f"<Payload {EVENT_ID} email.delivered, 140 bytes compact>"


@pytest.mark.parametrize("text", ["a.b", "email.delivered", "billing.eu.invoice_paid", "1.2", "_._", "a" * 126 + ".b"])
def test_types_are_lower_case_words_joined_by_dots(text: str) -> None:
    assert is_type(text)


NO_TYPES = [
    "",
    "a",
    "a.",
    ".a",
    "a..b",
    "A.b",
    "a.b\n",
    "a b.c",
    "a-b.c",
    "é.b",
    "a.٣",
    "a" * 127 + ".b",
    'a."b',
    "*.a",
]


@pytest.mark.parametrize("text", NO_TYPES)
def test_other_texts_are_no_types(text: str) -> None:
    assert not is_type(text)
    with pytest.raises(Undeliverable, match=r"^type is not"):
        Payload(EVENT_ID, text, AT, "{}")


@pytest.mark.parametrize("event_id", ["", "a" * 65, "a.b", "a b", "a\r\nX: y", "a\n", "é", 'a"b', "٣", "\x00"])
def test_an_event_id_unsafe_in_a_header_is_refused(event_id: str) -> None:
    with pytest.raises(Undeliverable, match=r"^event id is not"):
        Payload(event_id, "a.b", AT, "{}")


@pytest.mark.parametrize("event_id", ["a", "a" * 64, "evt_x", "0-0", "A_b-9"])
def test_an_event_id_of_safe_characters_is_taken_as_it_is(event_id: str) -> None:
    for style in BodyStyle:
        assert json.loads(Payload(event_id, "a.b", AT, "{}").body(style))["id"] == event_id


# ---- Both styles, by literal vectors

GOLDEN = (
    r'{"subject":"Prêt à \ud83d\uDE00 \u2028 <b>","10":1.0,"2":0.00001,"count":9007199254740991,'
    r'"zero":-0.0,"none":[],"nil":null,"control":"\u0001\t\/\u007F"}'
)
GOLDEN_COMPACT = (
    '{"2":0.00001,"10":1,"subject":"Prêt à 😀 \u2028 <b>","count":9007199254740991,'
    '"zero":0,"none":[],"nil":null,"control":"\\u0001\\t/\x7f"}'
)
GOLDEN_PYTHON = (
    r'{"subject": "Pr\u00eat \u00e0 \ud83d\ude00 \u2028 <b>", "10": 1.0, "2": 1e-05, "count": 9007199254740991, '
    r'"zero": -0.0, "none": [], "nil": null, "control": "\u0001\t/\u007f"}'
)


def test_golden_vector() -> None:
    assert compact(GOLDEN) == GOLDEN_COMPACT
    assert python(GOLDEN) == GOLDEN_PYTHON


def test_golden_signatures() -> None:
    """Noted once from node's `createHmac` over its own JSON.stringify, and from `hmac` over `json.dumps`."""
    both = payload(GOLDEN)
    signatures = [hmac.new(b"whsec_demo", both.body(style), hashlib.sha256).hexdigest() for style in (COMPACT, PYTHON)]
    assert signatures == [
        "ba8aa3efa30c53a4dfaf42f9a5b6334f94eabb22b2b8f3bdd4da9546833c4448",
        "3227232b1e75ab10dbae7cc442c88949f0d150c4b1945a8ed39b1b1ad708cb79",
    ]


KEY_ORDERS = [
    ('{"a":1,"10":2,"2":3}', '{"2":3,"10":2,"a":1}'),
    ('{"b":1,"0":2}', '{"0":2,"b":1}'),
    ('{"2":1,"10":2,"a":3}', '{"2":1,"10":2,"a":3}'),
    ('{"a":1,"4294967294":2}', '{"4294967294":2,"a":1}'),  # the largest array index
    ('{"a":1,"4294967295":2}', '{"a":1,"4294967295":2}'),
    ('{"a":1,"9007199254740991":2,"01":3,"-1":4,"1.5":5,"+1":6,"":7}',) * 2,
    ('{"a":1,"9\\n":2}', '{"a":1,"9\\n":2}'),  # a pattern that ends in `$` takes this for a 9
    ('{"a":1,"٣":2,"²":3}', '{"a":1,"٣":2,"²":3}'),  # digits to Python, not to ECMAScript
    ('{"a":1,"\\u0031":2}', '{"1":2,"a":1}'),
    ('{"x":[{"a":{"b":1,"7":2}}]}', '{"x":[{"a":{"7":2,"b":1}}]}'),
    (
        '{"__proto__":{"a":1},"constructor":2,"toJSON":3,"0":4}',
        '{"0":4,"__proto__":{"a":1},"constructor":2,"toJSON":3}',
    ),
]


@pytest.mark.parametrize(("source", "expected"), KEY_ORDERS)
def test_array_indices_come_first_in_ascending_order_and_nothing_else_moves(source: str, expected: str) -> None:
    assert compact(source) == expected
    assert python(source) == json.dumps(json.loads(source))


NUMBERS = [
    # source, ECMAScript, Python
    ("-0", "0", "0"),
    ("-0.0", "0", "-0.0"),
    ("1.0", "1", "1.0"),
    ("100.0", "100", "100.0"),
    ("1E2", "100", "100.0"),
    ("1.10", "1.1", "1.1"),
    ("-52.0", "-52", "-52.0"),
    ("0.1", "0.1", "0.1"),
    ("0.00001", "0.00001", "1e-05"),
    ("0.000001", "0.000001", "1e-06"),
    ("1e-7", "1e-7", "1e-07"),
    ("-1.5e-7", "-1.5e-7", "-1.5e-07"),
    ("1e15", "1000000000000000", "1000000000000000.0"),
    ("1e16", "10000000000000000", "1e+16"),
    ("9007199254740993.0", "9007199254740992", "9007199254740992.0"),
    ("12345678901234567890.0", "12345678901234567000", "1.2345678901234567e+19"),
    ("123456789012345678901.0", "123456789012345680000", "1.2345678901234568e+20"),
    ("1e21", "1e+21", "1e+21"),
    ("-1.5e300", "-1.5e+300", "-1.5e+300"),
    ("1.7976931348623157e308", "1.7976931348623157e+308", "1.7976931348623157e+308"),
    ("5e-324", "5e-324", "5e-324"),
    ("1e-400", "0", "0.0"),
    ("2.2250738585072014e-308", "2.2250738585072014e-308", "2.2250738585072014e-308"),
    ("9007199254740991", "9007199254740991", "9007199254740991"),
    ("-9007199254740991", "-9007199254740991", "-9007199254740991"),
    ("4503599627370495.5", "4503599627370495.5", "4503599627370495.5"),
    ("0." + "1" * 5000, "0.1111111111111111", "0.1111111111111111"),
]


@pytest.mark.parametrize(("source", "ecmascript", "python_text"), NUMBERS)
def test_numbers_are_printed_as_each_language_prints_them(source: str, ecmascript: str, python_text: str) -> None:
    assert compact(f'{{"n":[{source}]}}') == f'{{"n":[{ecmascript}]}}'
    assert python(f'{{"n":[{source}]}}') == f'{{"n": [{python_text}]}}'


def test_strings_escape_what_each_language_escapes() -> None:
    source = json.dumps({"s": "".join(map(chr, range(0x100))) + "\u2028\u2029\ufeff\uffff😀"})
    escapes = {8: "\\b", 9: "\\t", 10: "\\n", 12: "\\f", 13: "\\r", 34: '\\"', 92: "\\\\"}
    short = "".join(escapes.get(c) or (f"\\u{c:04x}" if c < 0x20 else chr(c)) for c in range(0x100))
    assert compact(source) == '{"s":"' + short + '\u2028\u2029\ufeff\uffff😀"}'
    assert python(source) == source


@pytest.mark.parametrize(
    "source", [r'{"s":"\u0022"}', r'{"s":"\"\u0022"}', r'{"\u0022":"a\u0022b"}', r'{"s":"\\u0022"}']
)
def test_quotes_however_spelled_are_kept(source: str) -> None:
    value = json.loads(source)
    assert compact(source) == json.dumps(value, separators=(",", ":"))
    assert python(source) == json.dumps(value)


def test_white_space_around_and_within_is_dropped() -> None:
    source = ' \t\r\n{ "a" \n: [ 1 ,\r2 ]\t,"b":{ } } \n'
    assert compact(source) == '{"a":[1,2],"b":{}}'
    assert python(source) == '{"a": [1, 2], "b": {}}'


def test_text_and_bytes_are_the_same_to_it() -> None:
    source = '{"name":"Zoë 😀","n":1.0}'
    assert verdict(source) == verdict(source.encode())


# ---- What is refused

REFUSED = [
    ("[]", "data is not a JSON object"),
    ('"text"', "data is not a JSON object"),
    ("1", "data is not a JSON object"),
    ("null", "data is not a JSON object"),
    ("", "data is not valid JSON"),
    (" ", "data is not valid JSON"),
    ("{", "data is not valid JSON"),
    ('{"a":1,}', "data is not valid JSON"),
    ("{'a':1}", "data is not valid JSON"),
    ('{"a":1}x', "data is not valid JSON"),
    ('{"a":1}\x00', "data is not valid JSON"),
    ('{"a":01}', "data is not valid JSON"),
    ('{"a":.5}', "data is not valid JSON"),
    ('{"a":1.}', "data is not valid JSON"),
    ('{"a":+1}', "data is not valid JSON"),
    ('{"a":٣}', "data is not valid JSON"),
    ('{"a":-NaN}', "data is not valid JSON"),
    ('{"a":"\n"}', "data is not valid JSON"),
    ('{"a":"\\x"}', "data is not valid JSON"),
    ('{"a":"\\u00g0"}', "data is not valid JSON"),
    ('{"a":/**/1}', "data is not valid JSON"),
    ('\ufeff{"a":1}', "data is not valid JSON"),
    ('{"a":1}\x0c', "data is not valid JSON"),
    ('\xa0{"a":1}', "data is not valid JSON"),
    (b'{"a":"\xff"}', "data is not valid UTF-8"),
    (b'{"a":"\xed\xa0\x80"}', "data is not valid UTF-8"),
    ('{"a":1}'.encode("utf-16"), "data is not valid UTF-8"),
    ('{"a":1}'.encode("utf-16-le"), "data is not valid JSON"),
    ('{"a":NaN}', "data holds NaN or Infinity"),
    ('{"a":[Infinity]}', "data holds NaN or Infinity"),
    ('{"a":-Infinity}', "data holds NaN or Infinity"),
    ('{"a":1e400}', "data holds a number too large for a double"),
    ('{"a":-1e400}', "data holds a number too large for a double"),
    ('{"a":1' + "0" * 400 + ".0}", "data holds a number too large for a double"),
    ('{"a":9007199254740992}', "data holds an integer beyond ±(2^53 − 1)"),
    ('{"a":-9007199254740992}', "data holds an integer beyond ±(2^53 − 1)"),
    ('{"a":[12345678901234567890]}', "data holds an integer beyond ±(2^53 − 1)"),
    ('{"a":18446744073709551616}', "data holds an integer beyond ±(2^53 − 1)"),
    ('{"a":-9223372036854775809}', "data holds an integer beyond ±(2^53 − 1)"),
    ('{"a":' + "9" * 5000 + "}", "data holds an integer beyond ±(2^53 − 1)"),
    ('{"a":1,"a":1}', "data repeats a key within one object"),
    ('{"a":1,"\\u0061":2}', "data repeats a key within one object"),
    ('{"x":[{"a":{"b":1,"b":2}}]}', "data repeats a key within one object"),
    ('{"a":"\\u0022","a":1}', "data repeats a key within one object"),  # the escape makes up for the dropped quotes
    ('{"a":1,"a":"","b":"\\u0022\\u0022"}', "data repeats a key within one object"),
    ('{"__proto__":1,"__proto__":2}', "data repeats a key within one object"),
    ('{"":1,"":2}', "data repeats a key within one object"),
    ('{"a":"\\ud800"}', "data holds a lone surrogate"),
    ('{"a":"\\udc00\\ud800"}', "data holds a lone surrogate"),
    ('{"a":["\\ud83d x \\ude00"]}', "data holds a lone surrogate"),
    ('{"\\udfff":1}', "data holds a lone surrogate"),
    ('{"0":1,"x":{"\\udfff":1}}', "data holds a lone surrogate"),
    ('{"a":"\ud800"}', "data holds a lone surrogate"),
]


@pytest.mark.parametrize(("source", "reason"), REFUSED)
def test_data_that_the_styles_cannot_carry_is_refused_with_a_reason(source: str | bytes, reason: str) -> None:
    assert verdict(source) == reason
    assert exact_verdict(source) == reason


@pytest.mark.parametrize(("opening", "closing"), [('{"a":', "}"), ('{"a":[', "]}")])
def test_depth_counts_objects_and_lists_from_the_data_itself(opening: str, closing: str) -> None:
    levels = opening.count("{") + opening.count("[")
    allowed = DEPTH_MAX // levels
    for count, core in ((allowed - 1, "{}"), (allowed, "1")):
        source = opening * count + core + closing * count
        assert verdict(source) == exact_verdict(source) != f"data is nested deeper than {DEPTH_MAX} levels"
    for count, core in ((allowed, "{}"), (allowed, "[]"), (100, "1"), (600, "1"), (100_000, "1")):
        source = opening * count + core + closing * count
        assert verdict(source) == exact_verdict(source) == f"data is nested deeper than {DEPTH_MAX} levels"


def test_brackets_within_strings_are_no_depth() -> None:
    assert compact(json.dumps({"a": "[{" * 200})) == json.dumps({"a": "[{" * 200}, separators=(",", ":"))


@pytest.mark.parametrize("style", list(BodyStyle))
def test_a_body_of_256_kib_passes_and_one_byte_more_does_not(style: BodyStyle) -> None:
    room = BODY_BYTES_MAX - len(payload('{"a":""}').body(style))
    assert len(payload(json.dumps({"a": "x" * room})).body(style)) == BODY_BYTES_MAX == 262_144
    with pytest.raises(Undeliverable, match=r"^body is over 262144 bytes$"):
        payload(json.dumps({"a": "x" * (room + 1)})).body(style)


def test_a_compact_body_over_the_bound_discards_the_event_at_once() -> None:
    with pytest.raises(Undeliverable, match=r"^body is over 262144 bytes$"):
        payload(json.dumps({"a": "x" * BODY_BYTES_MAX}))


def test_a_python_body_over_the_bound_concerns_that_style_alone() -> None:
    chinese = payload(json.dumps({"a": "邮" * 80_000}))
    for _ in range(2):
        with pytest.raises(Undeliverable, match=r"^body is over 262144 bytes$"):
            chinese.body(PYTHON)
    assert len(chinese.body(COMPACT)) < BODY_BYTES_MAX


def test_white_space_does_not_count_towards_the_body_but_has_an_end() -> None:
    padded = '{"a":1}'.ljust(TEXT_BYTES_MAX)
    assert compact(padded) == '{"a":1}'
    assert verdict(padded + " ") == "data is over 2097152 bytes as written"


def test_the_most_wasteful_spelling_of_the_largest_body_is_accepted() -> None:
    room = BODY_BYTES_MAX - len(payload('{"a":""}').body(COMPACT))
    source = '{"a":"' + "\\u0041" * room + '"}'
    assert len(payload(source).body(COMPACT)) == BODY_BYTES_MAX


def test_reasons_repeat_nothing_of_the_data() -> None:
    for source in (
        '{"secret":1,"secret":2}',
        '{"a":"secret" oops}',
        '{"a":123456789012345678}',
        '{"secret":"\\ud800"}',
    ):
        reason = verdict(source)
        assert isinstance(reason, str)
        assert "secret" not in reason
        assert "123456" not in reason


def test_the_door_refuses_what_would_be_discarded() -> None:
    check_data("email.delivered", '{"a": 5.0}')
    with pytest.raises(Undeliverable, match="repeats a key"):
        check_data("email.delivered", b'{"a":1,"a":2}')
    with pytest.raises(Undeliverable, match=r"^type is not"):
        check_data("Email", "{}")
    with pytest.raises(Undeliverable, match="body is over"):
        check_data("email.delivered", json.dumps({"a": "x" * BODY_BYTES_MAX}))


def test_the_door_and_the_body_agree_on_the_last_byte() -> None:
    room = BODY_BYTES_MAX - len(payload('{"a":""}').body(COMPACT))
    check_data("email.delivered", json.dumps({"a": "x" * room}))
    with pytest.raises(Undeliverable, match="body is over"):
        check_data("email.delivered", json.dumps({"a": "x" * (room + 1)}))


# ---- The tiers

ORDINARY = [
    '{"email_id":"msg_def456","to":"someone@example.com","smtp_response":"250 2.0.0 OK","size":48213,"tls":true}',
    '{"location": {"country": "US", "city": "New York"}, "tags": ["a", "b"], "none": null, "list": [], "map": {}}',
    '{"name":"Zo\\u00eb \\ud83d\\ude00","raw":"Zoë","quoted":"say \\"hi\\"","path":"C:\\\\users"}',
    '{"amount":19.99,"latitude":-52.516275,"list":[0.5,{"x":1.25}],"big":9007199254740991}',
]


@pytest.mark.parametrize("source", ORDINARY)
def test_ordinary_events_stay_on_the_fast_tier_and_come_out_the_same(source: str) -> None:
    with only_fast_tier():
        fast = verdict(source)
    assert fast == exact_verdict(source)


# Realistic payloads that a plain serialiser gets wrong for one language or the other.
TRAPS = [
    '{"latitude": 52.0, "longitude": 13.404954}',
    '{"spam_score": 5.0}',
    '{"opened_at": 1736937002.0}',
    '{"cost": 0.00001}',
    '{"opens": {"total": 3, "2024": 1, "2023": 2}}',
    '{"links": {"https://example.com": 1, "1": "b", "0": "a"}}',
    '{"subject": "Grüße <b>\\u2028</b> \\/ \\u00E9"}',
    '{"raw": "\\u0000\\u001F\\u007f"}',
]

JSON_KEYS = st.one_of(
    st.text(max_size=4),
    st.sampled_from(
        ["0", "1", "10", "2", "01", "4294967294", "4294967295", "9\n", "٣", "__proto__", '"', "\\", "a", "b"]
    ),
)
JSON_VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.integers(-INTEGER_MAX, INTEGER_MAX),
        st.floats(),
        st.integers(-(10**6), 10**6).map(float),
        st.text(max_size=6),
        st.sampled_from(["\ud800", "\udc00x", '"', "u0022", "\x00", "\x7f", "\u2028", "😀"]),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(JSON_KEYS, inner, max_size=4),
    max_leaves=12,
)
JSON_OBJECTS = st.dictionaries(JSON_KEYS, JSON_VALUES, max_size=5)


@given(JSON_OBJECTS, st.booleans())
def test_both_tiers_agree_on_every_value(value: dict[str, Any], escaped: bool) -> None:
    source = json.dumps(value, ensure_ascii=escaped)
    assert verdict(source) == exact_verdict(source)


EDITS = st.lists(
    st.tuples(
        st.integers(0, 10**6),
        st.integers(0, 2),
        st.sampled_from(
            [b'"', b"\\", b"u0022", b"{", b"}", b"[", b"]", b",", b":", b" ", b"0", b"-", b"e", b".", b"\xff"]
        )
        | st.binary(max_size=3),
    ),
    max_size=3,
)


@given(JSON_OBJECTS, EDITS)
def test_both_tiers_agree_on_damaged_texts(value: dict[str, Any], edits: list[tuple[int, int, bytes]]) -> None:
    source = json.dumps(value).encode()
    for position, removed, inserted in edits:
        at = position % (len(source) + 1)
        source = source[:at] + inserted + source[at + removed :]
    assert verdict(source) == exact_verdict(source)


MEMBERS = st.lists(
    st.tuples(
        st.sampled_from(['"a"', '"b"', '"\\u0061"', '"\\u0022"', '"\\""', '"c"']),
        st.sampled_from(["1", '""', '"x"', '"\\u0022"', '"\\u0022\\u0022"', '"\\"\\""', "[]", '{"a":1,"a":2}']),
    ),
    max_size=5,
)


@given(MEMBERS)
def test_no_spelling_of_quotes_hides_a_repeated_key(members: list[tuple[str, str]]) -> None:
    source = "{" + ",".join(f"{key}:{value}" for key, value in members) + "}"
    keys = [json.loads(key) for key, _ in members]
    repeats = len(set(keys)) != len(keys) or any(value.startswith("{") for _, value in members)
    assert (verdict(source) == "data repeats a key within one object") == repeats


@given(JSON_OBJECTS)
def test_the_python_body_is_what_json_dumps_makes_of_it(value: dict[str, Any]) -> None:
    source = json.dumps(value)
    both = verdict(source)
    if isinstance(both, tuple):
        body = both[1].decode()
        assert json.dumps(json.loads(body)) == body
        assert json.dumps(json.loads(body)["data"]) == source


# ---- Against a real ECMAScript


def spelled_text(rng: random.Random) -> str:
    """A JSON string, spelled at whim."""
    alphabet = ["a", "Z", "0", " ", "é", "😀", "\u2028", "\x7f", "<", '\\"', "\\\\", "\\/", "\\n", "\\u000a", "\\u0000"]
    alphabet += [
        "\\u0022",
        "\\u00E9",
        "\\u001f",
        "\\ud83d\\ude00",
        "\\uD83D\\uDE00",
        "\ufeff",
        "\\b",
        "\\u2029",
        "e1.0",
    ]
    return '"' + "".join(rng.choices(alphabet, k=rng.randrange(5))) + '"'


def spelled_key(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return spelled_text(rng)
    index = rng.choice([rng.randrange(12), rng.randrange(2**33), 2**32 - 2, 2**32 - 1, 2**32, 2**53, 0])
    return rng.choice(
        [f'"{index}"', f'"0{index}"', f'"-{index}"', f'"{index}\\n"', f'"\\u003{index % 10}"', '"__proto__"']
    )


def spelled_number(rng: random.Random) -> str:
    match rng.randrange(6):
        case 0:
            return repr(random_double(rng))
        case 1:
            return str(rng.randint(-INTEGER_MAX, INTEGER_MAX))
        case 2:
            return f"{rng.randrange(10**6)}.{rng.choice(['0', '50', '25'])}"
        case 3:
            return f"{rng.randint(-999, 999)}{rng.choice('eE')}{rng.choice(['', '+', '-'])}{rng.randrange(300)}"
        case 4:
            return rng.choice(["-0", "-0.0", "1e21", "1e-7", "5e-324", "1.7976931348623157e308", "1e-400", "0e5"])
        case _:
            return repr(rng.uniform(-1000, 1000))


def random_double(rng: random.Random) -> float:
    while not math.isfinite(double := struct.unpack(">d", rng.randbytes(8))[0]):
        pass
    return float(double)


def spelled_value(rng: random.Random, depth: int) -> str:
    space = rng.choice(["", "", " ", "\n\t"])
    match rng.randrange(7 if depth else 5):
        case 0:
            return space + rng.choice(["true", "false", "null"])
        case 1 | 2:
            return space + spelled_text(rng)
        case 3 | 4:
            return space + spelled_number(rng)
        case 5:
            return f"[{space}{','.join(spelled_value(rng, depth - 1) for _ in range(rng.randrange(4)))}]"
        case _:
            return spelled_object(rng, depth - 1)


def spelled_object(rng: random.Random, depth: int) -> str:
    members: dict[str, str] = {}
    for _ in range(rng.randrange(6)):
        key = spelled_key(rng)
        members.setdefault(json.loads(key), f"{key}{rng.choice(['', ' '])}:{spelled_value(rng, depth)}")
    return "{" + ",".join(members.values()) + rng.choice(["", " "]) + "}"


def accepted(seed: int) -> Iterator[tuple[str, Payload]]:
    rng = random.Random(seed)
    for source in [GOLDEN, *ORDINARY, *TRAPS, *(source for source, _ in KEY_ORDERS)]:
        yield source, payload(source)
    for source, _, _ in NUMBERS:
        yield f'{{"n":{source}}}', payload(f'{{"n":{source}}}')
    for _ in range(4000):
        source = spelled_object(rng, 3)
        yield source, payload(source)


@needs_node
def test_compact_bodies_are_fixed_points_of_json_stringify() -> None:
    seed = random.SystemRandom().randrange(2**32)
    pairs = [(source, both.body(COMPACT).decode()) for source, both in accepted(seed)]
    wrong = ask_node("bodies", pairs)
    assert [pairs[index] for index in wrong[:3]] == [], f"seed {seed}, {len(wrong)} of {len(pairs)}"


def test_python_bodies_are_fixed_points_of_json_dumps() -> None:
    seed = random.SystemRandom().randrange(2**32)
    for source, both in accepted(seed):
        body = both.body(PYTHON).decode()
        assert json.dumps(json.loads(body)) == body, f"seed {seed}"
        assert json.dumps(json.loads(body)["data"]) == json.dumps(json.loads(source)), f"seed {seed}"


def doubles(seed: int) -> list[float]:
    """Random bit patterns, powers of ten and two with their neighbours, and what falls between the layouts."""
    rng = random.Random(seed)
    numbers = [random_double(rng) for _ in range(30_000)]
    numbers += [rng.uniform(-1, 1) * 10.0 ** rng.randint(-9, 23) for _ in range(20_000)]
    numbers += [float(rng.randint(-(10**22), 10**22)) for _ in range(5_000)]
    edges = [10.0**exponent for exponent in range(-323, 309)] + [2.0**exponent for exponent in range(-1074, 1024)]
    for edge in edges:
        numbers += [edge, math.nextafter(edge, 0), math.nextafter(edge, math.inf)]
    return [*numbers, 0.0, -0.0, 5e-324, 1.7976931348623157e308]


@needs_node
def test_numbers_are_what_ecmascript_prints() -> None:
    seed = random.SystemRandom().randrange(2**32)
    numbers = doubles(seed)
    assert len(numbers) > 50_000
    printed = ask_node("numbers", [struct.pack(">d", number).hex() for number in numbers])
    wrong = [(number, text) for number, text in zip(numbers, printed, strict=True) if number_text(number) != text]
    assert wrong[:3] == [], f"seed {seed}, {len(wrong)} of {len(numbers)}"


def test_the_fast_tier_prints_doubles_as_the_exact_one() -> None:
    seed = random.SystemRandom().randrange(2**32)
    for number in random.Random(seed).sample(doubles(seed), 5_000):
        source = f'{{"n":{number!r}}}'
        assert verdict(source) == exact_verdict(source), f"seed {seed}"


def test_waiting_event_takes_little_more_room_than_its_body() -> None:
    data = json.dumps({"text": "x" * 400, "numbers": list(range(500))})
    tracemalloc.start()
    try:
        waiting = [Payload(EVENT_ID, "email.delivered", AT, data) for _ in range(20)]
        taken = tracemalloc.get_traced_memory()[0] / len(waiting)
    finally:
        tracemalloc.stop()
    assert taken < len(waiting[0].compact) + 500


# ---- Keys met before


def test_a_key_that_was_met_is_still_no_index_and_an_index_is_never_remembered() -> None:
    for data in (
        '{"met": 1}',
        '{"met": 1, "7": 2}',
        '{"met": 1, "7": 2}',
        '{"7": 2, "met": {"3": 1, "met": 0, "2": 0}}',
    ):
        assert verdict(data) == exact_verdict(data)
    assert "7" not in rendering._plain_keys


def test_keys_of_every_event_their_own_are_not_kept_for_ever() -> None:
    for number in range(rendering._PLAIN_KEYS_MAX + 10):
        payload(f'{{"k{number}": 1, "{"x" * rendering._PLAIN_KEY_CHARS_MAX}y": 2}}')
    assert len(rendering._plain_keys) <= rendering._PLAIN_KEYS_MAX
    assert all(len(key) <= rendering._PLAIN_KEY_CHARS_MAX for key in rendering._plain_keys)
