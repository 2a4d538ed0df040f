from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.core import headers
from dispatcher.core.headers import HeadersRefused, check_headers


def problems(given_headers: dict[str, str], brand_prefix: str = "X-Trackpost-") -> list[tuple[str, str]]:
    with pytest.raises(HeadersRefused) as refused:
        check_headers(given_headers, brand_prefix)
    return refused.value.problems


def test_ordinary_headers_pass_in_order_and_as_spelled() -> None:
    given_headers = {"authorization": "Bearer a.b-c", "X-Tenant": "acme", "Cookie": "a=b; c=d", "X-Empty": ""}
    assert check_headers(given_headers) == tuple(given_headers.items())
    assert check_headers({}) == ()


def test_blanks_around_a_value_are_not_sent() -> None:
    assert check_headers({"X-A": " \tb c\t "}) == (("X-A", "b c"),)


@pytest.mark.parametrize(
    "name", ["Hostess", "Connection-Id", "Contents", "X-Content-Type", "Webhooks", "Te-St", "X-User-Agent"]
)
def test_names_that_only_resemble_reserved_ones_pass(name: str) -> None:
    assert check_headers({name: "x"}) == ((name, "x"),)


@pytest.mark.parametrize(
    "name",
    [
        *("Host", "host", "HOST", "Connection", "Keep-Alive", "TE", "Trailer", "Transfer-Encoding", "Upgrade"),
        *("Proxy-Authorization", "Proxy-Authenticate", "Proxy-Connection", "HTTP2-Settings", "Expect", "User-Agent"),
        *("Content-Length", "content-type", "Content-Encoding", "CONTENT-anything"),
        *("webhook-id", "Webhook-Timestamp", "webhook-signature", "X-Trackpost-Signature", "x-trackpost-anything"),
    ],
)
def test_reserved_names_are_refused_in_any_case(name: str) -> None:
    [(field, message)] = problems({name: "x"})
    assert field == f"headers.{name}"
    assert message


def test_the_brand_s_own_prefix_is_reserved() -> None:
    assert problems({"X-Acme-Event": "x"}, "X-Acme-") == [("headers.X-Acme-Event", "is reserved for the sender")]
    assert check_headers({"X-Trackpost-Event": "x"}, "X-Acme-")


@pytest.mark.parametrize(
    "name", ["", " ", "X A", "X:A", ":path", "X-A\r\nX-B", "X-A\n", "X-\x00", "X-Ä", "X(A)", "a" * 129]
)
def test_names_that_are_no_tokens_are_refused(name: str) -> None:
    [(field, message)] = problems({name: "x"})
    assert field.isascii()
    assert field.isprintable()
    assert "a name" in message


@pytest.mark.parametrize("control", [*map(chr, range(32)), *map(chr, range(127, 160)), "\u0100", "\u2028", "\ud800"])
def test_controls_and_what_latin_1_lacks_are_refused_in_values(control: str) -> None:
    value = f"a{control}b"
    if control == "\t":
        assert check_headers({"X-A": value}) == (("X-A", value),)
    else:
        assert "no line breaks" in problems({"X-A": value})[0][1]


def test_a_line_break_at_the_end_is_refused_and_not_trimmed() -> None:
    assert problems({"X-A": "b\r\n"})
    assert problems({"X-A": "b\n"})


def test_one_name_in_two_spellings_is_refused() -> None:
    assert problems({"X-A": "1", "x-a": "2"}) == [("headers.x-a", "is given twice, in different spelling")]


def test_the_number_of_headers_is_bounded() -> None:
    many = {f"X-{number}": "x" for number in range(21)}
    assert problems(many) == [("headers", "at most 20 headers, not 21")]
    del many["X-0"]
    assert len(check_headers(many)) == 20


def test_the_bytes_of_each_value_and_of_all_headers_are_bounded() -> None:
    assert check_headers({"X-A": "x" * 4096})
    assert problems({"X-A": "x" * 4097}) == [("headers.X-A", "a value has at most 4096 characters")]
    assert check_headers({"X-A": "x" * 4089, "X-B": "x" * 4089})
    assert problems({"X-A": "x" * 4089, "X-B": "x" * 4090}) == [("headers", "at most 8192 bytes in all")]


def test_every_problem_is_told_at_once() -> None:
    found = problems({"Host": "x", "X-A": "\n", "X-B": "fine", "X C": "x"})
    assert [field for field, _ in found] == ["headers.Host", "headers.X-A", "headers.X C"]
    with pytest.raises(HeadersRefused, match=r"^headers\.Host: is set by the sender for each request$"):
        check_headers({"Host": "x"})


@given(st.dictionaries(st.text(max_size=12), st.text(max_size=20), max_size=22))
def test_whatever_passes_writes_one_line_for_each_header(drawn: dict[str, str]) -> None:
    try:
        sent = check_headers(drawn)
    except HeadersRefused:
        return
    head = "".join(f"{name}: {value}\r\n" for name, value in sent).encode("latin-1")
    assert len(head) <= headers.HEAD_BYTES_MAX
    lines = head.split(b"\r\n")
    assert len(lines) == len(drawn) + 1
    assert not any(set(line) & set(b"\r\n\x00") for line in lines)


@given(
    st.dictionaries(
        st.from_regex(r"X-[A-Za-z0-9]{1,8}", fullmatch=True).map(str.title),
        st.from_regex(r"[ -~]*", fullmatch=True),
        max_size=20,
    )
)
def test_plain_printable_headers_always_pass(drawn: dict[str, str]) -> None:
    assert dict(check_headers(drawn)) == {name: value.strip(" ") for name, value in drawn.items()}
