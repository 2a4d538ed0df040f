"""The operator's page: there only with a key, open only to that key, and a stranger to every account."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import aiohttp
import asyncpg
import msgspec
import pytest
from aiohttp.test_utils import TestClient, TestServer

from dispatcher.snapshot import Snapshot, TroubledEndpoint
from dispatcher.store.operator import OperatorStore
from dispatcher.web.api import build_api_app
from dispatcher.web.dashboard.operator import LIFE_S, OperatorSeal
from dispatcher.web.parts import Operator

if TYPE_CHECKING:
    from tests.web.dashboard.conftest import Browser, House

KEY = "an-operator-key-of-many-letters"
SETTINGS = {"database": {"dsn": "postgresql://dispatcher:***@db/app"}, "network": {"allow": (), "allow_http": False}}


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def operator(house: House, stranger: Browser) -> AsyncIterator[Any]:
    """A browser on a dashboard that has an operator's page; nobody is signed in."""
    house.parts.operator = Operator(key=KEY, store=OperatorStore(house.db), settings=SETTINGS)
    async with (
        TestServer(build_api_app(house.parts)) as server,
        TestClient(server, cookie_jar=aiohttp.CookieJar(unsafe=True)) as client,
    ):
        yield type(stranger)(client, house.keys["acme"])


async def enter(browser: Browser, key: str = KEY) -> Any:
    page = await browser.get("/operator/sign-in")
    return await browser.post("/operator/sign-in", {"key": key}, token=page.token)


async def beat(house: House, id_: str, role: str, age_s: float = 0.0, **snapshot: Any) -> None:
    text = msgspec.json.encode(Snapshot(role=role, database=True, at_unix_s=100.0, **snapshot)).decode()
    await house.db.execute(
        "INSERT INTO dispatcher.instance VALUES ($1, $2, 42, $3, '1.2', now(), now() - make_interval(secs => $4), $5)"
        " ON CONFLICT (id) DO UPDATE SET snapshot = excluded.snapshot",
        id_, f"host-of-{id_}", role, age_s, text,
    )  # fmt: skip


# -- the door


async def test_without_a_key_in_the_configuration_there_is_no_such_page(browser: Browser):
    for path in ("/operator", "/operator/sign-in"):
        assert (await browser.get(path)).status == 404
    assert (await browser.post("/operator/sign-in", {"key": ""})).status in {404, 405}


async def test_the_key_opens_it(operator: Browser):
    assert (await operator.get("/operator")).location == "/operator/sign-in"
    assert (await enter(operator)).location == "/operator"
    page = await operator.get("/operator")
    assert page.status == 200
    assert "Installation" in page.words
    assert (await operator.get("/operator/sign-in")).location == "/operator"


@pytest.mark.parametrize("key", ["", "x", KEY[:-1], KEY + "x", KEY.upper(), "ü" * 40])
async def test_no_other_key_does(operator: Browser, key: str):
    answer = await enter(operator, key)
    assert answer.status == 422
    assert "This is not the operator key." in answer.words
    assert (await operator.get("/operator")).status == 303


async def test_an_accounts_key_and_session_open_nothing(house: House, operator: Browser):
    assert (await enter(operator, house.keys["acme"])).status == 422
    assert (await operator.sign_in()).status == 303
    assert (await operator.get("/operator")).location == "/operator/sign-in"


async def test_an_operators_session_acts_for_no_account(operator: Browser):
    await enter(operator)
    for path in ("/", "/events", "/event-types"):
        assert (await operator.get(path)).location.startswith("/sign-in")
    async with operator.client.get("/v1/webhooks", headers={"Authorization": f"Bearer {KEY}"}) as answer:
        assert answer.status == 401


async def test_guessing_is_slowed_down(operator: Browser):
    answers = [(await enter(operator, "a guess")).status for _ in range(25)]
    assert answers[-1] == 429
    assert (await enter(operator)).status == 429


async def test_the_form_needs_its_token(operator: Browser):
    await operator.get("/operator/sign-in")
    assert (await operator.post("/operator/sign-in", {"key": KEY}, token="")).status == 403


async def test_closing_ends_it(operator: Browser):
    await enter(operator)
    page = await operator.get("/operator")
    await operator.post("/operator/sign-out", token=page.token)
    assert (await operator.get("/operator")).status == 303


async def test_the_cookie_is_out_of_reach(operator: Browser):
    cookie = (await enter(operator)).headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie


def test_a_seal_holds_what_it_began_for_as_long_as_it_says():
    clock = Clock()
    seal = OperatorSeal(KEY, clock)
    session = seal.begin()
    assert seal.holds(session)
    assert seal.begin() != session
    clock.now += LIFE_S - 1
    assert seal.holds(session)
    clock.now += 2
    assert not seal.holds(session)


@pytest.mark.parametrize("text", ["", ".", "..", "9999999999.aa.", "9999999999.aa.ff", "x.y.z", "ü.ü.ü"])
def test_a_seal_holds_nothing_else(text: str):
    seal = OperatorSeal(KEY)
    end, number, proof = seal.begin().split(".")
    for forged in (
        text,
        f"{int(end) + 1}.{number}.{proof}",
        f"{end}.{number}0.{proof}",
        f"{end}.{number}.{proof[:-1]}",
    ):
        assert not seal.holds(forged)
    assert not OperatorSeal(KEY + "x").holds(f"{end}.{number}.{proof}")


# -- the page


async def test_it_shows_every_account_with_what_waits(house: House, operator: Browser):
    await house.webhook("acme")
    paused = await house.webhook("rival", url="https://rival.example/")
    await house.db.execute("UPDATE dispatcher.endpoint SET status = 'paused' WHERE public_id = $1", paused["id"])
    await house.pending(paused["id"], await house.event(account="rival"))
    await enter(operator)
    words = (await operator.get("/operator")).words
    assert "acme 1 0 0 0 0 –" in words
    assert "rival 0 1 0 0 1" in words


async def test_accounts_come_in_pages(house: House, operator: Browser):
    await house.db.execute(
        "INSERT INTO dispatcher.account (name) SELECT 'z' || lpad(n::text, 3, '0') FROM generate_series(1, 40) n"
    )
    await enter(operator)
    page = await operator.get("/operator")
    assert 'href="/operator?after=z022#accounts"' in page.text
    assert "z023" not in page.words
    rest = await operator.get("/operator?after=z022")
    assert "z023" in rest.words
    assert "z022" not in rest.words
    assert 'rel="next"' not in rest.text


async def test_it_shows_daemons_and_says_which_are_gone(house: House, operator: Browser):
    await enter(operator)
    assert "No daemon delivers." in (await operator.get("/operator")).words
    await beat(house, "a", "active", in_flight=17)
    page = await operator.get("/operator")
    assert "host-of-a pid 42 active" in page.words
    assert "In flight 17" in page.words
    assert "No other daemon stands by." in page.words
    await beat(house, "b", "standby")
    await beat(house, "c", "standby", age_s=60)
    page = await operator.get("/operator")
    assert "host-of-b pid 42 standby" in page.words
    assert "host-of-c pid 42 gone 1 min ago" in page.words
    assert "All is well" in page.words


async def test_rates_are_those_between_two_looks(house: House, operator: Browser):
    await enter(operator)
    await beat(house, "a", "active", events=100, deliveries={"delivered": 50})
    await operator.get("/operator")
    text = msgspec.json.encode(
        Snapshot(role="active", at_unix_s=110.0, events=150, deliveries={"delivered": 90, "exhausted": 5})
    ).decode()
    await house.db.execute("UPDATE dispatcher.instance SET snapshot = $1, heartbeat_at = now()", text)
    assert "now 5.0 4.0 0.5" in (await operator.get("/operator")).words


async def test_the_worst_webhooks_come_with_their_accounts(house: House, operator: Browser):
    webhook = await house.webhook("rival", url="https://slow.example/hook")
    trouble = {"health": "dead", "queued": 7, "in_flight": 1, "window": 2, "backlog": True}
    worst = [TroubledEndpoint(id=id_, error="<b>503", **trouble) for id_ in (webhook["id"], "wh_gone")]
    await beat(house, "a", "active", worst=worst)
    await enter(operator)
    assert "slow.example/hook rival: <b>503 rival dead 1 of 2 7+ <b>503" in (await operator.get("/operator")).words


async def test_it_shows_the_database_its_days_and_the_settings(house: House, operator: Browser):
    await enter(operator)
    words = (await operator.get("/operator")).words
    today = datetime.now(UTC).date()
    assert f"outbox {today} to {today + timedelta(days=7)}" in words
    assert "PostgreSQL" in words
    assert "Shard 0 epoch 0" in words
    assert "dsn postgresql://dispatcher:***@db/app" in words
    assert "allow none allow_http false" in words


async def test_rows_astray_and_days_that_end_are_told(house: House, operator: Browser):
    await house.db.execute(
        "INSERT INTO dispatcher.outbox (type, data, written_at) VALUES ('a.b', '{}', now() - interval '400 days')"
    )
    await house.db.execute("ANALYZE dispatcher.outbox_default")
    tomorrow = datetime.now(UTC).date() + timedelta(days=1)
    names = await house.db.fetch(
        "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid"
        " WHERE i.inhparent = 'dispatcher.attempt'::regclass AND c.relname ~ '_[0-9]{8}$' AND c.relname > $1",
        f"attempt_{tomorrow:%Y%m%d}",
    )
    for row in names:
        await house.db.execute(f"DROP TABLE dispatcher.{row['relname']}")
    await enter(operator)
    words = (await operator.get("/operator")).words
    assert "Rows of outbox lie in its DEFAULT partition." in words
    assert "The partitions of attempt end soon." in words
    assert "The partitions of outbox end soon." not in words


async def test_without_the_database_it_shows_what_is_known_here(house: House, operator: Browser):
    class Away(OperatorStore):
        async def instances(self) -> Any:
            raise asyncpg.CannotConnectNowError("the database system is starting up")

    assert house.parts.operator is not None
    house.parts.operator.store = Away(None)
    house.parts.snapshot = lambda: Snapshot(role="active", in_flight=3)
    await enter(operator)
    page = await operator.get("/operator")
    assert page.status == 200
    assert "The database cannot be reached" in page.words
    assert "the database system is starting up" in page.words
    assert "In flight 3" in page.words


def test_the_key_is_in_no_repr():
    shown = dataclasses.replace(Operator(key=KEY, store=OperatorStore(None), settings={}))
    assert KEY not in repr(shown)
