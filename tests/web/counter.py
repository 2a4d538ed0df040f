"""The API with a real engine behind it: what is asked for over HTTP arrives at a receiver, or is seen to fail."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from aiohttp.test_utils import TestClient, TestServer
from house import IDS, SECRET, VAULT, House, Receiver, Running, until

from dispatcher.core.addresses import Guard
from dispatcher.daemon import sender
from dispatcher.engine.transport import Transport, TransportSettings
from dispatcher.engine.trials import SingleShot
from dispatcher.store.database import connect
from dispatcher.store.deliveries import DeliveryStore
from dispatcher.store.endpoints import EndpointStore
from dispatcher.store.replays import ReplayStore
from dispatcher.web.api import build_api_app
from dispatcher.web.parts import Log

if TYPE_CHECKING:
    from tests.web.conftest import Api


class Desk:
    """An account, its API, its receiver, and the engine, once it was started."""

    def __init__(self, api: Api, house: House) -> None:
        self.api = api
        self.house = house
        self.receiver = house.receiver
        self.app = house.app

    async def start(self, **settings: Any) -> Running:
        return await self.house.start(**settings)

    async def webhook(self, path: str = "/", **settings: Any) -> str:
        made = await self.api.webhook(
            url=self.receiver.url + path, secret=SECRET, **{"retry": "none", "events": ["email.*"], **settings}
        )
        return str(made["id"])

    async def emit(self, *types: str, account: str = "acme", n: int = 0) -> list[str]:
        rows = [
            await self.app.fetchrow(
                "INSERT INTO dispatcher.outbox (account, type, data) VALUES ($1, $2, $3) RETURNING id",
                account,
                name,
                json.dumps({"n": n}),
            )
            for name in types
        ]
        return [row["id"] for row in rows]

    async def ask(self, method: str, path: str, body: Any = None, *, status: int = 200, **rest: Any) -> Any:
        answer = await self.api(method, f"/v1{path}", body, **rest)
        assert answer.status == status, answer.text
        return answer.json

    async def deliveries(self, webhook: str, **query: Any) -> list[dict[str, Any]]:
        page = await self.ask("GET", f"/webhooks/{webhook}/deliveries", params=query)
        data: list[dict[str, Any]] = page["data"]
        return data

    async def settled(self, webhook: str, count: int) -> list[dict[str, Any]]:
        """The webhook's deliveries, once as many have ended."""

        async def ended() -> list[dict[str, Any]]:
            found = await self.deliveries(webhook, limit=100)
            done = [each for each in found if each["status"] in ("delivered", "exhausted", "discarded")]
            return found if len(done) >= count else []

        found: list[dict[str, Any]] = await until(ended)
        return found

    async def key(self, webhook: str) -> int:
        return int(await self.app.fetchval("SELECT id FROM dispatcher.endpoint WHERE public_id = $1", webhook))


@contextlib.asynccontextmanager
async def open_desk(api: Api, pool: Any, database: str) -> AsyncIterator[Desk]:
    guard = Guard(["127.0.0.0/8"], allow_http=True)
    receiver, transport = Receiver(), Transport(settings=TransportSettings(), guard=guard)
    await receiver.start()
    shot = SingleShot(transport, lambda: guard, user_agent="TrackPost-Webhooks/1.0", header_prefix="X-Trackpost-")
    app = await connect(database, name="application")
    house = House(database, receiver, app)
    store = DeliveryStore(
        pool, out=lambda endpoint_id: {o for r in house.engines for o in r.engine.deliverer.out(endpoint_id)}
    )
    log = Log(deliveries=store, replays=ReplayStore(pool), ids=IDS, send=sender(shot))
    parts = dataclasses.replace(api.parts, guard=guard, log=log, endpoints=EndpointStore(pool, VAULT))
    try:
        async with TestClient(TestServer(build_api_app(parts))) as client:
            yield Desk(type(api)(client, parts, api.keys), house)
        for running in list(house.engines):
            running.check()
            await house.stop(running)
    finally:
        for running in house.engines:
            running.task.cancel()
        await transport.close()
        await receiver.stop()
        await app.close()
