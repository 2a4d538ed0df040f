from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from msgspec import UNSET

from dispatcher.core.backoff import PRESETS
from dispatcher.errors import ConfigurationError
from dispatcher.model import BodyStyle, EndpointStatus
from dispatcher.store.accounts import AccountStore
from dispatcher.store.database import open_pool
from dispatcher.store.endpoints import EndpointChange, EndpointDefaults, EndpointHealth, EndpointRecord, EndpointStore
from dispatcher.store.vault import Vault

DEFAULTS = EndpointDefaults(schedule_s=(7.0,), schedules=PRESETS, max_concurrency=8, timeout_s=12.0)
PLAIN = EndpointChange(
    url="https://example.com/",
    description="",
    events=["*"],
    headers={},
    body_style=BodyStyle.COMPACT,
    retry=None,
    max_concurrency=None,
    rate_limit=None,
    ordered=False,
    timeout_s=None,
)
FULL = EndpointChange(
    url="https://example.com/full",
    description="ünïcode\n",
    events=["email.*", "a.b"],
    headers={"X-Tenant": "7"},
    body_style=BodyStyle.PYTHON,
    retry=[1.0, 2.5],
    max_concurrency=3,
    rate_limit=0.5,
    ordered=True,
    timeout_s=4.5,
)
NOW = datetime(2025, 1, 15, tzinfo=UTC)


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Any]:
    pool = await open_pool(database, size=2)
    yield pool
    await pool.close()


@pytest.fixture
def endpoints(pool: Any) -> EndpointStore:
    return EndpointStore(pool, Vault(b"k" * 32))


@pytest.fixture
async def account(pool: Any) -> int:
    owner = await AccountStore(pool).find_key((await AccountStore(pool).create_key("acme"))[1])
    assert owner is not None
    return owner.account_id


def settings(record: EndpointRecord) -> EndpointChange:
    return msgspec.convert(record, EndpointChange, from_attributes=True)


@pytest.mark.parametrize("change", [PLAIN, FULL])
async def test_what_is_created_reads_back(endpoints: EndpointStore, account: int, change: EndpointChange) -> None:
    made = await endpoints.create(account, change, "secret")
    assert settings(made) == change
    assert (made.status, made.signed, made.version) == (EndpointStatus.ACTIVE, True, 1)
    assert await endpoints.get(account, made.id) == made
    assert await endpoints.list(account, limit=10) == [made]


async def test_the_registry_fills_defaults_in(endpoints: EndpointStore, account: int) -> None:
    await endpoints.create(account, PLAIN, None)
    await endpoints.create(account, FULL, "secret")
    await endpoints.create(account, msgspec.structs.replace(PLAIN, retry="standard"), None)
    found, _ = await endpoints.registry(DEFAULTS)
    plain, full, standard = sorted(found, key=lambda endpoint: endpoint.id)
    assert (plain.schedule_s, plain.max_concurrency, plain.timeout_s, plain.secret) == ((7.0,), 8, 12.0, None)
    assert (full.schedule_s, full.max_concurrency, full.timeout_s, full.secret) == ((1.0, 2.5), 3, 4.5, "secret")
    assert (full.account, full.headers, full.rate_limit) == ("acme", (("X-Tenant", "7"),), 0.5)
    assert (full.events, full.body_style, full.ordered) == (("email.*", "a.b"), BodyStyle.PYTHON, True)
    assert standard.schedule_s == PRESETS["standard"]


async def test_an_empty_registry_has_a_version(endpoints: EndpointStore) -> None:
    assert await endpoints.registry(DEFAULTS) == ([], 1)


async def test_the_registrys_version_moves_with_every_change(endpoints: EndpointStore, account: int) -> None:
    versions = [(await endpoints.registry(DEFAULTS))[1]]
    made = await endpoints.create(account, PLAIN, None)
    versions.append((await endpoints.registry(DEFAULTS))[1])
    await endpoints.update(account, made.id, FULL, secret=UNSET, version=1)
    versions.append((await endpoints.registry(DEFAULTS))[1])
    await endpoints.pause(account, made.id, version=2)
    versions.append((await endpoints.registry(DEFAULTS))[1])
    await endpoints.delete(account, made.id, version=3)
    versions.append((await endpoints.registry(DEFAULTS))[1])
    assert versions == sorted(set(versions))


async def test_the_secret_is_sealed_and_bound_to_its_webhook(endpoints: EndpointStore, account: int, pool: Any) -> None:
    one, other = [await endpoints.create(account, PLAIN, secret) for secret in ("first secret", "second secret")]
    sealed = await pool.fetchval("SELECT secret FROM dispatcher.endpoint WHERE public_id = $1", one.id)
    assert b"secret" not in sealed
    await pool.execute("UPDATE dispatcher.endpoint SET secret = $1 WHERE public_id = $2", sealed, other.id)
    with pytest.raises(ConfigurationError, match="sealed with another key"):
        await endpoints.secret(account, other.id)


async def test_an_update_leaves_the_secret_unless_one_is_given(endpoints: EndpointStore, account: int) -> None:
    made = await endpoints.create(account, PLAIN, "old")
    for version, (given, expected) in enumerate([(UNSET, "old"), ("new", "new"), (UNSET, "new"), (None, None)], 1):
        changed = await endpoints.update(account, made.id, FULL, secret=given, version=version)
        assert changed is not None
        assert (settings(changed), changed.version) == (FULL, version + 1)
        found = await endpoints.secret(account, made.id)
        assert found is not None
        assert found.current == expected


async def test_a_given_secret_ends_a_rotation_and_another_change_does_not(
    endpoints: EndpointStore, account: int, pool: Any
) -> None:
    made = await endpoints.create(account, PLAIN, "old")
    await pool.execute(
        "UPDATE dispatcher.endpoint SET previous_secret = secret, previous_secret_expires_at = 'infinity'"
    )
    previous = "SELECT previous_secret IS NOT NULL, previous_secret_expires_at IS NOT NULL FROM dispatcher.endpoint"
    await endpoints.update(account, made.id, FULL, secret=UNSET, version=1)
    assert tuple(await pool.fetchrow(previous)) == (True, True)
    await endpoints.update(account, made.id, FULL, secret="new", version=2)
    assert tuple(await pool.fetchrow(previous)) == (False, False)


async def test_no_change_without_its_version(endpoints: EndpointStore, account: int) -> None:
    made = await endpoints.create(account, PLAIN, None)
    assert await endpoints.update(account, made.id, FULL, secret=UNSET, version=2) is None
    assert await endpoints.pause(account, made.id, version=2) is None
    assert await endpoints.resume(account, made.id, version=2) is None
    assert await endpoints.delete(account, made.id, version=2) is False
    assert await endpoints.get(account, made.id) == made


async def test_another_account_neither_sees_nor_changes_it(endpoints: EndpointStore, account: int) -> None:
    made = await endpoints.create(account, PLAIN, "secret")
    assert await endpoints.get(account + 1, made.id) is None
    assert await endpoints.secret(account + 1, made.id) is None
    assert await endpoints.list(account + 1, limit=10) == []
    assert await endpoints.update(account + 1, made.id, FULL, secret=UNSET, version=1) is None
    assert await endpoints.pause(account + 1, made.id, version=1) is None
    assert await endpoints.delete(account + 1, made.id, version=1) is False
    assert await endpoints.get(account, made.id) == made


async def test_pausing_is_for_active_and_resuming_for_the_others(endpoints: EndpointStore, account: int) -> None:
    made = await endpoints.create(account, PLAIN, None)
    assert await endpoints.resume(account, made.id, version=1) is None
    paused = await endpoints.pause(account, made.id, version=1)
    assert paused is not None
    assert paused.status is EndpointStatus.PAUSED
    assert await endpoints.pause(account, made.id, version=2) is None
    resumed = await endpoints.resume(account, made.id, version=2)
    assert resumed is not None
    assert (resumed.status, resumed.version) == (EndpointStatus.ACTIVE, 3)


async def test_changes_show_what_was_learnt_until_it_is_resumed(
    endpoints: EndpointStore, account: int, pool: Any
) -> None:
    made = await endpoints.create(account, PLAIN, None)
    number = await pool.fetchval("SELECT id FROM dispatcher.endpoint")
    await endpoints.learn({}, [EndpointHealth(number, NOW, None, "503")])
    changed = await endpoints.update(account, made.id, FULL, secret=UNSET, version=1)
    paused = await endpoints.pause(account, made.id, version=2)
    resumed = await endpoints.resume(account, made.id, version=3)
    shown = [(r.failing_since, r.last_error) for r in (changed, paused, resumed) if r is not None]
    assert shown == [(NOW, "503"), (NOW, "503"), (None, None)]
    assert await endpoints.health() == {}


async def test_disabling_keeps_the_reason_and_happens_once(endpoints: EndpointStore, account: int, pool: Any) -> None:
    made = await endpoints.create(account, PLAIN, None)
    number = await pool.fetchval("SELECT id FROM dispatcher.endpoint")
    await endpoints.learn({number: "first"}, [])
    await endpoints.learn({number: "second"}, [])
    disabled = await endpoints.get(account, made.id)
    assert disabled is not None
    assert (disabled.status, disabled.disabled_reason, disabled.version) == (EndpointStatus.DISABLED, "first", 2)


async def test_pages_go_both_ways(endpoints: EndpointStore, account: int) -> None:
    for _ in range(4):
        await endpoints.create(account, PLAIN, None)
    every = [record.id for record in await endpoints.list(account, limit=10)]
    assert every == sorted(every, reverse=True)

    async def ids(**where: Any) -> list[str]:
        return [record.id for record in await endpoints.list(account, **where)]

    assert await ids(limit=2, after=every[1]) == every[2:]
    assert await ids(limit=2, before=every[3]) == every[1:3]
    assert await ids(limit=2, before=every[0]) == []
