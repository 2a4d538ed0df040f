"""What an event looks like on the wire, to the byte.

**Problem.** Subscribers verify signatures over bytes that they made themselves: Express handlers hash
`JSON.stringify(JSON.parse(body))`, Flask handlers `json.dumps(json.loads(body))`. They accept a body only if it is a
fixed point of their own serialiser, and no object is a fixed point of both: one never prints a space outside a string,
the other prints one after every colon.

**Rule.** A body has one of two styles, chosen per endpoint, and is rendered once per event and style:

    compact    what ECMAScript prints (ECMA-262, JSON.stringify and Number::toString). Array-index keys come first in
               ascending order, then the others as written; `1.0` is `1`, `1e21` is `1e+21`, `-0` is `0`; strings escape
               `"`, `\\` and U+0000–001F, nothing else
    python     what `json.dumps` prints with its defaults

**Invariant.** Data is accepted only where both styles carry the same value, which is I-JSON (RFC 7493) with a bound on
depth: an object, every key once, no integer a double cannot hold, no number that overflows it, no lone surrogate.
Everything else is `Undeliverable`, with a reason that repeats nothing of the data.

**Two tiers, one verdict.** orjson parses and prints several times as fast as anything exact, and is wrong in few,
known ways: it keeps the last of two equal keys, reads integers beyond 64 bits as floats, prints integral and very small
or large floats in a manner of its own, and leaves index-like keys where they stood. The fast tier proves that none of
this happened; it refuses nothing. Whatever it cannot prove goes to the exact tier, whose verdict is the only one. So a
proof may be as coarse as it is cheap: a false alarm costs time, never a byte.

Measured in µs from text to body, checks and envelope included (CPython 3.11, one core; orjson alone reads and prints
the larger one in 1.0):

    data                                           compact    and python    exact tier
    130 bytes, four texts                              2.5                         5.6
    334 bytes, two levels, a list, integers            4.6           9.2          11.7
    the same with a score of 5.0                                                  16.1

This module never signs, never looks at a clock and never stores anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, Never

import orjson

from dispatcher.errors import Undeliverable
from dispatcher.model import BodyStyle

BODY_BYTES_MAX: Final = 256 * 1024
DEPTH_MAX: Final = 64  # the data object itself is level one
INTEGER_MAX: Final = 2**53 - 1  # Number.MAX_SAFE_INTEGER
TYPE_BYTES_MAX: Final = 128
# Escapes at most sextuple a body (`\u0041` for `A`): what is longer than this is oversized or mostly white space, and
# parsing it exactly would hold the event loop for seconds.
TEXT_BYTES_MAX: Final = 8 * BODY_BYTES_MAX

# Anchored for readers of ECMAScript; in Python use `fullmatch`, because `$` forgives a final newline.
TYPE_PATTERN: Final = r"^[a-z0-9_]+(\.[a-z0-9_]+)+$"
EVENT_ID_PATTERN: Final = r"^[A-Za-z0-9_-]{1,64}$"  # safe in a header, in a URL and in JSON as it stands

_matches_type: Final = re.compile(TYPE_PATTERN).fullmatch
_matches_event_id: Final = re.compile(EVENT_ID_PATTERN).fullmatch
_matches_index: Final = re.compile(r"0|[1-9][0-9]{0,9}").fullmatch
_INDEX_MAX: Final = 2**32 - 2  # the largest array index of ECMA-262

_COMPACT: Final = BodyStyle.COMPACT
_read: Final = orjson.loads  # a module's attribute is looked up at each call, a final name is not
_write: Final = orjson.dumps
_OPTIONS: Final = orjson.OPT_UTC_Z | orjson.OPT_OMIT_MICROSECONDS | orjson.OPT_STRICT_INTEGER
_ENVELOPE_QUOTES: Final = 18  # five keys and four texts, none of which can hold a quote
_BACKSLASH: Final = ord("\\")  # as a number: `b"\\" in source` takes seven times as long
_PLAIN_KEYS_MAX: Final = 4096
_PLAIN_KEY_CHARS_MAX: Final = 64  # as many as orjson keeps keys to: these come as the same objects again

_plain_keys: Final[set[str]] = set()  # met before and no index; bounded, and dropped as a whole when it is full

_PROBE_ID: Final = "evt_" + "0" * 26  # as long as the ids of this program
_PROBE_TIME: Final = datetime(2000, 1, 1, tzinfo=UTC)


class Payload:
    """One event, parsed and checked once; its body in either style, rendered at most once each.

    Construction raises `Undeliverable` for whatever the event is discarded for, a compact body over 256 KiB included.
    `body` raises it only for the size of the python body, which concerns its own subscribers alone: ASCII escapes make
    that of a Chinese text twice the compact one.
    """

    __slots__ = ("_python", "_source", "compact", "event_id", "type")

    def __init__(
        self,
        event_id: str,
        type: str,  # noqa: A002
        created_at: datetime,
        data: str | bytes,
        version: str = "1.0",
    ) -> None:
        """Take an event as the outbox holds it.

        `data` is JSON text as the application wrote it, `created_at` any aware time (printed in UTC, in whole seconds),
        `version` plain text of our own.
        """
        if not is_event_id(event_id):
            raise Undeliverable("event id is not 1 to 64 characters of A-Z a-z 0-9 _ -")
        if not is_type(type):
            raise Undeliverable(f"type is not lower-case words joined by dots, at most {TYPE_BYTES_MAX} bytes")
        self.event_id = event_id
        self.type = type
        self._source: bytes | None = None  # of what the compact body does not hold exactly
        self._python: bytes | None = None
        source = _source(data)
        envelope = {
            "id": event_id,
            "type": type,
            "version": version,
            "created_at": created_at if created_at.tzinfo is UTC else _in_utc(created_at),
            "data": None,
        }
        self.compact = _bounded(_printed_if_plain(source, envelope) or self._print_exactly(source, envelope))

    def body(self, style: BodyStyle) -> bytes:
        """Return the bytes to send and to sign: the same object on every call."""
        if style is _COMPACT:
            return self.compact
        if self._python is None:
            self._python = _bounded(self._render_python())
        return self._python

    def _print_exactly(self, source: bytes, envelope: dict[str, Any]) -> bytes:
        self._source = source
        envelope["data"] = _as_ecmascript(_parse_exactly(source), 1)
        return _print(envelope)

    def _render_python(self) -> bytes:
        # Parsed again rather than kept: thousands of events wait in memory, and a parsed one takes five times the room.
        envelope = orjson.loads(self.compact)
        if self._source is not None:
            envelope["data"] = _parse_exactly(self._source)
        return _python_json(envelope).encode("ascii")

    def __repr__(self) -> str:
        return f"<Payload {self.event_id} {self.type}, {len(self.compact)} bytes compact>"


def render(
    *,
    event_id: str,
    type: str,  # noqa: A002
    created_at: datetime,
    data: str | bytes,
    style: BodyStyle,
    version: str = "1.0",
) -> bytes:
    """Return the body of one event in one style; see `Payload`, which serves several. Raises `Undeliverable`."""
    return Payload(event_id, type, created_at, data, version).body(style)


def check_data(type: str, data: str | bytes) -> None:  # noqa: A002
    """Raise `Undeliverable` if an event of this type and data would be discarded: for the door, before it is stored.

    The size is that of the compact body under an id of ours.
    """
    Payload(_PROBE_ID, type, _PROBE_TIME, data)


def is_event_id(text: str) -> bool:
    """Tell whether a text can be an event's id: what may stand in a header, in a URL and in JSON as it is."""
    return _matches_event_id(text) is not None


def is_type(text: str) -> bool:
    """Tell whether a text can be an event type: `email.delivered`, at most 128 bytes."""
    return len(text) <= TYPE_BYTES_MAX and _is_type(text)


@lru_cache(maxsize=1024)  # a catalogue has dozens; 0.05 µs against 0.2
def _is_type(text: str) -> bool:
    return _matches_type(text) is not None


def _in_utc(moment: datetime) -> datetime:
    """PostgreSQL knows `infinity`, which its driver hands over as a time without a zone."""
    if moment.tzinfo is None:
        raise Undeliverable("created_at is not a finite time")
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise Undeliverable("created_at is not a finite time") from None


def _source(data: str | bytes) -> bytes:
    try:
        source = data.encode() if isinstance(data, str) else data
    except UnicodeEncodeError:
        raise Undeliverable("data holds a lone surrogate") from None
    if len(source) > TEXT_BYTES_MAX:
        raise Undeliverable(f"data is over {TEXT_BYTES_MAX} bytes as written")
    return source


def _bounded(body: bytes) -> bytes:
    if len(body) > BODY_BYTES_MAX:
        raise Undeliverable(f"body is over {BODY_BYTES_MAX} bytes")
    return body


def _printed_if_plain(source: bytes, envelope: dict[str, Any]) -> bytes | None:
    """The fast tier: the compact body, or None for whatever orjson may have read or printed in a manner of its own.

    Equal counts of quotes before and after prove that no key was dropped, for it would have taken its own along: a
    quote inside a string is one `\\"` on both sides, unless the source spells it `\\u0022`.
    """
    try:
        value = _read(source)
        if type(value) is not dict or not _is_plain_object(value, 1):
            return None
        envelope["data"] = value
        # A copy: orjson hands over its whole buffer, 4 to 64 KiB with the text at its beginning. Ten thousand waiting
        # events of 440 bytes took 76 MB more.
        compact = b"%b" % _write(envelope, option=_OPTIONS)
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        return None  # the reason is for the exact tier to give
    quotes_kept = compact.count(b'"') == source.count(b'"') + _ENVELOPE_QUOTES
    return compact if quotes_kept and not (_BACKSLASH in source and b"u0022" in source) else None


def _is_plain_object(value: dict[str, Any], depth: int) -> bool:
    """Tell whether orjson read this as it was written and prints it as ECMAScript would."""
    return (_plain_keys.issuperset(value) or _learn_keys(value)) and _are_plain(value.values(), depth)


def _learn_keys(keys: Iterable[str]) -> bool:
    """Tell whether no key looks like an index; then remember these, since most events of a kind have the same."""
    if any(map(str.isdigit, keys)):
        return False
    if len(_plain_keys) >= _PLAIN_KEYS_MAX:
        _plain_keys.clear()
    _plain_keys.update(key for key in keys if len(key) <= _PLAIN_KEY_CHARS_MAX)
    return True


def _are_plain(items: Iterable[Any], depth: int) -> bool:
    """Tell whether these are: dense, since a quarter of the time is spent here.

    A float that passes has a fraction, so it is no integer in disguise and below 2^52; down from there to 1e-4 every
    serialiser prints it alike.
    """
    for item in items:
        kind = type(item)
        if kind is str or kind is int or kind is bool or item is None:
            continue  # an integer's size is for orjson to check, by option
        if kind is float:
            if abs(item) < 1e-4 or item.is_integer():
                return False
        elif depth == DEPTH_MAX:
            return False
        elif kind is dict:
            if not _is_plain_object(item, depth + 1):
                return False
        elif not _are_plain(item, depth + 1):
            return False
    return True


def _parse_exactly(source: bytes) -> dict[str, Any]:
    try:
        value = _decode(source.decode())
    except UnicodeDecodeError:
        raise Undeliverable("data is not valid UTF-8") from None
    except json.JSONDecodeError:
        raise Undeliverable("data is not valid JSON") from None
    except RecursionError:
        _refuse_depth()
    if type(value) is not dict:
        raise Undeliverable("data is not a JSON object")
    return value


def _print(envelope: dict[str, Any]) -> bytes:
    try:
        return b"%b" % orjson.dumps(envelope, option=_OPTIONS)  # a copy, as above
    except orjson.JSONEncodeError:  # the one thing left that orjson does not print
        raise Undeliverable("data holds a lone surrogate") from None


def _as_ecmascript(value: Any, depth: int) -> Any:
    """Return a value that orjson prints as ECMAScript prints `value`."""
    kind = type(value)
    if kind is float:
        return orjson.Fragment(number_text(value))
    if kind is not dict and kind is not list:
        return value
    if depth > DEPTH_MAX:
        _refuse_depth()
    if kind is list:
        return [_as_ecmascript(item, depth + 1) for item in value]
    shown = {key: _as_ecmascript(item, depth + 1) for key, item in value.items()}
    indices = sorted(filter(_is_index, shown), key=int)
    return {key: shown[key] for key in indices} | shown  # a key of both keeps its place in the first


def _is_index(key: str) -> bool:
    return _matches_index(key) is not None and int(key) <= _INDEX_MAX


def number_text(number: float) -> str:
    """Return what ECMAScript prints for a finite double (ECMA-262, Number::toString).

    Python's `repr` yields the same digits, the shortest that read back as the same double; only the layout differs.
    """
    if number.is_integer() and abs(number) <= INTEGER_MAX:
        return str(int(number))  # minus zero is zero
    sign = "-" if number < 0 else ""
    mantissa, _, exponent = repr(abs(number)).partition("e")
    whole, _, fraction = mantissa.partition(".")
    written = whole + fraction
    digits = written.lstrip("0")
    point = len(whole) + int(exponent or 0) - (len(written) - len(digits))  # number = 0.digits × 10^point
    return sign + _laid_out(digits.rstrip("0"), point)


def _laid_out(digits: str, point: int) -> str:
    if len(digits) <= point <= 21:
        return digits.ljust(point, "0")
    if 0 < point <= 21:
        return f"{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"0.{'0' * -point}{digits}"
    mantissa = digits if len(digits) == 1 else f"{digits[0]}.{digits[1:]}"
    return f"{mantissa}e{point - 1:+d}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise Undeliverable("data repeats a key within one object")
    return members


def _safe_integer(text: str) -> int:
    # The length first: int() refuses thousands of digits with an error of its own.
    if len(text) > len(str(-INTEGER_MAX)) or abs(number := int(text)) > INTEGER_MAX:
        raise Undeliverable("data holds an integer beyond ±(2^53 − 1)")
    return number


def _finite_float(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise Undeliverable("data holds a number too large for a double")
    return number


def _refuse_constant(_: str) -> Never:
    raise Undeliverable("data holds NaN or Infinity")


def _refuse_depth() -> Never:
    raise Undeliverable(f"data is nested deeper than {DEPTH_MAX} levels")


_decode = json.JSONDecoder(
    object_pairs_hook=_unique,
    parse_int=_safe_integer,
    parse_float=_finite_float,
    parse_constant=_refuse_constant,
).decode
# A parsed tree has no cycles, so none are looked for: 0.5 µs less, the same text as `json.dumps`.
_python_json = json.JSONEncoder(check_circular=False).encode
