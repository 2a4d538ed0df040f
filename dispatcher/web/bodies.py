"""Request bodies: JSON text in, a Struct out, or everything that is wrong with it at once.

A decoder stops at the first mistake and cannot name a member it skipped. So a body is taken apart into its members,
each still the text that was sent, and each is decoded by its own field's type. That leaves an event's `data` exactly as
it was written, keeps what only `data` could hold (NaN, lone surrogates) from making the rest unreadable, and shows
members that are unknown or given twice.
"""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, TypeVar, get_args

import msgspec
from aiohttp import web

from dispatcher.web.problems import FieldError, Problem, invalid

BODY_BYTES_MAX: Final = 1 << 20  # four times the largest event that is delivered
BODY_TIMEOUT_S: Final = 30.0  # a client that sends slower than this is not sending
MEMBERS_MAX: Final = 64  # of a body's outermost object; none of ours has a fourth of that
SHOWN_MAX: Final = 40

T = TypeVar("T", bound=msgspec.Struct)

Check = Callable[[Any], Iterable[FieldError]]
"""What is wrong with a value that has the right type already."""

_WORDS: Final = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
_AT: Final = re.compile(r" - at `(?:key in )?\$([^`]*)`$")
_WRONG_TYPE: Final = re.compile(r"Expected `([^`]+)`, got `([^`]+)`")
_skip_blanks: Final = re.compile(r"[ \t\n\r]*").match
# Numbers stay text: what they are is for the field's type to say, and int() refuses long ones in a manner of its own.
_scan: Final = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str).raw_decode


def expecting(what: str) -> msgspec.Meta:
    """Complete "expected …" for a field: the one sentence a caller gets whatever is wrong with its type or size."""
    return msgspec.Meta(extra={"expected": what})


async def read_body(request: web.Request, kind: type[T], checks: Mapping[str, Check] | None = None) -> T:
    """The body as a `kind`; `checks` are by field and see values that are neither missing nor null. Raises Problem."""
    return parse_body(await _read_text(request), kind, checks or {})


async def _read_text(request: web.Request) -> str:
    if request.content_type != "application/json":
        raise Problem(415, "unsupported_media_type", "Send the body as Content-Type: application/json.")
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return (await request.read()).decode()
    except TimeoutError:
        raise Problem(408, "body_timeout", f"The body did not arrive within {BODY_TIMEOUT_S:g} s.") from None
    except web.HTTPRequestEntityTooLarge:
        raise Problem(413, "too_large", f"A body has at most {BODY_BYTES_MAX} bytes.") from None
    except UnicodeDecodeError:
        raise Problem(400, "invalid_json", "The body is not UTF-8.") from None
    except (web.RequestPayloadError, ConnectionError):
        # Where the next request would begin is anybody's guess.
        last = {"Connection": "close"}
        detail = "The body ended too soon or could not be decompressed."
        raise Problem(400, "incomplete_body", detail, headers=last) from None


def parse_body(text: str, kind: type[T], checks: Mapping[str, Check]) -> T:
    """`text` as a `kind`. Raises Problem: 400 for what is not JSON, 422 naming every field that is wrong."""
    errors: list[FieldError] = []
    fields, members = _fields(kind), _members(text, errors)
    values: dict[str, Any] = {}
    errors += (_unknown(name, fields) for name in members if name not in fields)
    for name, field in fields.items():
        if name in members:
            found = list(field.decode(members[name], values))
            value = values.get(name)
            if not found and name in checks and value is not None:
                found = list(checks[name](value))
            errors += found
        elif field.is_required:
            errors.append(FieldError(name, f"is missing, expected {field.expected}"))
    if errors:
        raise invalid(errors)
    return kind(**values)


@dataclasses.dataclass(frozen=True, slots=True)
class _Field:
    name: str
    expected: str
    is_required: bool
    decoder: msgspec.json.Decoder[Any] | None  # None: the text is wanted as it stands

    def decode(self, text: str, values: dict[str, Any]) -> Iterator[FieldError]:
        """Put the value among `values`, or say what is wrong with it."""
        try:
            values[self.name] = msgspec.Raw(text.encode()) if self.decoder is None else self.decoder.decode(text)
        except msgspec.DecodeError as error:
            yield from self._problems(text, str(error))

    def _problems(self, text: str, message: str) -> Iterator[FieldError]:
        at, wrong = _AT.search(message), _WRONG_TYPE.match(message)
        if at is None or wrong is None:
            found = f", not {text}" if len(text) <= SHOWN_MAX else ""
            yield FieldError(self.name, f"expected {self.expected}{found}")
            return
        where = f".{_shown(_first_not_text(text))}" if at[1] == "[...]" else at[1]
        yield FieldError(f"{self.name}{where}", f"expected {_in_words(wrong[1])}, got {_in_words(wrong[2])}")


@functools.cache
def _fields(kind: type[msgspec.Struct]) -> dict[str, _Field]:
    return {
        field.encode_name: _Field(
            field.name,
            _expected(field.type),
            field.required,
            None if msgspec.Raw in get_args(field.type) else msgspec.json.Decoder(field.type),
        )
        for field in msgspec.structs.fields(kind)
    }


def _expected(kind: Any) -> str:
    found = [meta.extra["expected"] for meta in getattr(kind, "__metadata__", ()) if meta.extra]
    assert found, f"{kind} says what it expects"
    return str(found[0])


def _first_not_text(text: str) -> str:
    """The key that msgspec does not name; our mappings are all of texts."""
    pairs: list[tuple[str, object]] = json.loads(text, object_pairs_hook=list, parse_int=len)
    return next(key for key, value in pairs if not isinstance(value, str))


def _unknown(name: str, fields: Mapping[str, _Field]) -> FieldError:
    meant = difflib.get_close_matches(name[:SHOWN_MAX], list(fields), n=1)
    expected = f"expected one of {', '.join(fields)}" if fields else "there are none here"
    hint = f"did you mean {meant[0]}?" if meant else expected
    return FieldError(_shown(name), f"is not a field here: {hint}")


def _in_words(kinds: str) -> str:
    return " or ".join(_WORDS.get(kind, kind) for kind in kinds.split(" | "))


def _shown(name: str) -> str:
    return ascii(name[:SHOWN_MAX])[1:-1]


def _members(text: str, errors: list[FieldError]) -> dict[str, str]:
    """The text of each member of the object that `text` is. A member that cannot be read or comes twice is an error."""
    members: dict[str, str] = {}
    try:
        for name, value in _split(text):
            if name in members:
                errors.append(FieldError(_shown(name), "is given twice"))
            members[name] = value
            if len(members) > MEMBERS_MAX:
                raise invalid([FieldError("", f"expected an object of at most {MEMBERS_MAX} members")])
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise Problem(400, "invalid_json", f"The body is not JSON: {error.msg} at {where}.") from None
    return members


def _split(text: str) -> Iterator[tuple[str, str]]:
    """Each member's name and its value as written. Raises JSONDecodeError, or Problem for JSON that is no object."""
    position = _blanks(text, 0)
    if not text.startswith("{", position):
        _, end = _scan_value(text, position, "")
        _end(text, end)
        raise invalid([FieldError("", "expected an object")])
    position = _blanks(text, position + 1)
    more = not text.startswith("}", position)
    while more:
        if not text.startswith('"', position):
            raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, position)
        name, position = _scan(text, position)
        position = _blanks(text, position)
        if not text.startswith(":", position):
            raise json.JSONDecodeError("Expecting ':' delimiter", text, position)
        start = _blanks(text, position + 1)
        _, position = _scan_value(text, start, name)
        yield name, text[start:position]
        position = _blanks(text, position)
        more = text.startswith(",", position)
        if more:
            position = _blanks(text, position + 1)
        elif not text.startswith("}", position):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
    _end(text, position + 1)


def _scan_value(text: str, position: int, name: str) -> tuple[Any, int]:
    try:
        return _scan(text, position)
    except RecursionError:
        raise invalid([FieldError(_shown(name), "is nested too deeply")]) from None


def _blanks(text: str, position: int) -> int:
    found = _skip_blanks(text, position)
    assert found is not None, "the pattern matches nothing too"
    return found.end()


def _end(text: str, position: int) -> None:
    position = _blanks(text, position)
    if position != len(text):
        raise json.JSONDecodeError("Extra data", text, position)
