"""A webhook's own headers: what a customer may add to every request sent to them.

They become part of a request head that is written byte for byte, so one line break in a value would let a customer
write headers, or a whole second request, of their own. And they must not replace what frames the message, what names
its destination, or what a receiver trusts us to have signed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

from dispatcher.errors import DispatcherError

HEADERS_MAX: Final = 20
NAME_LENGTH_MAX: Final = 128
VALUE_LENGTH_MAX: Final = 4096  # a bearer token with many claims fits
HEAD_BYTES_MAX: Final = 8192  # all of them as sent: with ours well inside the 16 KiB that Node reads, by far the least

_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2
_VALUE: Final = re.compile(r"[\t\x20-\x7e\xa0-\xff]*")  # section 5.5, without the C1 controls

_CONNECTION: Final = "belongs to the connection, not to the message"
_FRAMING: Final = "is set by the sender for each request"
_RESERVED: Final = {
    "connection": _CONNECTION,
    "keep-alive": _CONNECTION,
    "te": _CONNECTION,
    "trailer": _CONNECTION,
    "upgrade": _CONNECTION,
    "http2-settings": _CONNECTION,
    "transfer-encoding": _FRAMING,
    "host": _FRAMING,
    "expect": "would make the endpoint answer before it has the body",
    # Receivers and their firewalls recognise the sender by it; a customer could pose as somebody else.
    "user-agent": "names the sender",
}
_RESERVED_PREFIXES: Final = {
    "content-": _FRAMING,
    "proxy-": _CONNECTION,
    "webhook-": "is reserved for the signature",
}


class HeadersRefused(DispatcherError):
    """One or more headers cannot be sent. `problems` holds (field, message) pairs, fields like `headers.X-Foo`."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{field}: {message}" for field, message in problems))
        self.problems = problems


def check_headers(headers: Mapping[str, str], brand_prefix: str = "X-Trackpost-") -> tuple[tuple[str, str], ...]:
    """The headers as they will be sent: names as given, values without surrounding blanks, in the given order.

    `brand_prefix` is what our own header names start with. Raises HeadersRefused with every problem there is.
    """
    sent = tuple((name, value.strip(" \t")) for name, value in headers.items())
    problems = list(_problems(sent, {**_RESERVED_PREFIXES, brand_prefix.lower(): "is reserved for the sender"}))
    if problems:
        raise HeadersRefused(problems)
    return sent


def _problems(sent: tuple[tuple[str, str], ...], prefixes: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    if len(sent) > HEADERS_MAX:
        yield "headers", f"at most {HEADERS_MAX} headers, not {len(sent)}"
    if sum(len(name) + len(value) + 4 for name, value in sent) > HEAD_BYTES_MAX:  # 4: colon, space, CR, LF
        yield "headers", f"at most {HEAD_BYTES_MAX} bytes in all"
    seen: set[str] = set()
    for name, value in sent:
        message = _name_problem(name, prefixes) or _value_problem(value)
        if message is None and name.lower() in seen:
            message = "is given twice, in different spelling"
        if message is not None:
            yield f"headers.{_shown(name)}", message
        seen.add(name.lower())


def _name_problem(name: str, prefixes: Mapping[str, str]) -> str | None:
    if len(name) > NAME_LENGTH_MAX:
        return f"a name has at most {NAME_LENGTH_MAX} characters"
    if not _TOKEN.fullmatch(name):
        return "a name is made of letters, digits and !#$%&'*+-.^_`|~"
    lower = name.lower()
    return _RESERVED.get(lower) or next((why for prefix, why in prefixes.items() if lower.startswith(prefix)), None)


def _value_problem(value: str) -> str | None:
    if len(value) > VALUE_LENGTH_MAX:
        return f"a value has at most {VALUE_LENGTH_MAX} characters"
    if not _VALUE.fullmatch(value):
        return "a value holds printable Latin-1 characters only: no line breaks, no controls"
    return None


def _shown(name: str) -> str:
    """The name, fit for a message and a log line whatever it holds."""
    return ascii(name[:NAME_LENGTH_MAX])[1:-1]
