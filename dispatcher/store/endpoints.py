"""Webhooks: the rows behind the API, and the registry the engine routes by."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec
from msgspec import UnsetType

from dispatcher.model import AccountId, BodyStyle, Discreet, Endpoint, EndpointId, EndpointStatus, new_id
from dispatcher.store.database import statements
from dispatcher.store.vault import Vault

ID_PREFIX: Final = "wh_"


@dataclasses.dataclass(frozen=True, slots=True)
class EndpointDefaults:
    """What a webhook that does not say otherwise gets; from the configuration."""

    schedule_s: tuple[float, ...]
    schedules: Mapping[str, tuple[float, ...]]  # presets by name
    max_concurrency: int
    timeout_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class EndpointHealth:
    """What the engine has learnt: only failures since, the first exhausted delivery since the last success, why."""

    endpoint_id: int
    failing_since: datetime | None
    exhausted_at: datetime | None
    last_error: str | None


class EndpointRecord(Discreet, msgspec.Struct, frozen=True, kw_only=True):
    """A webhook as its owner set it: None means the configured default. The secret is not here."""

    id: str
    url: str
    description: str
    events: list[str]
    status: EndpointStatus
    disabled_reason: str | None
    headers: dict[str, str]
    body_style: BodyStyle
    retry: str | list[float] | None
    max_concurrency: int | None
    rate_limit: float | None
    ordered: bool
    timeout_s: float | None
    signed: bool
    version: int
    created_at: datetime
    updated_at: datetime
    previous_secret_expires_at: datetime | None = None  # a rotation under way: until then the old secret signs too
    failing_since: datetime | None = None
    last_error: str | None = None


class EndpointChange(Discreet, msgspec.Struct, frozen=True, kw_only=True):
    """Every setting of a webhook, to be written as a whole."""

    url: str
    description: str
    events: list[str]
    headers: dict[str, str]
    body_style: BodyStyle
    retry: str | list[float] | None
    max_concurrency: int | None
    rate_limit: float | None
    ordered: bool
    timeout_s: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class EndpointSecret:
    """A webhook's signing secret; None: it is unsigned. Its repr shows nothing."""

    current: str | None = dataclasses.field(repr=False)


class EndpointStore:
    """All that touches the endpoint table. `db` is a pool or a connection of asyncpg."""

    def __init__(self, db: Any, vault: Vault) -> None:
        self._db = db
        self._vault = vault
        self._sql = statements("endpoint")

    # -- for the engine

    async def registry(self, defaults: EndpointDefaults) -> tuple[list[Endpoint], int]:
        """Every webhook with defaults filled in, and the registry's version they belong to."""
        rows = await self._db.fetch(self._sql["registry"])
        return [self._endpoint(row, defaults) for row in rows if row["id"] is not None], rows[0]["registry_version"]

    def _endpoint(self, row: Any, defaults: EndpointDefaults) -> Endpoint:
        owner = row["public_id"]
        return Endpoint(
            id=EndpointId(row["id"]),
            public_id=owner,
            account_id=AccountId(row["account_id"]),
            account=row["account"],
            url=row["url"],
            events=tuple(row["events"]),
            status=EndpointStatus(row["status"]),
            secret=self._vault.open(row["secret"], owner),
            previous_secret=self._vault.open(row["previous_secret"], owner),
            previous_secret_expires_at=row["previous_secret_expires_at"],
            headers=tuple(msgspec.json.decode(row["headers"], type=dict[str, str]).items()),
            body_style=BodyStyle(row["body_style"]),
            schedule_s=_schedule(row["retry"], defaults),
            max_concurrency=min(row["max_concurrency"] or defaults.max_concurrency, defaults.max_concurrency),
            rate_limit=row["rate_limit"],
            ordered=row["ordered"],
            timeout_s=row["timeout_s"] or defaults.timeout_s,
            created_snapshot=row["created_snapshot"],
        )

    async def health(self) -> dict[int, EndpointHealth]:
        """What was learnt before."""
        return {row[0]: EndpointHealth(*row) for row in await self._db.fetch(self._sql["health"])}

    async def learn(self, disabled: Mapping[int, str], health: Iterable[EndpointHealth]) -> None:
        """Write down what deliveries have shown: webhooks to disable with the reason, and how others fare."""
        if disabled:
            await self._db.execute(self._sql["disable"], list(disabled), list(disabled.values()))
        rows = [(h.endpoint_id, h.failing_since, h.exhausted_at, h.last_error) for h in health]
        if rows:
            await self._db.execute(self._sql["learn"], *zip(*rows, strict=True))

    # -- for their owners

    async def create(self, account_id: int, change: EndpointChange, secret: str | None) -> EndpointRecord:
        """Register a webhook."""
        public_id = new_id(ID_PREFIX, time.time(), secrets.token_bytes(10))
        row = await self._db.fetchrow(
            self._sql["create"], public_id, account_id, change.url, change.description, change.events,
            self._vault.seal(secret, public_id), *_settings(change),
        )  # fmt: skip
        return _record(row)

    async def get(self, account_id: int, public_id: str) -> EndpointRecord | None:
        """One webhook of an account; None if it has no such."""
        row = await self._db.fetchrow(self._sql["get"], account_id, public_id)
        return None if row is None else _record(row)

    async def secret(self, account_id: int, public_id: str) -> EndpointSecret | None:
        """What a webhook's requests are signed with, in clear, for its owner; None if there is no such webhook."""
        row = await self._db.fetchrow(self._sql["get"], account_id, public_id)
        return None if row is None else EndpointSecret(self._vault.open(row["secret"], public_id))

    async def endpoint(self, account_id: int, public_id: str, defaults: EndpointDefaults) -> Endpoint | None:
        """One webhook of an account as the engine sees it, secrets included; None if it has no such."""
        row = await self._db.fetchrow(self._sql["endpoint"], account_id, public_id)
        return None if row is None else self._endpoint(row, defaults)

    async def list(
        self, account_id: int, *, limit: int, after: str | None = None, before: str | None = None
    ) -> list[EndpointRecord]:
        """Newest first: those older than `after`, or the nearest ones newer than `before`; `limit` at most."""
        if before is not None:
            rows = await self._db.fetch(self._sql["list_before"], account_id, before, limit)
            return [_record(row) for row in reversed(rows)]
        rows = await self._db.fetch(self._sql["list_after"], account_id, after or "~", limit)
        return [_record(row) for row in rows]

    async def update(
        self, account_id: int, public_id: str, change: EndpointChange, *, secret: str | UnsetType | None, version: int
    ) -> EndpointRecord | None:
        """Write every setting, and the secret unless it is UNSET; None if it is gone or no longer in that version."""
        is_given = not isinstance(secret, UnsetType)
        sealed = None if isinstance(secret, UnsetType) else self._vault.seal(secret, public_id)
        row = await self._db.fetchrow(
            self._sql["update"], account_id, public_id, change.url, change.description, change.events,
            sealed, *_settings(change), is_given, version,
        )  # fmt: skip
        return None if row is None else _record(row)

    async def rotate(
        self, account_id: int, public_id: str, secret: str, grace: timedelta, *, version: int
    ) -> EndpointRecord | None:
        """Sign with `secret` from now on, and for a while with the one it replaces as well.

        None if the webhook is gone or no longer in that version.
        """
        sealed = self._vault.seal(secret, public_id)
        row = await self._db.fetchrow(self._sql["rotate"], account_id, public_id, sealed, grace, version)
        return None if row is None else _record(row)

    async def pause(self, account_id: int, public_id: str, *, version: int) -> EndpointRecord | None:
        """Hold its events from now on; None if it is not active, or no longer in that version."""
        row = await self._db.fetchrow(self._sql["pause"], account_id, public_id, version)
        return None if row is None else _record(row)

    async def resume(self, account_id: int, public_id: str, *, version: int) -> EndpointRecord | None:
        """Active again; None if it is neither paused nor disabled, or no longer in that version.

        What was learnt of its failures is forgotten.
        """
        row = await self._db.fetchrow(self._sql["resume"], account_id, public_id, version)
        return None if row is None else _record(row)

    async def delete(self, account_id: int, public_id: str, *, version: int) -> bool:
        """Remove a webhook, in that version. Its waiting deliveries go in steps, in the background."""
        return await self._db.fetchval(self._sql["delete"], account_id, public_id, version) is not None


def _schedule(raw: str | None, defaults: EndpointDefaults) -> tuple[float, ...]:
    if raw is None:
        return defaults.schedule_s
    value = msgspec.json.decode(raw, type=str | list[float])
    return defaults.schedules[value] if isinstance(value, str) else tuple(value)


def _still_to_come(at: datetime | None) -> datetime | None:
    # asyncpg spells infinity without a zone, and no call of ours writes it.
    return at if at is not None and at.tzinfo is not None and at > datetime.now(UTC) else None


def _settings(change: EndpointChange) -> tuple[Any, ...]:
    return (
        msgspec.json.encode(change.headers).decode(),
        change.body_style.value,
        None if change.retry is None else msgspec.json.encode(change.retry).decode(),
        change.max_concurrency,
        change.rate_limit,
        change.ordered,
        change.timeout_s,
    )


def _record(row: Any) -> EndpointRecord:
    return EndpointRecord(
        id=row["public_id"],
        url=row["url"],
        description=row["description"],
        events=list(row["events"]),
        status=EndpointStatus(row["status"]),
        disabled_reason=row["disabled_reason"],
        headers=msgspec.json.decode(row["headers"], type=dict[str, str]),
        body_style=BodyStyle(row["body_style"]),
        retry=None if row["retry"] is None else msgspec.json.decode(row["retry"], type=str | list[float]),
        max_concurrency=row["max_concurrency"],
        rate_limit=row["rate_limit"],
        ordered=row["ordered"],
        timeout_s=row["timeout_s"],
        signed=row["secret"] is not None,
        version=row["version"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        previous_secret_expires_at=_still_to_come(row["previous_secret_expires_at"]),
        failing_since=row["failing_since"],
        last_error=row["last_error"],
    )
