"""Fuzzers of what strangers write to us: events, URLs, addresses, request bodies. Responses: test_responses.

Each has another opinion to agree with: a real ECMAScript, the standard library, the system's own `inet_aton`. How long
they look is HYPOTHESIS_PROFILE's to say; `long` is for a night.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from notations import REFUSED_HOSTS

from dispatcher.core import addresses
from dispatcher.core.addresses import Guard, Target
from dispatcher.core.backoff import RETRY_AFTER_S_MAX, retry_after_s
from dispatcher.core.rendering import Payload, check_data
from dispatcher.errors import AddressRefused, Undeliverable
from dispatcher.model import BodyStyle
from dispatcher.web import events, replays, trials, webhooks
from dispatcher.web.bodies import parse_body
from dispatcher.web.problems import Problem

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="node is not on PATH: nothing to compare ECMAScript with")
# The oracle is a process that is asked again and again; nothing of an example stays in it.
with_oracle = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
AT = datetime(2025, 1, 15, 10, 30, 2, tzinfo=UTC)

Oracle = Callable[[str, str], Any]


@pytest.fixture(scope="module")
def oracle() -> Iterator[Oracle]:
    assert NODE is not None
    script = str(Path(__file__).with_name("oracle.mjs"))
    with subprocess.Popen([NODE, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8") as node:

        def ask(question: str, text: str) -> Any:
            assert node.stdin is not None
            assert node.stdout is not None
            node.stdin.write(json.dumps([question, text]) + "\n")
            node.stdin.flush()
            return json.loads(node.stdout.readline())

        yield ask


# ── rendering ────────────────────────────────────────────────────────────────────────────────────────────────────────

blanks = st.sampled_from(["", "", "", " ", "\n", "\t \r\n"])
digits = st.text("0123456789", min_size=1, max_size=25)
numbers = st.one_of(
    st.builds("{}{}{}{}".format, st.sampled_from(["", "-"]), st.sampled_from(["0", "1", "12345678901234567", "9"]),
              st.one_of(st.just(""), digits.map(".{}".format)),
              st.one_of(st.just(""), st.builds("{}{}{}".format, st.sampled_from("eE"), st.sampled_from(["", "+", "-"]),
                                               st.integers(0, 330).map(str)))),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.integers(-(2**60), 2**60).map(str),
)  # fmt: skip
pieces = st.one_of(
    st.text(st.characters(blacklist_characters='"\\', blacklist_categories=["Cs", "Cc"]), max_size=8),
    st.sampled_from(['\\"', "\\\\", "\\/", "\\b\\f\\n\\r\\t", "\\u0000", "\\u001F", "\\u007f", "\\u2028", "\u2028",
                     "\\ud83d\\ude00", "😀", "\\ud800", "\\udc00x", "__proto__", "\ufeff", "\\u0022"]),
)  # fmt: skip
strings = st.lists(pieces, max_size=4).map(lambda found: '"' + "".join(found) + '"')
keys = strings | st.sampled_from(['"0"', '"10"', '"2"', '"-1"', '"01"', '"4294967294"', '"4294967295"', '"\\u0031"'])
texts = st.recursive(
    st.one_of(numbers, strings, st.sampled_from(["true", "false", "null", "[]", "{}"])),
    lambda inner: st.one_of(
        st.lists(st.builds("{}{}{}".format, blanks, inner, blanks), max_size=4).map(lambda e: f"[{','.join(e)}]"),
        st.lists(st.builds("{1}{0}{1}:{1}{2}{1}".format, keys, blanks, inner), max_size=5).map(
            lambda e: f"{{{','.join(e)}}}"
        ),
    ),
    max_leaves=12,
)
objects = st.builds('{{"":{},"k":{}}}'.format, texts, texts) | texts.filter(lambda text: text.startswith("{"))


def rendered(data: str) -> dict[BodyStyle, str]:
    """The bodies an event with this data has; none at all if it is one to discard."""
    try:
        payload = Payload("evt_1", "a.b", AT, data)
        return {style: payload.body(style).decode() for style in BodyStyle}
    except Undeliverable:
        return {}


@needs_node
@with_oracle
@given(data=objects)
@example(data='{"a":1.0,"10":1e21,"2":1e-7,"b":-0,"c":5e-324}')
def test_a_body_is_a_fixed_point_of_both_languages_and_says_what_was_written(oracle: Oracle, data: str) -> None:
    bodies = rendered(data)
    if not bodies:
        return
    compact, python = bodies[BodyStyle.COMPACT], bodies[BodyStyle.PYTHON]
    assert oracle("render", compact) == compact
    assert compact.endswith(f'"data":{oracle("render", data)}}}')
    assert json.dumps(json.loads(python)) == python
    assert json.loads(python)["data"] == json.loads(data)


@given(data=objects | st.text(max_size=60) | texts)
def test_the_door_and_the_engine_agree_on_what_can_be_sent(data: str) -> None:
    is_taken = True
    try:
        check_data("a.b", data)
    except Undeliverable:
        is_taken = False
    assert bool(rendered(data)) == is_taken


@given(data=st.binary(max_size=80))
def test_bytes_that_are_no_event_are_a_reason_and_never_a_fault(data: bytes) -> None:
    with contextlib.suppress(Undeliverable):
        Payload("evt_1", "a.b", AT, data).body(BodyStyle.COMPACT)


# ── URLs and addresses ───────────────────────────────────────────────────────────────────────────────────────────────

EVERYTHING = Guard(["0.0.0.0/0", "::/0", *map(str, addresses._METADATA)])
odd_numbers = st.one_of(
    st.integers(0, 2**32 + 5).map(str),
    st.builds(str.format, st.sampled_from(["{:04o}", "0x{:x}", "0X{:X}", "{:03d}", "{}"]), st.integers(0, 300)),
    st.sampled_from(["", "0x", "00", "1e3", "１", "①", "٣", "1_0", "+1", "-1", "0b1", "4294967296", "9" * 30]),
)  # fmt: skip
dots = st.sampled_from([".", ".", ".", "。", "．", "%2e", ".."])
words = st.sampled_from(
    ["localhost", "example", "com", "internal", "bücher", "straße", "xn--bcher-kva", "ⓛⓞⓒⓐⓛ", "a_b", "%6c", "%00",
     "faß", "\u00ad", "\u200d", "☃", "日本"]
)  # fmt: skip
hosts = st.one_of(
    st.sampled_from([host for host, _ in REFUSED_HOSTS if "\ud800" not in host]),
    st.tuples(st.lists(odd_numbers | words, min_size=1, max_size=5), dots).map(lambda pair: pair[1].join(pair[0])),
    st.integers(0, 2**128 - 1).map(lambda n: f"[{ipaddress.IPv6Address(n)}]"),
    st.ip_addresses(v=4).map(lambda a: f"[::ffff:{a}]"),
    st.text(st.characters(blacklist_categories=["Cs"]), max_size=12),
)
urls = st.builds(
    "{}{}{}{}{}".format,
    st.sampled_from(["https://", "https://", "https://", "HTTPS://", "https:/", "https:\\\\", "//", "http://", ""]),
    st.sampled_from(["", "", "", "user@", "a:b@", "@", "127.0.0.1@", "x\\@", "%40"]),
    hosts,
    st.sampled_from(["", "", ":443", ":8443", ":0", ":", ":00080", ":65536", ":４４３", ":80:90"]),
    st.sampled_from(["", "/", "/hook", "?a=b", "#x", "/\\..", "\\x", "/ ", "\t", "/%2e%2e/", "@127.0.0.1/"]),
)


def target_of(url: str, guard: Guard = EVERYTHING) -> Target | None:
    try:
        return guard.check_url(url)
    except AddressRefused:
        return None


def canonical(host: str) -> str:
    """An address in its one spelling, a mapped one as the IPv4 address it stands for; a name as it is."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host.removesuffix(".")
    return str(getattr(address, "ipv4_mapped", None) or address)


@needs_node
@with_oracle
@given(url=urls)
def test_a_url_that_is_let_through_leads_where_a_browser_would_go(oracle: Oracle, url: str) -> None:
    target = target_of(url)
    if target is None:
        return
    for text in (url, target.url):
        told = oracle("url", text)
        if told is not None:
            host, port = told
            assert (canonical(host), port or "443") == (canonical(target.host), str(target.port)), text


@given(url=urls)
def test_a_url_that_is_let_through_means_one_thing(url: str) -> None:
    target = target_of(url)
    if target is None:
        return
    parts = urlsplit(target.url)
    assert (parts.scheme, parts.username, parts.password, parts.fragment) == (target.scheme, None, None, "")
    assert (canonical(parts.hostname or ""), parts.port or 443) == (canonical(target.host), target.port)
    assert target_of(target.url) == target
    head = f"POST {target.path} HTTP/1.1\r\nHost: {target.host_header}\r\n"
    assert head.isascii()
    assert head.count("\r\n") == head.count("\n") == 2
    assert len(head.split("\r\n", maxsplit=1)[0].split(" ")) == 3


@given(host=st.lists(odd_numbers, min_size=1, max_size=5).map(".".join))
def test_what_inet_aton_takes_for_an_address_is_that_address_or_refused(host: str) -> None:
    """A resolver of the system's may call it on whatever looks like a number."""
    try:
        meant = ipaddress.IPv4Address(socket.inet_aton(host))
    except (OSError, UnicodeEncodeError):
        return
    target = target_of(f"https://{host}/")
    assert target is None or target.address == meant
    strict = target_of(f"https://{host}/", Guard())
    assert strict is None or meant.is_global


@given(text=hosts.map(lambda host: host.strip("[]")) | st.ip_addresses().map(str))
def test_only_what_the_standard_library_calls_an_address_passes_at_connect(text: str) -> None:
    try:
        EVERYTHING.check_address(text)
    except AddressRefused:
        return
    assert str(ipaddress.ip_address(text.partition("%")[0]))


@given(address=st.ip_addresses())
def test_no_address_passes_that_the_standard_library_does_not_call_global(address: Any) -> None:
    with contextlib.suppress(AddressRefused):
        Guard().check_address(address)
        assert address.is_global
        assert not address.is_multicast


@given(raw=st.binary(max_size=60) | numbers.map(str.encode), now=st.floats(0.0, 4e9))
def test_no_retry_after_asks_for_more_than_a_day(raw: bytes, now: float) -> None:
    asked_s = retry_after_s(raw, now)
    assert asked_s is None or 0.0 <= asked_s <= RETRY_AFTER_S_MAX


# ── request bodies ───────────────────────────────────────────────────────────────────────────────────────────────────

KINDS = [
    kind
    for module in (webhooks, events, replays, trials)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind.__struct_config__.forbid_unknown_fields
    and kind.__module__ == module.__name__
]  # fmt: skip


def test_the_bodies_of_all_calls_are_known() -> None:
    names = {kind.__name__ for kind in KINDS}
    assert names >= {"NewWebhook", "WebhookPatch", "Rotation", "NewEvent", "NewReplay", "NewTrial"}


@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_no_body_is_a_fault_of_ours(data: st.DataObject, kind: type[msgspec.Struct]) -> None:
    names = st.sampled_from([field.encode_name for field in msgspec.structs.fields(kind)])
    members = st.lists(st.builds("{1}{0}{1}:{1}{2}".format, names.map(json.dumps) | keys, blanks, texts), max_size=6)
    text = data.draw(members.map(lambda e: f"{{{','.join(e)}}}") | texts | st.text(max_size=40))
    problem = None
    try:
        assert isinstance(parse_body(text, kind, {}), kind)
    except Problem as raised:
        problem = raised
    if problem is not None:
        assert problem.status in {400, 422}
        assert problem.response().body
        assert all(error.field.isprintable() for error in problem.errors)
