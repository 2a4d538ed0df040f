"""Whatever is asked, within the description or against it: no fault of ours, and no answer that is not described."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from collections.abc import Iterator
from typing import Any

import asyncpg
import hypothesis
import pytest
import schemathesis
import structlog
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.core.parameters import ParameterLocation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

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
from dispatcher.store.replays import ReplayStore
from dispatcher.store.vault import Vault
from dispatcher.web.api import build_api_app
from dispatcher.web.auth import RateLimit
from dispatcher.web.openapi import describe
from dispatcher.web.parts import Log, Trial, Tried, Web
from dispatcher.web.server import serve

EXAMPLES = 40  # for each call: all of them in about 15 seconds
IDS = DeliveryIds(b"1" * 16)
ENDLESS = {"/v1/listen"}  # its own tests read what never ends
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]


async def answered(_: Trial) -> Tried:
    attempt = Attempt(Result.OK, status=200, head=b"HTTP/1.1 200 OK\r\nX-A: b\r\n\r\n", body=b"\xff", duration_s=0.1)
    return Tried(attempt=attempt, fields=[("Content-Type", "application/json")], body=b"{}")


def parts_on(pool: Any) -> Web:
    return Web(
        accounts=AccountStore(pool),
        endpoints=EndpointStore(pool, Vault(b"k" * 32)),
        events=EventStore(pool),
        guard=Guard(),
        catalogue=Catalogue.builtin(),
        defaults=EndpointDefaults(schedule_s=(60.0,), schedules=PRESETS, max_concurrency=16, timeout_s=30.0),
        snapshot=Snapshot,
        log=Log(deliveries=DeliveryStore(pool), replays=ReplayStore(pool), ids=IDS, send=answered),
        rate_limit=RateLimit(per_second=1e9, burst=10**9),
    )


SCHEMA = schemathesis.openapi.from_dict(describe(build_api_app(parts_on(None)), Catalogue.builtin()))
CALLS = {
    f"{call.method.upper()} {call.path}": call
    for call in (found.ok() for found in SCHEMA.get_all_operations())
    if call.path not in ENDLESS
}


@dataclasses.dataclass
class Served:
    """An API with a webhook, an event and a delivery in it."""

    url: str
    key: str
    ids: dict[str, str]  # of something that is there, by what stands before it in a path


@pytest.fixture(scope="module")
def served(administrator: Any, template: str) -> Iterator[Served]:
    """The API runs in a thread of its own, because what asks it waits in this one."""
    name = administrator.create(template)
    ready: list[Served] = []
    is_up, is_over, loops = threading.Event(), asyncio.Event(), []

    async def live() -> None:
        loops.append(asyncio.get_running_loop())
        pool = await open_pool(administrator.dsn_of(name), size=4)
        parts = parts_on(pool)
        runner = await serve(build_api_app(parts), "127.0.0.1:0")
        _, key = await parts.accounts.create_key("acme")
        ready.append(Served(f"http://127.0.0.1:{runner.addresses[0][1]}", key, await furnish(pool)))
        is_up.set()
        await is_over.wait()
        await runner.cleanup()
        await pool.close()

    def run() -> None:
        try:
            asyncio.run(live())
        finally:
            is_up.set()

    thread = threading.Thread(target=run)
    with structlog.testing.capture_logs():
        thread.start()
        is_up.wait()
        try:
            yield ready[0]
        finally:
            loops[0].call_soon_threadsafe(is_over.set)
            thread.join()
            administrator.drop(name)


async def furnish(pool: asyncpg.Pool) -> dict[str, str]:
    await pool.execute(
        """
        INSERT INTO dispatcher.endpoint (public_id, account_id, url, events)
            SELECT 'wh_1', id, 'https://example.com/', '{*}' FROM dispatcher.account WHERE name = 'acme';
        INSERT INTO dispatcher.outbox (account, id, type, data) VALUES ('acme', 'evt_1', 'email.sent', '{"a": 1.0}');
        INSERT INTO dispatcher.attempt (at, event_seq, event_xid, endpoint_id, generation, attempt, state, result,
                                        status, duration_us, response_head, response_body)
            SELECT now(), o.seq, o.xid, e.id, 0, 1, 'exhausted', '5xx', 500, 1, 'HTTP/1.1 500 X', '\\xff00'
            FROM dispatcher.outbox o, dispatcher.endpoint e;
        """
    )
    row = await pool.fetchrow("SELECT endpoint_id, event_seq FROM dispatcher.attempt")
    return {"webhooks": "wh_1", "events": "evt_1", "deliveries": IDS.id_of(row["endpoint_id"], row["event_seq"], 0)}


def aim(case: Any, ids: dict[str, str]) -> None:
    """Put what exists into the path, but not where it would be gone afterwards."""
    segments = case.path.split("/")
    if case.path_parameters and case.method.upper() != "DELETE":
        case.path_parameters["id"] = ids[segments[segments.index("{id}") - 1]]


@pytest.mark.parametrize("call", CALLS)
def test_every_answer_is_one_that_is_described(served: Served, call: str) -> None:
    strategies = [CALLS[call].as_strategy(generation_mode=mode) for mode in GenerationMode]
    headers = {"Authorization": f"Bearer {served.key}"}

    @hypothesis.settings(
        max_examples=EXAMPLES, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), database=None
    )
    @hypothesis.given(st.one_of(strategies), st.booleans())
    def ask(case: Any, aimed: bool) -> None:
        if aimed:
            aim(case, served.ids)
        response = case.call(base_url=served.url, headers=headers)
        case.validate_response(response, checks=CHECKS)

    ask()


@pytest.mark.parametrize("call", [name for name, call in CALLS.items() if call.body])
def test_a_body_against_the_description_is_refused(served: Served, call: str) -> None:
    """So the description is not wider than what is taken."""
    strategy = CALLS[call].as_strategy(generation_mode=GenerationMode.NEGATIVE)
    headers = {"Authorization": f"Bearer {served.key}"}

    @hypothesis.settings(
        max_examples=EXAMPLES, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), database=None
    )
    @hypothesis.given(strategy)
    def ask(case: Any) -> None:
        modes = {place: component.mode for place, component in case.meta.components.items()}
        hypothesis.assume(modes.pop(ParameterLocation.BODY, None) is GenerationMode.NEGATIVE)
        hypothesis.assume(GenerationMode.NEGATIVE not in modes.values())
        aim(case, served.ids)
        response = case.call(base_url=served.url, headers=headers)
        case.validate_response(response, checks=[*CHECKS, negative_data_rejection])

    ask()


def test_an_answer_that_is_not_described_would_be_noticed(served: Served) -> None:
    document = json.loads(json.dumps(SCHEMA.raw_schema))
    del document["paths"]["/v1/events/{id}"]["get"]["responses"]["404"]
    call = schemathesis.openapi.from_dict(document)["/v1/events/{id}"]["GET"]
    case = call.Case(path_parameters={"id": "evt_none"})
    response = case.call(base_url=served.url, headers={"Authorization": f"Bearer {served.key}"})
    with pytest.raises(FailureGroup) as failures:
        case.validate_response(response, checks=CHECKS)
    assert "Undocumented status code" in str(failures.value.exceptions[0])
