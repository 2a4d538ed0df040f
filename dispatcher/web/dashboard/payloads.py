"""Bodies as people can read them, whatever their bytes: indented JSON, the exact text, or hexadecimal.

What is indented is the text itself and not what a parser made of it, so numbers keep their digits and repeated keys
stay. Characters that cannot be seen, or that turn the ones behind them round, stand there as escapes; a text that holds
NUL or is no UTF-8 is shown in hexadecimal alone.
"""

from __future__ import annotations

import dataclasses
import json
import re
import unicodedata
from typing import Final

from markupsafe import Markup, escape

PRETTY_CHARS_MAX: Final = 300_000  # the largest body that is ever sent
DEPTH_MAX: Final = 100  # of what is indented: a line of blanks per level is the square of it
HEX_BYTES_MAX: Final = 16 << 10
HEX_ROW: Final = 16

_JOINERS: Final = "\u200c\u200d"
_PIECE: Final = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s"{}\[\],:]+')
_HIDDEN: Final = re.compile(r"[^\S\n\t ]|[^\w\s!-~]")  # a superset, quickly: the category decides


@dataclasses.dataclass(frozen=True, slots=True)
class Exhibit:
    """One body in every way that makes sense for it. `text` is None where `hex` has to do, and the other way round."""

    size: int
    is_cut: bool  # more was there than is on record
    pretty: Markup | None
    text: Markup | None
    hex: str | None


def exhibit(body: bytes, *, is_cut: bool = False) -> Exhibit:
    """A body for showing."""
    text = _text(body, is_cut=is_cut)
    if text is None:
        return Exhibit(len(body), is_cut, None, None, hexadecimal(body))
    pretty = indented(text)
    return Exhibit(
        len(body), is_cut, None if pretty is None or pretty == text else visible(pretty), visible(text), None
    )


def indented(text: str) -> str | None:
    """JSON with a line for each thing; None for what is no JSON, nested too deeply, or too long."""
    try:
        if len(text) > PRETTY_CHARS_MAX or not isinstance(json.loads(text), dict | list):
            return None
    except (ValueError, RecursionError):
        return None
    parts: list[str] = []
    depth, is_fresh = 0, False  # fresh: right behind an opening bracket
    for piece in _PIECE.findall(text):
        if piece in "]}":
            depth -= 1
            parts.append(piece if is_fresh else f"\n{'  ' * depth}{piece}")
            is_fresh = False
            continue
        if is_fresh:
            parts.append(f"\n{'  ' * depth}")
        is_fresh = piece in "{["
        if is_fresh:
            depth += 1
            if depth > DEPTH_MAX:
                return None
        parts.append(f",\n{'  ' * depth}" if piece == "," else ": " if piece == ":" else piece)
    return "".join(parts)


def visible(text: str) -> Markup:
    r"""The text with what nobody could see made visible: `<span class="escaped">\u202e</span>`."""
    parts, end = [], 0
    for found in _HIDDEN.finditer(text):
        name = _escape(found[0])
        if name:
            parts += [escape(text[end : found.start()]), Markup('<span class="escaped">{}</span>').format(name)]
            end = found.end()
    return Markup("").join([*parts, escape(text[end:])])


def hexadecimal(data: bytes) -> str:
    """Offset, bytes and letters, sixteen to a row, as `hexdump -C` prints them."""
    rows = []
    for offset in range(0, min(len(data), HEX_BYTES_MAX), HEX_ROW):
        row = data[offset : offset + HEX_ROW]
        letters = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in row)
        rows.append(f"{offset:06x}  {row[:8].hex(' '):<23}  {row[8:].hex(' '):<23}  {letters}")
    if len(data) > HEX_BYTES_MAX:
        rows.append(f"… {len(data) - HEX_BYTES_MAX:,} more bytes")
    return "\n".join(rows)


def _text(body: bytes, *, is_cut: bool) -> str | None:
    """The body as text; None if it is none. What was cut off in the middle of a letter is still text."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        if not is_cut or error.reason != "unexpected end of data" or error.start < len(body) - 3:
            return None
        text = body[: error.start].decode()
    return None if "\0" in text else text


def _escape(character: str) -> str:
    """How a character that cannot be seen is spelt; "" for all others. Joiners stay: they make one emoji of several."""
    code = ord(character)
    if unicodedata.category(character) not in {"Cc", "Cf", "Zl", "Zp", "Co", "Cn"} or character in _JOINERS:
        return ""
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
