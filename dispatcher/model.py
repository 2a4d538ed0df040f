"""The nouns.

Every word here is the same in columns, JSON, metrics, logs and commands; CHECK constraints in the schema mirror the
enums. Nothing here moves or decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Set
from datetime import datetime
from enum import StrEnum
from typing import Final, NewType

AccountId = NewType("AccountId", int)
EndpointId = NewType("EndpointId", int)

DEFAULT_ACCOUNT: Final = "default"


class Discreet:
    """Something that may hold a secret: its repr, and so a log or a traceback, shows none of its values."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


class DeliveryState(StrEnum):
    """Where one event stands for one webhook."""

    PENDING = "pending"  # known, not attempted yet: queued, spilled, or held by a pause
    IN_FLIGHT = "in_flight"  # a request is out
    RETRYING = "retrying"  # failed at least once, another attempt is due
    DELIVERED = "delivered"
    EXHAUSTED = "exhausted"  # every attempt of the schedule failed
    DISCARDED = "discarded"  # will never be sent, and the reason is on record


SETTLED: Final = frozenset({DeliveryState.DELIVERED, DeliveryState.EXHAUSTED, DeliveryState.DISCARDED})


class EndpointStatus(StrEnum):
    """What a webhook does with new events."""

    ACTIVE = "active"
    PAUSED = "paused"  # holds its events
    DISABLED = "disabled"  # receives none; `disabled_reason` says why


class BodyStyle(StrEnum):
    """Which serialiser's fixed point the body is: no body can be both."""

    COMPACT = "compact"  # JSON.stringify(JSON.parse(body)) == body
    PYTHON = "python"  # json.dumps(json.loads(body)) == body


class Result(StrEnum):
    """What one request came to: the label of `dispatcher_attempts_total`."""

    OK = "2xx"
    REDIRECT = "3xx"
    CLIENT_ERROR = "4xx"
    SERVER_ERROR = "5xx"
    TIMEOUT = "timeout"
    CONNECT = "connect"
    TLS = "tls"
    DNS = "dns"
    BLOCKED = "blocked"  # the address guard refused
    PROTOCOL = "protocol"  # what came back is not HTTP, or breaks a bound


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One webhook as the engine sees it: everything a delivery needs, with defaults already filled in."""

    id: EndpointId
    public_id: str  # wh_…
    account_id: AccountId
    account: str  # its name, as the outbox spells it
    url: str
    events: tuple[str, ...]
    status: EndpointStatus
    secret: str | None = dataclasses.field(default=None, repr=False)
    previous_secret: str | None = dataclasses.field(default=None, repr=False)  # signs too until it expires
    previous_secret_expires_at: datetime | None = None
    headers: tuple[tuple[str, str], ...] = dataclasses.field(default=(), repr=False)  # customers put tokens into them
    body_style: BodyStyle = BodyStyle.COMPACT
    schedule_s: tuple[float, ...] = (60.0, 600.0, 3600.0)  # delays before each retry
    max_concurrency: int = 16
    rate_limit: float | None = None  # first bytes per second
    ordered: bool = False
    timeout_s: float = 30.0
    created_snapshot: tuple[int, int, tuple[int, ...]] = (0, 0, ())  # xmin, xmax, in progress: what had ended before it


DeliveryKey = tuple[int, int, int]
"""(endpoint id, event sequence, generation): names a delivery inside the database, in the order of its primary key.

Generation 0 is the original delivery of an event; retries by hand and replays count up from 1.
"""


def new_id(prefix: str, unix_s: float, random_bytes: bytes) -> str:
    """Return `prefix` and a UUIDv7 of this moment in hexadecimal; needs 10 random bytes.

    Sortable by time, 74 random bits (RFC 9562). Hexadecimal and not base 32, because PostgreSQL makes the same ones
    for events in a column default and would spell base 32 out a character at a time in every producer's INSERT.
    """
    assert len(random_bytes) == 10, "a UUIDv7 takes 74 random bits"
    noise = int.from_bytes(random_bytes, "big")
    low = (noise & ((1 << 62) - 1)) | (0b10 << 62)
    high = (int(unix_s * 1000) & ((1 << 48) - 1)) << 16 | 0x7000 | (noise >> 62 & 0xFFF)
    return f"{prefix}{high << 64 | low:032x}"


@dataclasses.dataclass(frozen=True, slots=True)
class Holdings:
    """The daemons of a database and the shards they hold, as the database shows it at one moment.

    `members` are the ids of the daemons that take part. `holders` has the shards whose lease is held, each with the
    member that holds it; None where that is unknown (a daemon of an older release).
    """

    count: int  # of shards
    members: Set[int]
    holders: Mapping[int, int | None]
