"""A request as a command for a POSIX shell: what a webhook was sent, sent again by hand.

What arrives is the same to the byte: `curl` neither expands the URL nor adds a header field, and the body comes through
a pipe, so it may hold any byte and be of any length. Signatures are not on record, and a copied command must not carry
a secret. So the command makes them anew, for its own moment, by the secret it finds in `WEBHOOK_SECRET`.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from typing import Final

SECRET: Final = "WEBHOOK_SECRET"  # noqa: S105  the name of a variable

_LEGACY: Final = f'$(body | openssl dgst -sha256 -hmac "${SECRET}" -r | cut -c 1-64)'
_STANDARD: Final = (
    'v1,$({ printf %s "$id.$now."; body; } | openssl dgst -sha256 -mac HMAC -macopt "hexkey:$key" -binary | base64)'
)
_KEY: Final = f"""\
key=$(case ${SECRET} in
    whsec_*) printf %s "${{{SECRET}#whsec_}}" | base64 -d ;;
    *) printf %s "${SECRET}" ;;
esac | od -An -v -tx1 | tr -d ' \\n')"""

# Curl knows the first two from the URL and the body; and what is repeated by hand is no part of the event's trace.
_LEFT_OUT: Final = frozenset({"host", "content-length", "traceparent"})


def command(url: str, fields: Iterable[tuple[str, str]], body: bytes, *, signature_prefix: str | None = None) -> str:
    """The command. `fields` are header fields as they were sent; those about signatures and their time are made anew
    if `signature_prefix` (the brand's, like `X-Trackpost-`) is given, and left out otherwise.
    """
    legacy = f"{signature_prefix or ''}signature".lower()
    made = {legacy, "webhook-signature", "webhook-timestamp"}
    kept = [(name, value) for name, value in fields if name.lower() not in _LEFT_OUT | made]
    if signature_prefix is None:
        return "\n".join([f"{_printing(body)} |", *_curl(url, [_field(*field) for field in kept])])
    event_id = next((value for name, value in kept if name.lower() == "webhook-id"), "")
    signed = [
        '-H "webhook-timestamp: $now"',
        f'-H "{signature_prefix}Signature: {_LEGACY}"',
        f'-H "webhook-signature: {_STANDARD}"',
    ]
    return "\n".join(
        [
            f': "${{{SECRET}:?set it to the signing secret of the webhook}}"',
            _KEY,
            f"id={shlex.quote(event_id)} now=$(date +%s)",
            f"body() {{ {_printing(body)}; }}",
            "body |",
            *_curl(url, [*(_field(*field) for field in kept), *signed]),
        ]
    )


def _curl(url: str, fields: Iterable[str]) -> Iterator[str]:
    """The lines of the call. The empty field keeps curl from announcing what it accepts, which we do not either."""
    yield f"  curl -i --http1.1 --globoff --path-as-is {shlex.quote(url)} \\"
    yield from (f"    {field} \\" for field in ("-H 'Accept:'", *fields))
    yield "    --data-binary @-"


def _field(name: str, value: str) -> str:
    """A header field as an argument; with a semicolon if it is empty, because a colon would take it away."""
    text = f"{name}: {value}" if value else f"{name};"
    return (
        f"-H {shlex.quote(text)}"
        if text.isascii() and text.isprintable()
        else f'-H "$({_escaped(text.encode("latin-1"))})"'
    )


def _printing(body: bytes) -> str:
    """A command that prints these bytes: as they are if a person and a terminal can carry them, else escaped."""
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return _escaped(body)
    return f"printf %s {shlex.quote(text)}" if text.isprintable() else _escaped(body)


def _escaped(data: bytes) -> str:
    r"""With three octal digits for whatever is not an ASCII letter, digit or blank of JSON: `\012`."""
    plain = b'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 {}[]":,._-/@+='
    return "printf '" + "".join(chr(byte) if byte in plain else f"\\{byte:03o}" for byte in data) + "'"
