from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dispatcher.store.accounts import AccountStore
from dispatcher.store.database import open_pool


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Any]:
    pool = await open_pool(database, size=4)
    yield pool
    await pool.close()


@pytest.fixture
def accounts(pool: Any) -> AccountStore:
    return AccountStore(pool)


async def test_a_key_is_found_by_its_text_and_kept_as_a_hash(accounts: AccountStore, pool: Any) -> None:
    record, key = await accounts.create_key("acme")
    owner = await accounts.find_key(key)
    assert owner is not None
    assert (owner.key_id, owner.account, owner.mode) == (record.id, "acme", "live")
    row = await pool.fetchrow("SELECT * FROM dispatcher.api_key")
    assert row["hash"] == hashlib.sha256(key.encode()).digest()
    assert key not in repr(dict(row))


async def test_a_key_tells_brand_and_mode_and_is_otherwise_random(accounts: AccountStore, pool: Any) -> None:
    keys = {mode: (await accounts.create_key("acme", mode))[1] for mode in ("live", "test")}
    assert all(re.fullmatch(rf"tp_{mode}_[A-Za-z0-9]{{33}}", key) for mode, key in keys.items())
    assert keys["live"][-33:] != keys["test"][-33:]
    record, key = await AccountStore(pool, "acme_").create_key("acme")
    assert key.startswith("acme_live_")
    assert record.hint == key[-4:]


async def test_a_key_outlives_a_change_of_brand(accounts: AccountStore, pool: Any) -> None:
    _, key = await accounts.create_key("acme")
    assert await AccountStore(pool, "other_").find_key(key) is not None


@pytest.mark.parametrize("key", ["", "short", "tp_live_" + "x" * 33, "tp_live_\x00" + "x" * 33, "ü" * 40, "x" * 10_000])
async def test_what_is_no_key_is_nobodys(accounts: AccountStore, key: str) -> None:
    assert await accounts.find_key(key) is None


async def test_a_revoked_key_is_nobodys_and_stays_listed(accounts: AccountStore) -> None:
    record, key = await accounts.create_key("acme")
    _, other = await accounts.create_key("acme")
    revoked = await accounts.revoke_key(record.id)
    assert revoked is not None
    assert revoked.revoked_at is not None
    assert await accounts.find_key(key) is None
    assert await accounts.find_key(other) is not None
    assert [listed.revoked_at is None for listed in await accounts.list_keys()] == [False, True]


async def test_revoking_twice_keeps_the_first_moment(accounts: AccountStore) -> None:
    record, _ = await accounts.create_key("acme")
    assert await accounts.revoke_key(record.id) == await accounts.revoke_key(record.id)
    assert await accounts.revoke_key("key_unknown") is None


async def test_keys_are_listed_oldest_first_in_pages(accounts: AccountStore) -> None:
    made = [(await accounts.create_key(f"a{n}"))[0] for n in range(3)]
    first = await accounts.list_keys(limit=2)
    assert first + await accounts.list_keys(limit=2, after=first[-1].id) == sorted(made, key=lambda key: key.id)


async def test_an_account_is_made_once_even_by_many_at_once(accounts: AccountStore, pool: Any) -> None:
    made = await asyncio.gather(*(accounts.create_key("new") for _ in range(8)))
    assert {record.account for record, _ in made} == {"new"}
    assert await pool.fetchval("SELECT count(*) FROM dispatcher.account WHERE name = 'new'") == 1


@pytest.mark.parametrize("name", ["", "-a", ".a", "a b", "a/b", "ü", "x" * 65, "a\x00", "a\n"])
async def test_a_name_that_is_none_is_refused_before_anything_is_made(accounts: AccountStore, name: str) -> None:
    with pytest.raises(ValueError, match="an account's name is 1 to 64 letters"):
        await accounts.create_key(name)
    assert await accounts.list_keys() == []


@pytest.mark.parametrize("name", ["a", "0", "Acme_1.eu-west", "x" * 64])
async def test_a_name_that_is_accepted_here_is_accepted_by_the_table(accounts: AccountStore, name: str) -> None:
    assert (await accounts.create_key(name))[0].account == name
