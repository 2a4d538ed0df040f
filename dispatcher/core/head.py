"""The header fields of a delivery's request, as a list: for what is sent once, and for showing what was sent.

The deliverer writes the same fields as one formatted text; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Iterable

from dispatcher.core.signing import Signer

WITHHELD = "…"
"""Stands for what is not on record: signatures are made for the moment, and to show them would help to forge."""


def fields_of(
    *,
    host: str,
    user_agent: str,
    prefix: str,
    own: Iterable[tuple[str, str]],
    type: str,  # noqa: A002
    event_id: str,
    delivery_id: str,
    attempt: int,
    timestamp: str,
    signatures: Iterable[tuple[str, str]],
    body_bytes: int,
    trace: str | None = None,
) -> list[tuple[str, str]]:
    """The fields in the order they are sent. `own` are the webhook's; `prefix` is the brand's, like `X-Trackpost-`."""
    return [
        ("Host", host),
        ("Content-Type", "application/json"),
        ("User-Agent", user_agent),
        *own,
        (f"{prefix}Event", type),
        (f"{prefix}Delivery", delivery_id),
        (f"{prefix}Attempt", str(attempt)),
        ("webhook-id", event_id),
        ("webhook-timestamp", timestamp),
        *signatures,
        *([("traceparent", trace)] if trace else []),
        ("Content-Length", str(body_bytes)),
    ]


def withheld(prefix: str, *, signed: bool) -> list[tuple[str, str]]:
    """The signature fields without their values."""
    return [(f"{prefix}Signature", WITHHELD), ("webhook-signature", WITHHELD)] if signed else []


def signatures(
    signer: Signer, prefix: str, event_id: str, timestamp: str, body: bytes, *, by_previous: bool = False
) -> list[tuple[str, str]]:
    """The signature fields of one request; none without a secret."""
    if not signer.is_signing:
        return []
    return [
        (f"{prefix}Signature", signer.legacy(body, by_previous=by_previous).decode()),
        ("webhook-signature", signer.standard(event_id.encode(), timestamp.encode(), body).decode()),
    ]
