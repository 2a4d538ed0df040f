"""The dashboard as browsers meet it, but for the scripts: over HTTP, on a real database, as two accounts."""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestClient, TestServer
from multidict import CIMultiDictProxy

from dispatcher.core.addresses import Guard
from dispatcher.core.attempt import Attempt
from dispatcher.core.backoff import PRESETS
from dispatcher.core.catalogue import Catalogue
from dispatcher.core.ids import DeliveryIds
from dispatcher.model import Result
from dispatcher.snapshot import Snapshot
from dispatcher.store.accounts import AccountStore
from dispatcher.store.database import open_pool
from dispatcher.store.deliveries import DeliveryStore
from dispatcher.store.endpoints import EndpointDefaults, EndpointStore
from dispatcher.store.events import EventStore
from dispatcher.store.overview import OverviewStore
from dispatcher.store.replays import ReplayStore
from dispatcher.store.sessions import SessionStore
from dispatcher.store.vault import Vault
from dispatcher.web.api import build_api_app
from dispatcher.web.parts import Log, Stores, Trial, Tried, Web

DEFAULTS = EndpointDefaults(schedule_s=(60.0, 600.0, 3600.0), schedules=PRESETS, max_concurrency=16, timeout_s=30.0)
PAGE = {"Accept": "text/html,application/xhtml+xml"}


@dataclasses.dataclass
class Seen:
    """What a browser got."""

    status: int
    headers: CIMultiDictProxy[str]
    text: str

    @property
    def location(self) -> str:
        return self.headers["Location"]

    @property
    def words(self) -> str:
        """The page without its tags, blanks collapsed."""
        return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", self.text)).split())

    @property
    def token(self) -> str:
        found = re.search(r'name="csrf" value="([^"]+)"', self.text)
        assert found, "a page with a form"
        return found[1]


class Browser:
    """One browser: keeps cookies, follows nothing, sends forms as a browser does."""

    def __init__(self, client: TestClient[Any, Any], key: str) -> None:
        self.client = client
        self.key = key
        self.token = ""

    @property
    def cookies(self) -> dict[str, str]:
        return {cookie.key: cookie.value for cookie in self.client.session.cookie_jar}

    @property
    def origin(self) -> str:
        return str(self.client.make_url("/")).rstrip("/")

    async def get(self, path: str, **headers: str) -> Seen:
        return await self._ask("GET", path, headers=PAGE | headers)

    async def post(self, path: str, fields: Any = (), *, token: str | None = None, **headers: str) -> Seen:
        """Send a form; its token is that of the session unless another one is given."""
        pairs = [*(fields.items() if isinstance(fields, dict) else fields)]
        pairs.append(("csrf", self.token if token is None else token))
        return await self._ask("POST", path, data=pairs, headers=PAGE | {"Origin": self.origin} | headers)

    async def sign_in(self, key: str | None = None) -> Seen:
        page = await self.get("/sign-in")
        answer = await self.post("/sign-in", {"key": key or self.key}, token=page.token)
        if answer.status == 303:
            self.token = (await self.get("/")).token
        return answer

    async def _ask(self, method: str, path: str, **rest: Any) -> Seen:
        async with self.client.request(method, path, allow_redirects=False, **rest) as response:
            return Seen(response.status, response.headers, await response.text())


class Endpoint:
    """What a test event comes to: one answer after the other, the last one again and again."""

    def __init__(self) -> None:
        self.answers: list[Attempt] = [Attempt(Result.OK, status=200, head=b"HTTP/1.1 200 OK\r\n\r\n", body=b"ok")]
        self.trials: list[Trial] = []

    async def send(self, trial: Trial) -> Tried:
        self.trials.append(trial)
        attempt = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return Tried(attempt=attempt, fields=[("Host", "example.com")], body=trial.payload.body(trial.style))


@dataclasses.dataclass
class House:
    """A whole dashboard, and the way to everything behind it."""

    db: Any
    parts: Web
    server: TestServer
    endpoint: Endpoint
    keys: dict[str, str]
    key_ids: dict[str, str]

    async def webhook(self, account: str = "acme", **settings: Any) -> dict[str, Any]:
        """A webhook, made by the API."""
        body = {"url": "https://example.com/hook", "events": ["*"], **settings}
        headers = {"Authorization": f"Bearer {self.keys[account]}"}
        async with (
            aiohttp.ClientSession() as session,
            session.post(self.server.make_url("/v1/webhooks"), json=body, headers=headers) as answer,
        ):
            assert answer.status == 201, await answer.text()
            return dict(await answer.json())

    async def event(self, type_: str = "email.sent", data: str = "{}", account: str = "acme") -> Any:
        """An event; its row of the outbox."""
        return await self.db.fetchrow(
            "INSERT INTO dispatcher.outbox (account, type, data) VALUES ($1, $2, $3) RETURNING *", account, type_, data
        )

    async def attempt(self, webhook_id: str, event: Any, state: str, *, number: int = 1, **rest: Any) -> str:
        """A row of the log, as the engine writes it; returns the delivery's id. A retrying one gets its pending row."""
        columns = {"result": "2xx" if state == "delivered" else "5xx", "status": 200 if state == "delivered" else 500}
        columns |= {"duration_us": 12_345, "error": None, "response_head": None, "response_body": None} | rest
        endpoint_id = await self.db.fetchval("SELECT id FROM dispatcher.endpoint WHERE public_id = $1", webhook_id)
        names = ["event_seq", "event_xid", "endpoint_id", "generation", "attempt", "state", *columns]
        values = [event["seq"], event["xid"], endpoint_id, 0, number, state, *columns.values()]
        marks = ", ".join(f"${place}" for place in range(1, len(values) + 1))
        await self.db.execute(
            f"INSERT INTO dispatcher.attempt (at, {', '.join(names)}) VALUES (clock_timestamp(), {marks})", *values
        )
        if state == "retrying":
            await self.pending(webhook_id, event, attempts=number, state="retrying", due="1 minute")
        assert self.parts.log is not None
        return self.parts.log.ids.id_of(endpoint_id, event["seq"], 0)

    async def pending(
        self, webhook_id: str, event: Any, *, attempts: int = 0, state: str = "pending", due: str | None = None
    ) -> None:
        """A row of what waits; held unless it is `due` in a while."""
        await self.db.execute(
            """INSERT INTO dispatcher.pending (endpoint_id, event_seq, generation, event_xid, event_at, state, attempts,
                                               due_at)
               SELECT id, $2, 0, $3, $4, $5, $6, CASE WHEN $7::text IS NULL THEN 'infinity'
                                                      ELSE now() + $7::text::interval END
               FROM dispatcher.endpoint WHERE public_id = $1""",
            webhook_id, event["seq"], event["xid"], event["written_at"], state, attempts, due,
        )  # fmt: skip


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Any]:
    pool = await open_pool(database, size=4)
    yield pool
    await pool.close()


@pytest.fixture
async def house(pool: Any) -> AsyncIterator[House]:
    endpoint = Endpoint()
    accounts = AccountStore(pool)
    made = {name: await accounts.create_key(name) for name in ("acme", "rival")}
    parts = Web(
        accounts=accounts,
        endpoints=EndpointStore(pool, Vault(b"k" * 32)),
        events=EventStore(pool),
        guard=Guard(),
        catalogue=Catalogue.builtin(),
        defaults=DEFAULTS,
        snapshot=lambda: Snapshot(role="active", database=True),
        log=Log(
            deliveries=DeliveryStore(pool),
            replays=ReplayStore(pool),
            ids=DeliveryIds(bytes(range(16))),
            send=endpoint.send,
        ),
        stores=Stores(sessions=SessionStore(pool), overview=OverviewStore(pool)),
    )
    async with TestServer(build_api_app(parts)) as server:
        yield House(
            db=pool,
            parts=parts,
            server=server,
            endpoint=endpoint,
            keys={name: key for name, (_, key) in made.items()},
            key_ids={name: record.id for name, (record, _) in made.items()},
        )


@pytest.fixture
async def stranger(house: House) -> AsyncIterator[Browser]:
    """A browser of somebody who has not signed in; the key is acme's."""
    jar = aiohttp.CookieJar(unsafe=True)  # the server is an address, not a name
    async with TestClient(house.server, cookie_jar=jar) as client:
        yield Browser(client, house.keys["acme"])


@pytest.fixture
async def browser(stranger: Browser) -> Browser:
    """A browser signed in to acme."""
    assert (await stranger.sign_in()).status == 303
    return stranger


@pytest.fixture
async def rival(house: House) -> AsyncIterator[Browser]:
    """A browser signed in to another account."""
    async with TestClient(house.server, cookie_jar=aiohttp.CookieJar(unsafe=True)) as client:
        browser = Browser(client, house.keys["rival"])
        assert (await browser.sign_in()).status == 303
        yield browser
