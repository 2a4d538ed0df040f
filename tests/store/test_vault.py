"""Secrets at rest, and the key they are sealed with being replaced under running daemons."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import asyncpg
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.errors import ConfigurationError
from dispatcher.model import BodyStyle
from dispatcher.store import resealing
from dispatcher.store.accounts import AccountStore
from dispatcher.store.database import open_pool
from dispatcher.store.endpoints import EndpointChange, EndpointStore
from dispatcher.store.resealing import reseal
from dispatcher.store.vault import Vault, new_key

OLD, NEW, STRANGE = (letter * 32 for letter in (b"o", b"n", b"s"))
HOUR = timedelta(hours=1)
CHANGE = EndpointChange(
    url="https://example.com/", description="", events=["*"], headers={}, body_style=BodyStyle.COMPACT, retry=None,
    max_concurrency=None, rate_limit=None, ordered=False, timeout_s=None,
)  # fmt: skip


@given(st.text(max_size=300), st.text(max_size=40))
def test_what_is_sealed_opens_for_its_owner_and_for_nobody_else(secret: str, owner: str) -> None:
    secret = secret.encode("utf-8", "replace").decode()
    owner = owner.encode("utf-8", "replace").decode()
    vault = Vault(OLD)
    sealed = vault.seal(secret, owner)
    assert sealed is not None
    assert vault.open(sealed, owner) == secret
    with pytest.raises(ConfigurationError):
        vault.open(sealed, owner + "x")
    with pytest.raises(ConfigurationError):
        Vault(NEW).open(sealed, owner)


@given(st.integers(0, 60), st.integers(1, 255))
def test_a_changed_byte_opens_nothing(place: int, change: int) -> None:
    sealed = bytearray(Vault(OLD).seal("whsec_" + "a" * 32, "wh_1") or b"")
    sealed[place % len(sealed)] ^= change
    with pytest.raises(ConfigurationError, match="wh_1"):
        Vault(OLD).open(bytes(sealed), "wh_1")


@pytest.mark.parametrize("sealed", [b"", b"x", b"x" * 12, b"x" * 27])
def test_what_was_never_sealed_is_refused(sealed: bytes) -> None:
    with pytest.raises(ConfigurationError):
        Vault(OLD).open(sealed, "wh_1")


def test_the_same_secret_never_looks_the_same() -> None:
    vault = Vault(OLD)
    assert len({vault.seal("a secret", "wh_1") for _ in range(100)}) == 100
    assert vault.seal(None, "wh_1") is None
    assert vault.open(None, "wh_1") is None


def test_a_vault_opens_with_every_key_it_knows_and_seals_with_the_first() -> None:
    sealed = Vault(OLD).seal("a secret", "wh_1")
    both = Vault(NEW, [STRANGE, OLD])
    assert both.open(sealed, "wh_1") == "a secret"
    renewed = both.renew(sealed, "wh_1")
    assert Vault(NEW).open(renewed, "wh_1") == "a secret"
    assert both.renew(renewed, "wh_1") is renewed
    assert both.renew(None, "wh_1") is None
    assert both.fingerprint == Vault(NEW).fingerprint
    assert both.fingerprints == {Vault(key).fingerprint for key in (NEW, STRANGE, OLD)}


def test_a_vault_shows_neither_keys_nor_secrets() -> None:
    key = new_key()
    vault = Vault(key, [OLD])
    for text in (repr(vault), str(vault), vault.fingerprint, *vault.fingerprints):
        for shown in (key.hex(), repr(key)[2:-1], base64.b64encode(key).decode(), OLD.hex()):
            assert shown not in text


@pytest.mark.parametrize("length", [0, 16, 31, 33, 64])
def test_a_key_of_another_length_is_refused(length: int) -> None:
    for keys in ((b"k" * length,), (OLD, [b"k" * length])):
        with pytest.raises(ConfigurationError, match="32 bytes"):
            Vault(*keys)  # type: ignore[arg-type]


# ── replacing the key ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Any]:
    pool = await open_pool(database, size=4)
    yield pool
    await pool.close()


@pytest.fixture
async def account(pool: asyncpg.Pool) -> int:
    return int(await pool.fetchval("SELECT id FROM dispatcher.account WHERE name = 'default'"))


async def furnish(pool: asyncpg.Pool, account: int, count: int) -> list[str]:
    """Webhooks with secrets sealed by the old key: plain, unsigned, and in the middle of a rotation."""
    store, ids = EndpointStore(pool, Vault(OLD)), []
    for number in range(count):
        record = await store.create(account, CHANGE, None if number % 3 == 1 else f"secret {number}")
        if number % 3 == 2:
            await store.rotate(account, record.id, f"newer {number}", HOUR, version=record.version)
        ids.append(record.id)
    return ids


async def contents(pool: asyncpg.Pool, vault: Vault) -> list[tuple[str | None, str | None]]:
    rows = await pool.fetch("SELECT public_id, secret, previous_secret FROM dispatcher.endpoint ORDER BY id")
    return [(vault.open(row[1], row[0]), vault.open(row[2], row[0])) for row in rows]


async def test_every_secret_is_sealed_anew_and_says_the_same(
    pool: asyncpg.Pool, account: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resealing, "ROWS_MAX", 4)
    await furnish(pool, account, 21)
    versions = await pool.fetch("SELECT public_id, version, updated_at FROM dispatcher.endpoint ORDER BY id")
    before = await contents(pool, Vault(OLD))
    assert await reseal(pool, Vault(NEW, [OLD])) == 14
    assert await contents(pool, Vault(NEW)) == before
    with pytest.raises(ConfigurationError):
        await contents(pool, Vault(OLD))
    assert await pool.fetch("SELECT public_id, version, updated_at FROM dispatcher.endpoint ORDER BY id") == versions
    fingerprint = "SELECT value FROM dispatcher.setting WHERE key = 'key_fingerprint'"
    assert await pool.fetchval(fingerprint) == Vault(NEW).fingerprint
    assert await reseal(pool, Vault(NEW, [OLD])) == 0


async def test_a_secret_changed_meanwhile_is_kept_and_sealed_in_the_next_pass(pool: asyncpg.Pool, account: int) -> None:
    """A daemon that still seals with the old key changes one between our look at it and our word about it."""
    ids = await furnish(pool, account, 3)
    old = EndpointStore(pool, Vault(OLD))

    class Between:
        """Hands over to the pool, and lets the other change come first, once."""

        meddled = False

        async def fetch(self, statement: str, *arguments: Any) -> Any:
            if "UPDATE dispatcher.endpoint" in statement and not self.meddled:
                self.meddled = True
                await old.update(account, ids[0], CHANGE, secret="changed meanwhile", version=1)
            return await pool.fetch(statement, *arguments)

        async def execute(self, statement: str, *arguments: Any) -> Any:
            return await pool.execute(statement, *arguments)

    assert await reseal(Between(), Vault(NEW, [OLD])) == 2
    assert (await contents(pool, Vault(NEW)))[0] == ("changed meanwhile", None)


async def test_a_secret_that_no_key_opens_stops_it_before_the_database_changes_hands(
    pool: asyncpg.Pool, account: int
) -> None:
    ids = await furnish(pool, account, 4)
    await pool.execute(
        "UPDATE dispatcher.endpoint SET secret = $1 WHERE public_id = $2", Vault(STRANGE).seal("?", ids[3]), ids[3]
    )
    with pytest.raises(ConfigurationError, match=ids[3]):
        await reseal(pool, Vault(NEW, [OLD]))
    assert await pool.fetchval("SELECT count(*) FROM dispatcher.setting WHERE key = 'key_fingerprint'") == 0
    await pool.execute("DELETE FROM dispatcher.endpoint WHERE public_id = $1", ids[3])
    assert len(await contents(pool, Vault(NEW, [OLD]))) == 3


# ── at rest ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_no_table_holds_a_secret_that_can_be_read(pool: asyncpg.Pool, account: int) -> None:
    """All of them, by whatever columns they have or will have."""
    secret = "whsec_" + base64.b64encode(b"a secret that must not be read..").decode()
    store = EndpointStore(pool, Vault(OLD))
    record = await store.create(account, CHANGE, secret)
    await store.rotate(account, record.id, secret[::-1], HOUR, version=record.version)
    _, key = await AccountStore(pool).create_key("acme")
    tables = await pool.fetch(
        "SELECT oid::regclass::text AS name FROM pg_class"
        " WHERE relnamespace = 'dispatcher'::regnamespace AND relkind IN ('r', 'p', 'm')"
    )
    assert {"dispatcher.endpoint", "dispatcher.api_key", "dispatcher.setting"} <= {row["name"] for row in tables}
    rows = [row for table in tables for row in await pool.fetch(f"SELECT t::text FROM {table['name']} t")]
    dump = "\n".join(row[0] for row in rows).lower()
    assert record.id in dump
    for plain in (secret, secret[::-1], base64.b64decode(secret[6:]).decode(), key, key[8:], OLD.decode()):
        for spelled in (plain, plain.encode().hex(), base64.b64encode(plain.encode()).decode()):
            assert spelled.lower() not in dump


async def test_a_webhooks_own_headers_and_the_events_stand_there_as_they_are(pool: asyncpg.Pool, account: int) -> None:
    """What SECURITY.md says of them: whoever can read the database can read these."""
    change = msgspec.structs.replace(CHANGE, headers={"Authorization": "Bearer of bad news"})
    await EndpointStore(pool, Vault(OLD)).create(account, change, None)
    await pool.execute("""INSERT INTO dispatcher.outbox (type, data) VALUES ('a.b', '{"a": "plain"}')""")
    assert "Bearer of bad news" in await pool.fetchval("SELECT headers::text FROM dispatcher.endpoint")
    assert "plain" in await pool.fetchval("SELECT data::text FROM dispatcher.outbox")
