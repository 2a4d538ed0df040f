"""The API as its callers meet it: over HTTP, on a real database, as two accounts."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from multidict import CIMultiDictProxy

from dispatcher.core.addresses import Guard
from dispatcher.core.backoff import PRESETS
from dispatcher.core.catalogue import Catalogue
from dispatcher.snapshot import Snapshot
from dispatcher.store.accounts import AccountStore
from dispatcher.store.database import open_pool
from dispatcher.store.endpoints import EndpointDefaults, EndpointStore
from dispatcher.store.events import EventStore
from dispatcher.store.vault import Vault
from dispatcher.web.api import build_api_app
from dispatcher.web.parts import Web

DEFAULTS = EndpointDefaults(schedule_s=(60.0, 600.0, 3600.0), schedules=PRESETS, max_concurrency=16, timeout_s=30.0)
NO_KEY = ""


@dataclasses.dataclass
class Answer:
    status: int
    headers: CIMultiDictProxy[str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def fields(self) -> list[str]:
        return [error["field"] for error in self.json["errors"]]


class Api:
    """One caller; `acme` holds the key unless another one is given."""

    def __init__(self, client: TestClient[Any, Any], parts: Web, keys: dict[str, str]) -> None:
        self._client = client
        self.parts = parts
        self.keys = keys

    async def __call__(
        self, method: str, path: str, body: Any = None, *, key: str | None = None, **rest: Any
    ) -> Answer:
        headers = dict(rest.pop("headers", {}))
        if key != NO_KEY:
            headers.setdefault("Authorization", f"Bearer {key or self.keys['acme']}")
        if body is not None:
            headers.setdefault("Content-Type", "application/json")
            rest["data"] = io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
        async with self._client.request(method, path, headers=headers, **rest) as response:
            return Answer(response.status, response.headers, await response.text())

    async def webhook(self, **settings: Any) -> dict[str, Any]:
        answer = await self("POST", "/v1/webhooks", {"url": "https://example.com/hook", "events": ["*"], **settings})
        assert answer.status == 201, answer.text
        return answer.json


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Any]:
    pool = await open_pool(database, size=4)
    yield pool
    await pool.close()


@pytest.fixture
def parts(pool: Any) -> Web:
    return Web(
        accounts=AccountStore(pool),
        endpoints=EndpointStore(pool, Vault(b"k" * 32)),
        events=EventStore(pool),
        guard=Guard(),
        catalogue=Catalogue.builtin(),
        defaults=DEFAULTS,
        snapshot=Snapshot,
    )


@pytest.fixture
async def api(parts: Web) -> AsyncIterator[Api]:
    keys = {name: (await parts.accounts.create_key(name))[1] for name in ("acme", "rival")}
    async with TestClient(TestServer(build_api_app(parts))) as client:
        yield Api(client, parts, keys)
