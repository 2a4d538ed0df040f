"""The customer's commands about deliveries, tests, rotations, replays and sums, with a real API and engine."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from click.testing import CliRunner, Result
from house import IDS, VAULT, House, Receiver, until
from shell import Shell

from dispatcher.cli import webhooks
from dispatcher.cli.customer import main
from dispatcher.core.addresses import Guard
from dispatcher.core.backoff import PRESETS
from dispatcher.core.catalogue import Catalogue
from dispatcher.daemon import sender
from dispatcher.engine.transport import Transport, TransportSettings
from dispatcher.engine.trials import SingleShot
from dispatcher.snapshot import Snapshot
from dispatcher.store.accounts import AccountStore
from dispatcher.store.database import connect, open_pool
from dispatcher.store.deliveries import DeliveryStore
from dispatcher.store.endpoints import EndpointDefaults, EndpointStore
from dispatcher.store.events import EventStore
from dispatcher.store.replays import ReplayStore
from dispatcher.web.api import build_api_app
from dispatcher.web.parts import Log, Web
from dispatcher.web.server import serve


@dataclasses.dataclass
class Customer:
    """Somebody with a key; API, engine and receiver live on a loop of another thread."""

    url: str
    key: str
    home: Path
    house: House
    loop: asyncio.AbstractEventLoop

    @property
    def environ(self) -> dict[str, str]:
        return {"TRACKPOST_API_URL": self.url, "TRACKPOST_API_KEY": self.key, "HOME": str(self.home)}

    def __call__(self, *arguments: str) -> Result:
        return CliRunner().invoke(main, arguments, env=self.environ)

    def ask(self, *arguments: str) -> Any:
        result = self(*arguments)
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    def webhook(self) -> str:
        url = self.house.receiver.url + "/hook"
        made = self.ask("webhooks", "create", "--url", url, "--events", "email.*", "--retry", "none")
        return str(made["id"])

    def settled(self, webhook: str, count: int) -> list[dict[str, Any]]:
        """The webhook's deliveries, once as many have ended."""

        async def ended() -> bool:
            return len(await self.house.log()) >= count

        self.run(until, ended)
        data: list[dict[str, Any]] = self.ask("deliveries", "list", webhook)["data"]
        return data

    def run(self, act: Callable[..., Any], *arguments: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(act(*arguments), self.loop).result(60)


@contextlib.asynccontextmanager
async def _living(dsn: str, home: Path) -> Any:
    guard = Guard(["127.0.0.0/8"], allow_http=True)
    receiver, transport = Receiver(), Transport(settings=TransportSettings(), guard=guard)
    await receiver.start()
    pool, app = await open_pool(dsn, size=3), await connect(dsn, name="application")
    house = House(dsn, receiver, app)
    accounts = AccountStore(pool)
    shot = SingleShot(transport, lambda: guard, user_agent="TrackPost-Webhooks/1.0", header_prefix="X-Trackpost-")
    parts = Web(
        accounts=accounts,
        endpoints=EndpointStore(pool, VAULT),
        events=EventStore(pool),
        guard=guard,
        catalogue=Catalogue.builtin(),
        defaults=EndpointDefaults(schedule_s=(60.0,), schedules=PRESETS, max_concurrency=16, timeout_s=30.0),
        snapshot=Snapshot,
        log=Log(deliveries=DeliveryStore(pool), replays=ReplayStore(pool), ids=IDS, send=sender(shot)),
    )
    runner = await serve(build_api_app(parts), "127.0.0.1:0")
    running = await house.start()
    try:
        _, key = await accounts.create_key("acme")
        yield Customer(f"http://127.0.0.1:{runner.addresses[0][1]}", key, home, house, asyncio.get_running_loop())
    finally:
        await house.stop(running)
        await runner.cleanup()
        await transport.close()
        await pool.close()
        await app.close()
        await receiver.stop()


@pytest.fixture
def customer(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Customer]:
    for variable in ("XDG_CONFIG_HOME", "TRACKPOST_PROFILE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(webhooks, "WATCH_S", 0.01)
    ready: list[Customer] = []
    is_up, is_over = threading.Event(), asyncio.Event()

    async def live() -> None:
        async with _living(database, tmp_path) as customer:
            ready.append(customer)
            is_up.set()
            await is_over.wait()

    def run() -> None:
        try:
            asyncio.run(live())
        finally:
            is_up.set()

    thread = threading.Thread(target=run)
    with structlog.testing.capture_logs():  # what is logged would go to the command line's standard output
        thread.start()
        is_up.wait()
        try:
            yield ready[0]
        finally:
            ready[0].loop.call_soon_threadsafe(is_over.set)
            thread.join()


def test_a_delivery_is_listed_shown_and_sent_once_more(customer: Customer, shell: Shell) -> None:
    webhook = customer.webhook()
    customer.ask("trigger", "email.sent")
    [listed] = customer.settled(webhook, 1)
    assert listed["status"] == "delivered"
    assert customer.ask("deliveries", "list", webhook, "--status", "exhausted", "--class", "5xx")["data"] == []
    shown = customer.ask("deliveries", "get", listed["id"])
    assert shown["attempts"][0]["status"] == 200
    made = customer.ask("deliveries", "retry", listed["id"])
    assert made["redelivery"] is True
    assert len(customer.settled(webhook, 2)) == 2
    table = shell.run_on_terminal("trackpost", "deliveries", "list", webhook, env=customer.environ, columns=200)
    assert listed["id"] in table.out
    page = shell.run_on_terminal("trackpost", "deliveries", "get", listed["id"], env=customer.environ, columns=200)
    assert "email.sent" in page.out
    assert f"> webhook-id: {listed['event_id']}" in page.out
    assert "< Content-Length: 2" in page.out
    assert customer("deliveries", "get", "dlv_x").exit_code == 1


def test_a_test_that_is_refused_ends_with_1_and_names_the_style_that_helps(customer: Customer, shell: Shell) -> None:
    webhook = customer.webhook()
    assert customer.ask("webhooks", "test", webhook, "--type", "email.bounced")["delivered"] is True
    own = customer.ask("webhooks", "test", webhook, "--type", "a.b", "--data", '{"x": 1}')
    assert json.loads(own["request_body"])["data"] == {"x": 1}
    customer.house.receiver.answer = lambda arrival: 200 if b'": "' in arrival.body else 401
    refused = customer("webhooks", "test", webhook)
    assert refused.exit_code == 1
    assert json.loads(refused.stdout)["body_style_accepted"] == "python"
    shown = shell.run_on_terminal("trackpost", "webhooks", "test", webhook, env=customer.environ)
    assert (shown.code, "--body-style python" in shown.out.replace("\n", " ")) == (1, True)
    customer.house.receiver.answer = lambda arrival: 401
    shown = shell.run_on_terminal("trackpost", "webhooks", "test", webhook, env=customer.environ)
    assert (shown.code, "--show-secret" in shown.out.replace("\n", " ")) == (1, True)
    assert customer("webhooks", "test", webhook, "--data", "{").exit_code == 2


def test_a_secret_is_replaced_by_a_new_one_or_ones_own(customer: Customer) -> None:
    webhook = customer.webhook()
    made = customer.ask("webhooks", "rotate-secret", webhook)
    assert made["previous_secret_expires_at"] is not None
    assert customer.ask("webhooks", "get", webhook, "--show-secret")["secret"] == made["secret"]
    again = customer.ask("webhooks", "rotate-secret", webhook, "--secret", "x" * 40, "--grace", "0")
    assert (again["secret"], again["previous_secret_expires_at"]) == ("x" * 40, None)


def test_a_replay_is_counted_and_followed_to_its_end(customer: Customer, shell: Shell) -> None:
    customer.ask("trigger", "email.sent")
    customer.ask("trigger", "domain.verified")
    webhook = customer.webhook()
    replay = ("webhooks", "replay", webhook, "--since", "2020-01-01T00:00:00Z", "--status", "missed")
    assert customer.ask(*replay, "--dry-run")["count"] == 1
    assert customer.ask(*replay, "--types", "email.opened", "--dry-run")["count"] == 0
    done = customer.ask(*replay)
    assert (done["status"], done["queued"]) == ("done", 1)
    customer.settled(webhook, 1)
    shown = shell.run_on_terminal("trackpost", *replay, env=customer.environ)
    assert "is done: 0 queued of 2 looked at" in shown.out
    assert customer("webhooks", "replay", webhook, "--since", "x", "--status", "all").exit_code == 1


def test_sums_are_shown_to_people_and_programs(customer: Customer, shell: Shell) -> None:
    webhook = customer.webhook()
    customer.ask("trigger", "email.sent")
    customer.settled(webhook, 1)
    assert customer.ask("webhooks", "stats", webhook, "--window", "1h")["deliveries"]["delivered"] == 1
    shown = shell.run_on_terminal("trackpost", "webhooks", "stats", webhook, env=customer.environ)
    assert "100.0%" in shown.out


def test_a_replay_is_seen_in_the_list_and_cancelled(customer: Customer) -> None:
    webhook = customer.webhook()
    customer.ask("trigger", "email.sent")
    customer.settled(webhook, 1)
    customer.ask("webhooks", "pause", webhook)
    begun = customer.ask("webhooks", "replay", webhook, "--since", "2020-01-01T00:00:00Z", "--status", "all")
    assert (begun["status"], begun["queued"]) == ("done", 1)
    listed = customer.ask("webhooks", "replays", webhook)
    assert [each["id"] for each in listed["data"]] == [begun["id"]]
    cancelled = customer.ask("webhooks", "cancel-replay", webhook, begun["id"])
    assert (cancelled["status"], cancelled["queued"]) == ("cancelled", 0)
    customer.ask("webhooks", "resume", webhook)
    assert customer("webhooks", "cancel-replay", webhook, "rpl_none").exit_code == 1


def test_people_see_replays_and_what_a_cancelled_one_leaves(customer: Customer, shell: Shell) -> None:
    webhook = customer.webhook()
    begun = customer.ask(
        "webhooks", "replay", webhook, "--since", "2020-01-01T00:00:00Z", "--status", "missed", "--types", "email.*"
    )
    shown = shell.run_on_terminal("trackpost", "webhooks", "replays", webhook, env=customer.environ, columns=60)
    assert begun["id"] in shown.out
    assert "status done" in shown.out
    ended = shell.run_on_terminal("trackpost", "webhooks", "cancel-replay", webhook, begun["id"], env=customer.environ)
    assert ended.out.strip() == f"{begun['id']} is done: 0 of its deliveries were or will be sent"
