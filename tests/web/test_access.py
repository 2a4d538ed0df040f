"""Every call of the API × whoever has no business making it.

The calls are those of the description, so a new one is in here from its first day.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import hmac
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from aiohttp.test_utils import TestClient, TestServer

import dispatcher
from dispatcher.core.attempt import Attempt
from dispatcher.core.catalogue import Catalogue
from dispatcher.core.ids import DeliveryIds
from dispatcher.core.signing import Signer
from dispatcher.model import Result
from dispatcher.store.accounts import AccountStore
from dispatcher.store.database import statements
from dispatcher.store.deliveries import DeliveryStore
from dispatcher.store.replays import ReplayStore
from dispatcher.web.api import build_api_app
from dispatcher.web.auth import RateLimit
from dispatcher.web.openapi import describe
from dispatcher.web.parts import Log, Trial, Tried, Web

IDS = DeliveryIds(b"1" * 16)
OPEN = {"GET /v1/openapi.json"}  # tells nothing of anybody
ENDLESS = {"GET /v1/listen"}  # its own tests see that each hears but its own
BODIES: dict[str, Any] = {  # of calls whose description has no example
    "POST /v1/webhooks/{id}/rotate-secret": {},
    "POST /v1/webhooks/{id}/test": {},
    "POST /v1/webhooks/{id}/replay": {"since": "2025-01-01T00:00:00Z", "status": "all", "dry_run": True},
}
MARK = "acmes-own"  # in everything that is acme's


async def answered(_: Trial) -> Tried:
    return Tried(attempt=Attempt(Result.OK, status=200), fields=[], body=b"{}")


def operations() -> dict[str, dict[str, Any]]:
    nothing: Any = None
    log = Log(deliveries=nothing, replays=nothing, ids=IDS, send=answered)
    web = Web(
        accounts=nothing, endpoints=nothing, events=_Tails(), guard=nothing, catalogue=Catalogue.builtin(),
        defaults=nothing, snapshot=nothing, log=log,
    )  # fmt: skip
    paths = describe(build_api_app(web), web.catalogue)["paths"]
    return {f"{method.upper()} {path}": call for path, item in paths.items() for method, call in item.items()}


class _Tails:
    def tail(self) -> Any:
        return None


CALLS = operations()
GUARDED = sorted(set(CALLS) - OPEN)
OF_ONE = [call for call in GUARDED if "{" in call]
OF_MANY = [call for call in GUARDED if "{" not in call and call not in ENDLESS]


def test_all_calls_but_the_description_need_a_key() -> None:
    assert {call for call, said in CALLS.items() if said.get("security") == []} == OPEN
    assert len(GUARDED) >= 20


def body_of(call: str) -> Any:
    said = CALLS[call].get("requestBody")
    if said is None:
        return None
    example = said["content"]["application/json"].get("example", BODIES.get(call))
    assert example is not None, f"say in BODIES what {call} may be sent"
    return example


@dataclasses.dataclass
class Bystander:
    """An API with two accounts: acme has one of everything, rival nothing."""

    client: TestClient[Any, Any]
    pool: asyncpg.Pool
    keys: dict[str, str]  # by whose they are, or what is wrong with them
    ids: dict[str, str]  # by the segment that stands before them in a path

    async def ask(self, call: str, authorization: str | None, *, ids: dict[str, str] | None = None) -> Any:
        method, path = call.split(" ")
        for segment, name in re.findall(r"/([\w-]+)/\{(\w+)\}", path):
            path = path.replace(f"/{segment}/{{{name}}}", f"/{segment}/{(ids or self.ids)[segment]}")
        headers = {} if authorization is None else {"Authorization": authorization}
        async with self.client.request(method, path, headers=headers, json=body_of(call)) as answer:
            return answer.status, answer.headers, await answer.text()

    async def belongings(self) -> list[tuple[Any, ...]]:
        """All that stands in the tables a caller could touch."""
        tables = ("endpoint", "outbox", "attempt", "pending", "replay", "api_key", "account", "idempotency")
        return [
            tuple(row)
            for table in tables
            for row in await self.pool.fetch(f"SELECT t::text FROM dispatcher.{table} t ORDER BY 1")
        ]


@pytest.fixture
async def bystander(parts: Web, pool: asyncpg.Pool) -> AsyncIterator[Bystander]:
    log = Log(deliveries=DeliveryStore(pool), replays=ReplayStore(pool), ids=IDS, send=answered)
    parts = dataclasses.replace(parts, log=log, rate_limit=RateLimit(1e9, 10**9))
    keys = {name: (await parts.accounts.create_key(name))[1] for name in ("acme", "rival")}
    record, keys["revoked"] = await parts.accounts.create_key("acme")
    await parts.accounts.revoke_key(record.id)
    keys["wrong"] = keys["acme"][:-1] + ("a" if keys["acme"][-1] != "a" else "b")
    await pool.execute(
        f"""
        INSERT INTO dispatcher.endpoint (public_id, account_id, url, description, events)
            SELECT 'wh_acme', id, 'https://example.com/{MARK}', '{MARK}', '{{*}}'
            FROM dispatcher.account WHERE name = 'acme';
        INSERT INTO dispatcher.outbox (account, id, type, data)
            VALUES ('acme', 'evt_acme', 'email.sent', '{{"a": "{MARK}"}}');
        INSERT INTO dispatcher.attempt (at, event_seq, event_xid, endpoint_id, generation, attempt, state, result,
                                        status, duration_us, response_head, response_body)
            SELECT now(), o.seq, o.xid, e.id, 0, 1, 'exhausted', '5xx', 500, 1, 'HTTP/1.1 500 X', '{MARK}'
            FROM dispatcher.outbox o, dispatcher.endpoint e;
        INSERT INTO dispatcher.replay (id, endpoint_id, selection, since, until)
            SELECT 'rpl_acme', id, 'all', now() - interval '1 day', now() FROM dispatcher.endpoint;
        """
    )
    row = await pool.fetchrow("SELECT endpoint_id, event_seq FROM dispatcher.attempt")
    ids = {
        "webhooks": "wh_acme",
        "events": "evt_acme",
        "deliveries": IDS.id_of(row["endpoint_id"], row["event_seq"], 0),
        "replays": "rpl_acme",
    }
    async with TestClient(TestServer(build_api_app(parts))) as client:
        yield Bystander(client, pool, keys, ids)


@pytest.mark.parametrize("call", GUARDED)
async def test_without_a_key_that_is_valid_nothing_is_told_and_nothing_happens(bystander: Bystander, call: str) -> None:
    before, key = await bystander.belongings(), bystander.keys["acme"]
    presented = [
        None, "", "Bearer", "Bearer ", f"Basic {key}", key, f"Bearer {bystander.keys['wrong']}",
        f"Bearer {bystander.keys['revoked']}", f"Bearer {key}x", f"Bearer {key[:-1]}", f"Bearer {key.swapcase()}",
        f"Bearer {hashlib.sha256(key.encode()).hexdigest()}", "Bearer ' OR 1=1 --", f"Bearer {key},{key}",
    ]  # fmt: skip
    for authorization in presented:
        status, headers, text = await bystander.ask(call, authorization)
        assert (status, headers["Content-Type"]) == (401, "application/problem+json"), authorization
        assert headers["WWW-Authenticate"].startswith("Bearer")
        assert MARK not in text
        assert key not in text
    assert await bystander.belongings() == before


@pytest.mark.parametrize("call", OF_ONE)
async def test_what_is_another_accounts_is_as_if_it_were_not_there(bystander: Bystander, call: str) -> None:
    before, rival = await bystander.belongings(), f"Bearer {bystander.keys['rival']}"
    nowhere = {segment: id_[:4] + "0" * (len(id_) - 4) for segment, id_ in bystander.ids.items()}
    theirs, absent = [await bystander.ask(call, rival, ids=ids) for ids in (bystander.ids, nowhere)]
    assert theirs[0] == absent[0] == 404
    told = [{k: v for k, v in json.loads(text).items() if k != "request_id"} for _, _, text in (theirs, absent)]
    assert told[0] == told[1], "the answer tells what is there from what is not"
    assert await bystander.belongings() == before
    own = await bystander.ask(call, f"Bearer {bystander.keys['acme']}")
    assert own[0] in {200, 201, 202, 204, 409}, own  # so that the 404 above means what it says


@pytest.mark.parametrize("call", OF_MANY)
async def test_a_list_shows_nobody_elses(bystander: Bystander, call: str) -> None:
    status, _, text = await bystander.ask(call, f"Bearer {bystander.keys['rival']}")
    assert status in {200, 201}
    assert MARK not in text
    assert not any(id_ in text for id_ in bystander.ids.values())


async def test_a_list_shows_ones_own(bystander: Bystander) -> None:
    """So that the absence above means what it says."""
    for call in ("GET /v1/webhooks", "GET /v1/events"):
        _, _, text = await bystander.ask(call, f"Bearer {bystander.keys['acme']}")
        assert MARK in text


# ── comparison ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_key_is_looked_up_by_its_hash_and_by_nothing_else() -> None:
    """An index on hashes has no timing that guesses could climb, and no look-up carries the key."""
    asked: list[tuple[Any, ...]] = []

    class Spy:
        async def fetchrow(self, *arguments: Any) -> None:
            asked.append(arguments)

    key = "tp_live_" + "k" * 33
    await AccountStore(Spy()).find_key(key)
    assert asked == [(statements("account")["find_key"], hashlib.sha256(key.encode()).digest())]
    assert "hash = $1" in statements("account")["find_key"]


def test_signatures_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def note(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", note)
    signer = Signer("whsec_" + "a" * 32, "whsec_" + "b" * 32)
    assert not signer.verify_legacy(b"{}", "0" * 64)
    assert not signer.verify_standard("evt_1", "1700000000", b"{}", "v1,x v1,y", now=1.7e9)
    assert len(compared) == 2 + 4


SENSITIVE = re.compile(r"signature|digest|token|csrf|secret|password|hmac|api_key", re.IGNORECASE)


def test_nothing_that_must_stay_secret_is_compared_with_an_equals_sign() -> None:
    """By name, since nothing else tells what a text is."""
    found = []
    for file in Path(dispatcher.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Compare) and any(isinstance(op, ast.Eq | ast.NotEq) for op in node.ops):
                sides = (node.left, *node.comparators)
                is_plain = any(isinstance(side, ast.Constant | ast.Compare) for side in sides)  # "" or: is there one?
                if not is_plain and any(SENSITIVE.search(ast.unparse(side)) for side in sides):
                    found.append(f"{file.name}:{node.lineno}: {ast.unparse(node)}")
    assert found == []
