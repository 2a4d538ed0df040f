from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import hmac
import http.server
import json
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from click.testing import CliRunner, Result
from shell import Shell
from standardwebhooks import Webhook

from dispatcher.cli import client
from dispatcher.cli.customer import main
from dispatcher.cli.profiles import Access, find_access, write_profile
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
from dispatcher.web.server import serve

URL = "https://example.com/hook"
SECRET = "a secret of forty characters, more or less"


@dataclasses.dataclass
class Customer:
    """Somebody with a key for a real API."""

    url: str
    key: str
    home: Path

    @property
    def environ(self) -> dict[str, str]:
        return {"TRACKPOST_API_URL": self.url, "TRACKPOST_API_KEY": self.key, "HOME": str(self.home)}

    def __call__(self, *arguments: str, given: str | None = None, **env: str) -> Result:
        return CliRunner().invoke(main, arguments, given, env=self.environ | env)

    def ask(self, *arguments: str, given: str | None = None) -> Any:
        """What a command that must not fail prints as JSON."""
        result = self(*arguments, given=given)
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    def webhook(self, *options: str) -> dict[str, Any]:
        made: dict[str, Any] = self.ask("webhooks", "create", "--url", URL, "--events", "*", *options)
        return made


@contextlib.asynccontextmanager
async def _serving(dsn: str) -> Any:
    pool = await open_pool(dsn, size=2)
    accounts = AccountStore(pool)
    parts = Web(
        accounts=accounts,
        endpoints=EndpointStore(pool, Vault(b"k" * 32)),
        events=EventStore(pool),
        guard=Guard(),
        catalogue=Catalogue.builtin(),
        defaults=EndpointDefaults(schedule_s=(60.0,), schedules=PRESETS, max_concurrency=16, timeout_s=30.0),
        snapshot=Snapshot,
    )
    runner = await serve(build_api_app(parts), "127.0.0.1:0")
    try:
        _, key = await accounts.create_key("acme")
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", key
    finally:
        await runner.cleanup()
        await pool.close()


@pytest.fixture
def customer(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Customer]:
    """The API runs in a thread of its own, because a command line is in charge of this one."""
    for variable in ("XDG_CONFIG_HOME", "TRACKPOST_PROFILE"):
        monkeypatch.delenv(variable, raising=False)
    ready: list[Customer] = []
    is_up, is_over = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def live() -> None:
        loops.append(asyncio.get_running_loop())
        async with _serving(database) as (url, key):
            ready.append(Customer(url, key, tmp_path))
            is_up.set()
            await is_over.wait()

    def run() -> None:
        try:
            asyncio.run(live())
        finally:
            is_up.set()

    thread = threading.Thread(target=run)
    with structlog.testing.capture_logs():  # the API's log would go to the command line's standard output
        thread.start()
        is_up.wait()
        try:
            yield ready[0]
        finally:
            loops[0].call_soon_threadsafe(is_over.set)
            thread.join()


# ── webhooks ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_create_prints_the_webhook_with_a_secret_of_its_own(customer: Customer) -> None:
    made = customer.webhook()
    assert made["url"] == URL
    assert made["events"] == ["*"]
    assert made["secret"].startswith("whsec_")
    assert customer.ask("webhooks", "get", made["id"], "--show-secret")["secret"] == made["secret"]
    assert "secret" not in customer.ask("webhooks", "get", made["id"])


def test_the_guides_command_works_as_it_is_printed(customer: Customer) -> None:
    made = customer.ask(
        *("webhooks", "create", "--url", "https://yourapp.com/webhooks/trackpost"),
        *("--events", "email.delivered,email.bounced", "--secret", "your_webhook_secret"),
    )
    assert made["events"] == ["email.delivered", "email.bounced"]
    assert made["secret"] == "your_webhook_secret"


def test_every_setting_reaches_the_api(customer: Customer) -> None:
    made = customer.webhook(
        *("--description", "mine", "--header", "X-Team=a=b", "--header", "X-Other=c", "--body-style", "python"),
        *("--retry", "10s,1m", "--max-concurrency", "3", "--rate-limit", "2.5", "--ordered", "--timeout", "7"),
        "--no-secret",
    )
    settings = {
        "description": "mine",
        "headers": {"X-Team": "a=b", "X-Other": "c"},
        "body_style": "python",
        "retry": ["10s", "1m"],
        "max_concurrency": 3,
        "rate_limit": 2.5,
        "ordered": True,
        "timeout_s": 7.0,
        "secret": None,
        "signed": False,
    }
    assert {name: made[name] for name in settings} == settings


def test_secret_comes_from_a_file_or_standard_input_without_its_line_break(customer: Customer, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    assert customer.webhook("--secret-file", str(tmp_path / "secret"))["secret"] == SECRET
    made = customer.ask(
        "webhooks", "create", "--url", URL, "--events", "*", "--secret-file", "-", given=f"{SECRET}\r\n"
    )
    assert made["secret"] == SECRET


def test_update_changes_what_is_named_and_nothing_else(customer: Customer) -> None:
    made = customer.webhook("--description", "old", "--retry", "standard", "--rate-limit", "5", "--header", "X-A=1")
    changed = customer.ask(
        *("webhooks", "update", made["id"], "--events", "email.*,domain.verified", "--no-ordered"),
        *("--reset", "rate_limit", "--reset", "retry", "--no-headers"),
    )
    assert changed["events"] == ["email.*", "domain.verified"]
    assert (changed["rate_limit"], changed["retry"], changed["headers"]) == (None, ["1m"], {})
    assert (changed["description"], changed["url"]) == ("old", URL)
    assert customer("webhooks", "update", made["id"]).exit_code == 2


def test_pause_and_resume_tell_the_new_status(customer: Customer) -> None:
    made = customer.webhook()
    assert customer.ask("webhooks", "pause", made["id"])["status"] == "paused"
    assert customer.ask("webhooks", "resume", made["id"])["status"] == "active"


def test_delete_wants_to_be_confirmed(customer: Customer) -> None:
    made = customer.webhook()
    refused = customer("webhooks", "delete", made["id"])
    assert refused.exit_code == 2
    assert "--yes" in refused.stderr
    assert customer.ask("webhooks", "delete", made["id"], "--yes") == {"id": made["id"], "deleted": True}
    assert customer("webhooks", "get", made["id"]).exit_code == 1


def test_on_a_terminal_delete_asks_and_takes_no_for_an_answer(customer: Customer, shell: Shell) -> None:
    made = customer.webhook()
    shown = shell.run_on_terminal("trackpost", "webhooks", "delete", made["id"], typed="n\n", env=customer.environ)
    assert "and what waits for it? [y/N]" in shown.out
    assert shown.code == 130
    shown = shell.run_on_terminal("trackpost", "webhooks", "delete", made["id"], typed="y\n", env=customer.environ)
    assert f"deleted {made['id']}" in shown.out
    assert shown.code == 0


def test_lists_are_paged_and_all_follows_every_page(customer: Customer) -> None:
    ids = [customer.webhook()["id"] for _ in range(3)][::-1]
    first = customer.ask("webhooks", "list", "--limit", "2")
    assert [entry["id"] for entry in first["data"]] == ids[:2]
    rest = customer.ask("webhooks", "list", "--limit", "2", "--after", first["next"])
    assert [entry["id"] for entry in rest["data"]] == ids[2:]
    assert rest["has_more"] is False


def test_all_asks_until_there_is_no_more(customer: Customer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dispatcher.cli.client.PAGE_MAX", 2)
    ids = [customer.webhook()["id"] for _ in range(5)][::-1]
    everything = customer.ask("webhooks", "list", "--all")
    assert [entry["id"] for entry in everything["data"]] == ids
    assert everything["has_more"] is False


def test_people_get_a_table_without_anything_that_steers_their_terminal(customer: Customer, shell: Shell) -> None:
    made = customer.webhook("--description", "left\u202eright\u200bthere")
    shown = shell.run_on_terminal("trackpost", "webhooks", "list", env=customer.environ)
    assert made["id"] in shown.out
    assert URL in shown.out
    shown = shell.run_on_terminal("trackpost", "webhooks", "get", made["id"], env=customer.environ)
    assert "left\\u202eright\\u200bthere" in shown.out


def test_secret_on_the_command_line_is_warned_about_on_a_terminal(customer: Customer, shell: Shell) -> None:
    create = ("trackpost", "webhooks", "create", "--url", URL, "--events", "*", "--secret", "short")
    shown = shell.run_on_terminal(*create, env=customer.environ)
    assert shown.code == 0
    assert "--secret shows in ps" in shown.out
    assert "that secret is short" in shown.out


# ── what the API refuses ───────────────────────────────────────────────────────────────────────────────────────────


def test_each_wrong_field_is_shown_with_its_reason(customer: Customer) -> None:
    refused = customer("webhooks", "create", "--url", "http://10.0.0.1/", "--events", "email.deliverd,*")
    assert refused.exit_code == 1
    assert refused.stdout == ""
    assert "  url: " in refused.stderr
    assert '  events[0]: "email.deliverd" is not an event type: did you mean "email.delivered"?' in refused.stderr


def test_key_that_is_not_known_exits_4(customer: Customer) -> None:
    refused = customer("webhooks", "list", "--api-key", "tp_live_000000000000000000000000000000000")
    assert refused.exit_code == 4
    assert "unknown or revoked" in refused.stderr


def test_no_key_at_all_exits_4(tmp_path: Path) -> None:
    refused = CliRunner().invoke(main, ["webhooks", "list"], env={"HOME": str(tmp_path), "XDG_CONFIG_HOME": ""})
    assert refused.exit_code == 4
    assert "trackpost login" in refused.stderr


def test_server_that_is_not_there_exits_3(tmp_path: Path) -> None:
    with socket.socket() as probe:  # bound, but nobody listens
        probe.bind(("127.0.0.1", 0))
        customer = Customer(f"http://127.0.0.1:{probe.getsockname()[1]}", "tp_live_0", tmp_path)
        refused = customer("events", "list")
    assert refused.exit_code == 3
    assert "refused" in refused.stderr


@pytest.mark.parametrize("url", ["nonsense", "ftp://example.com", "https://"])
def test_url_that_is_none_exits_2(url: str, tmp_path: Path) -> None:
    assert Customer(url, "tp_live_0", tmp_path)("events", "list").exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["webhooks", "create", "--url", URL],
        ["webhooks", "create", "--url", URL, "--events", "*", "--secret", "a", "--no-secret"],
        ["webhooks", "create", "--url", URL, "--events", "*", "--header", "no-value"],
        ["webhooks", "list", "--limit", "0"],
        ["trigger", "email.sent", "--data", "[]"],
        ["trigger", "email.sent", "--data", "{}", "--set", "to=x"],
        ["completion", "tcsh"],
        ["verify", "--secret", "s", "--webhook-id", "x"],
        ["sign"],
    ],
)
def test_usage_mistakes_exit_2(arguments: list[str], tmp_path: Path) -> None:
    assert Customer("http://127.0.0.1:1", "tp_live_0", tmp_path)(*arguments, given="").exit_code == 2


# ── events ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_trigger_emits_the_sample_with_the_changes_named(customer: Customer) -> None:
    event = customer.ask(
        *("trigger", "email.clicked", "--set", "data.to=x@y.z", "--set", "data.location.city=Köln"),
        *("--set", "data.count=3", "--set", "data.zip=01234", "--set", "data.new.deep=true"),
    )
    sample = Catalogue.builtin().get("email.clicked")
    assert sample is not None
    changed = {"to": "x@y.z", "count": 3, "zip": "01234", "new": {"deep": True}}
    assert event["data"] == {**sample.sample, **changed, "location": {**sample.sample["location"], "city": "Köln"}}
    assert customer.ask("events", "get", event["id"]) == event
    assert [e["id"] for e in customer.ask("events", "list", "--type", "email.clicked")["data"]] == [event["id"]]
    assert customer.ask("events", "list", "--type", "email.sent")["data"] == []


def test_trigger_sends_own_data_to_the_byte(customer: Customer) -> None:
    sent = '{"big":  1.50, "a": 12345678901234567890.0}'
    result = customer("trigger", "own.type", "--data", "-", given=sent)
    assert f'"id":"{json.loads(result.stdout)["id"]}"' in result.stdout
    event_id = json.loads(result.stdout)["id"]
    assert customer.ask("events", "get", event_id)["data"] == json.loads(sent)


def test_trigger_changes_lists_by_place(customer: Customer) -> None:
    event = customer.ask("trigger", "a.b", "--data", '{"tags": ["x", "y"]}', "--set", "data.tags.1=z")
    assert event["data"] == {"tags": ["x", "z"]}
    assert customer("trigger", "a.b", "--data", '{"tags": ["x"]}', "--set", "data.tags.1=z").exit_code == 2


def test_trigger_knows_what_was_meant(customer: Customer) -> None:
    refused = customer("trigger", "email.deliverd")
    assert refused.exit_code == 2
    assert "did you mean email.delivered?" in refused.stderr


def test_idempotency_key_returns_the_first_event_and_refuses_another(customer: Customer) -> None:
    first = customer.ask("trigger", "email.sent", "--idempotency-key", "k")
    assert customer.ask("trigger", "email.sent", "--idempotency-key", "k")["id"] == first["id"]
    assert customer("trigger", "email.sent", "--set", "data.to=x", "--idempotency-key", "k").exit_code == 1


def test_types_are_the_catalogue(customer: Customer) -> None:
    assert [entry["name"] for entry in customer.ask("events", "types")["data"]] == list(Catalogue.builtin().names())
    one = customer.ask("events", "types", "email.bounced")
    assert set(one) >= {"name", "description", "schema", "sample"}


# ── login ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_login_stores_what_works_readable_by_its_owner_alone(customer: Customer, tmp_path: Path) -> None:
    env = {"TRACKPOST_API_KEY": "", "TRACKPOST_API_URL": "", "XDG_CONFIG_HOME": str(tmp_path / "xdg")}
    logged_in = customer("login", "--api-url", customer.url, given=f"{customer.key}\n", **env)
    assert logged_in.exit_code == 0, logged_in.stderr
    assert customer.key not in logged_in.output
    file = tmp_path / "xdg" / "trackpost" / "config.toml"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert customer("webhooks", "list", **env).exit_code == 0


def test_login_stores_nothing_that_does_not_work(customer: Customer, tmp_path: Path) -> None:
    refused = customer("login", "--api-url", customer.url, given="tp_live_000000000000000000000000000000000")
    assert refused.exit_code == 4
    assert list(tmp_path.rglob("config.toml")) == []


def test_flag_beats_environment_beats_file(tmp_path: Path) -> None:
    home = {"XDG_CONFIG_HOME": str(tmp_path)}
    write_profile("default", Access("https://file.example/v1", "file"), home)
    write_profile("other", Access("https://other.example/v1", "other"), home)
    env = home | {"TRACKPOST_API_URL": "https://env.example", "TRACKPOST_API_KEY": "env"}

    def found(environ: dict[str, str], **flags: str | None) -> tuple[str, str]:
        access = find_access(**({"url": None, "key": None, "profile": None} | flags), environ=environ)
        return access.url, access.key

    assert found(home) == ("https://file.example/v1", "file")
    assert found(env) == ("https://env.example", "env")
    assert found(env, url="https://flag.example", key="flag") == ("https://flag.example", "flag")
    assert found(env, profile="other") == ("https://other.example/v1", "other")
    assert found(home | {"TRACKPOST_PROFILE": "other"}) == ("https://other.example/v1", "other")
    assert found(home | {"TRACKPOST_API_KEY": "env"}) == ("https://file.example/v1", "env")


def test_profile_that_does_not_exist_exits_2(tmp_path: Path) -> None:
    customer = Customer("http://127.0.0.1:1", "tp_live_0", tmp_path)
    refused = customer("events", "list", "--profile", "nobody", XDG_CONFIG_HOME=str(tmp_path))
    assert refused.exit_code == 2
    assert "nobody" in refused.stderr


# ── signatures ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_sign_prints_what_others_verify(tmp_path: Path) -> None:
    body, secret = b'{"id":"evt_1"}', "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    (tmp_path / "body.json").write_bytes(body)
    signed = CliRunner().invoke(main, ["sign", "--secret", secret, str(tmp_path / "body.json")])
    headers = json.loads(signed.stdout)
    assert headers["webhook-id"] == "evt_1"
    assert headers["X-Trackpost-Signature"] == hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    assert Webhook(secret).verify(body, headers) == {"id": "evt_1"}


def test_verify_judges_both_schemes(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    runner, secret = CliRunner(), ["--secret-file", str(tmp_path / "secret")]
    headers = json.loads(runner.invoke(main, ["sign", *secret, "--webhook-timestamp", "1"], "body").stdout)
    standard = [
        *("--webhook-id", headers["webhook-id"], "--webhook-timestamp", headers["webhook-timestamp"]),
        *("--webhook-signature", headers["webhook-signature"]),
    ]
    both = ["verify", *secret, "--signature", headers["X-Trackpost-Signature"], *standard]
    assert json.loads(runner.invoke(main, [*both, "--ignore-age"], "body").stdout)["valid"] is True
    stale = runner.invoke(main, both, "body")
    assert stale.exit_code == 1
    verdicts = json.loads(stale.stdout)["signatures"]
    assert verdicts["X-Trackpost-Signature"]["valid"] is True
    assert verdicts["webhook-signature"]["verdict"] == "stale"
    other = runner.invoke(main, [*both, "--ignore-age"], "another body")
    assert other.exit_code == 1


@pytest.mark.parametrize(
    ("captured", "form", "says"),
    [
        (b'{"a":"\xc3\xa9"}\n', "{}", "without the line break"),
        (b'{"a": "\xc3\xa9"}', "{}", "without blanks: check the bytes as they came"),
        (b'{"a":"\xc3\xa9"}', "python", "as Python writes it"),
        (b'{"a":"\xc3\xa9"}', "sha256={}", "with nothing in front"),
        (b'{"a":"\xc3\xa9"}', "upper", "lower-case"),
        (b'{"a":"\xc3\xa9"}', "zz", "64 hexadecimal digits; these are 2"),
        (b'{"a":"another"}', "{}", ""),
        (b"no JSON", "{}", ""),
    ],
)
def test_verify_says_what_is_likely_wrong(captured: bytes, form: str, says: str) -> None:
    signed = b'{"a": "\\u00e9"}' if form == "python" else b'{"a":"\xc3\xa9"}'
    signature = hmac.new(SECRET.encode(), signed, hashlib.sha256).hexdigest()
    given = {"upper": signature.upper(), "python": signature, "zz": "zz"}.get(form) or form.format(signature)
    command = ["verify", "--secret", SECRET, "--signature", given]
    shown = CliRunner().invoke(main, command, captured)
    likely = json.loads(shown.stdout)["likely"]
    assert shown.exit_code == 1
    assert says in (likely or "")
    assert bool(says) is (likely is not None)


def test_verify_says_it_to_people_too(shell: Shell) -> None:
    (shell.home / "body").write_bytes(b"{}\n")
    signature = hmac.new(SECRET.encode(), b"{}", hashlib.sha256).hexdigest()
    shown = shell.run_on_terminal("trackpost", "verify", "--secret", SECRET, "--signature", signature, "body")
    assert shown.code == 1
    assert "without the line break" in shown.out


# ── completion ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shell_name", ["bash", "zsh", "fish"])
def test_completion_is_a_script_that_asks_this_program(shell_name: str) -> None:
    script = CliRunner().invoke(main, ["completion", shell_name])
    assert script.exit_code == 0
    assert "_TRACKPOST_COMPLETE" in script.stdout


def offered(words: str, program: Any = main, **env: str) -> list[str]:
    """What bash is told to offer for the last of these words."""
    name = program.name if program is not main else "trackpost"
    asked = {f"_{name.upper()}_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    result = CliRunner().invoke(program, [], env=asked | env, prog_name=name)
    return [line.partition(",")[2] for line in result.stdout.splitlines() if line]


def test_completion_answers(shell: Shell) -> None:
    env = {"_TRACKPOST_COMPLETE": "bash_complete", "COMP_WORDS": "trackpost webhooks pa", "COMP_CWORD": "2"}
    assert shell.run("trackpost", env=env).out == "plain,pause\n"


def test_completion_knows_event_types() -> None:
    assert offered("trackpost trigger email.c") == ["email.clicked", "email.complained"]
    assert offered("trackpost events types domain") == ["domain.verified"]


def test_completion_of_a_list_goes_on_behind_its_last_comma() -> None:
    assert offered("trackpost webhooks create --events email.sent,domain.") == [
        "email.sent,domain.*", "email.sent,domain.verified"
    ]  # fmt: skip
    assert "email.sent,email.sent" not in offered("trackpost webhooks create --events email.sent,email.s")


def test_completion_asks_the_api_for_webhooks(customer: Customer) -> None:
    ids = sorted(customer.webhook()["id"] for _ in range(2))
    assert sorted(offered("trackpost webhooks pause wh_", **customer.environ)) == ids
    assert offered(f"trackpost deliveries list {ids[0]}", **customer.environ) == ids[:1]


def test_completion_offers_nothing_where_it_cannot_know(tmp_path: Path) -> None:
    away = {"HOME": str(tmp_path), "TRACKPOST_API_URL": "http://127.0.0.1:1", "TRACKPOST_API_KEY": "tp_live_x"}
    assert offered("trackpost webhooks pause ", **away) == []
    assert offered("trackpost webhooks pause ", HOME=str(tmp_path), TRACKPOST_API_KEY="") == []


def test_completion_offers_profiles(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path)}
    write_profile("staging", Access("https://staging.example/v1", "tp_test_x"), environ)
    assert offered("trackpost webhooks list --profile st", **environ) == ["staging"]


def test_both_programs_complete() -> None:
    from dispatcher.cli.operator import main as operator

    operator.name = "dispatcher"
    assert offered("dispatcher ke", operator) == ["keys"]
    assert "_DISPATCHER_COMPLETE" in CliRunner().invoke(operator, ["completion", "zsh"]).stdout


# ── a busy API ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def refusing() -> Iterator[tuple[str, list[str], list[tuple[int, dict[str, str], bytes]]]]:
    """An API that answers from a list, and then with an empty page."""
    asked: list[str] = []
    answers: list[tuple[int, dict[str, str], bytes]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            page = (200, {}, b'{"data":[],"has_more":false,"next":null}')
            status, headers, body = answers.pop(0) if answers else page
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked, answers
        finally:
            server.shutdown()
            thread.join()


LIMITED = b'{"status":429,"code":"rate_limited","detail":"This API key makes too many requests."}'


def test_who_is_told_when_to_come_back_does(refusing: Any) -> None:
    url, asked, answers = refusing
    answers += [(429, {"Retry-After": "1"}, LIMITED)] * 2
    result = CliRunner().invoke(main, ["webhooks", "list", "--api-url", url, "--api-key", "tp_live_x"])
    assert (result.exit_code, json.loads(result.stdout)["data"], len(asked)) == (0, [], 3)


@pytest.mark.parametrize("headers", [{}, {"Retry-After": "3600"}, {"Retry-After": "soon"}])
def test_who_is_not_or_would_wait_too_long_gives_up(refusing: Any, headers: dict[str, str]) -> None:
    url, asked, answers = refusing
    answers.append((429, headers, LIMITED))
    result = CliRunner().invoke(main, ["webhooks", "list", "--api-url", url, "--api-key", "tp_live_x"])
    assert (result.exit_code, len(asked)) == (1, 1)
    assert "too many requests" in result.stderr


def test_patience_ends(refusing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PATIENCE", 1)
    url, asked, answers = refusing
    answers += [(429, {"Retry-After": "0"}, LIMITED)] * 5
    result = CliRunner().invoke(main, ["webhooks", "list", "--api-url", url, "--api-key", "tp_live_x"])
    assert (result.exit_code, len(asked)) == (1, 2)


@pytest.mark.parametrize("limit", [2, 3, 20])
def test_a_page_is_as_long_as_was_asked_for_though_the_api_looks_at_a_part_at_a_time(refusing: Any, limit: int) -> None:
    url, asked, answers = refusing
    pages = [([], "b"), ([1], "c"), ([], "d"), ([2, 3][: limit - 1], "e" if limit < 3 else None)]
    for entries, after in pages:
        data = [{"id": f"evt_{n}"} for n in entries]
        answers.append((200, {}, json.dumps({"data": data, "has_more": bool(after), "next": after}).encode()))
    command = ["events", "list", "--type", "rare", "--limit", str(limit), "--api-url", url, "--api-key", "tp_live_x"]
    found = json.loads(CliRunner().invoke(main, command).stdout)
    assert [entry["id"] for entry in found["data"]] == ["evt_1", "evt_2", "evt_3"][:limit]
    assert (found["has_more"], found["next"]) == ((True, "e") if limit < 3 else (False, None))
    assert [path.partition("after=")[2] for path in asked] == ["", "b", "c", "d"]
    assert f"limit={limit - 1}" in asked[-1]


def test_whoever_has_looked_long_enough_says_how_to_go_on(refusing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dispatcher.cli.asking.LOOK_S", 0.0)
    url, asked, answers = refusing
    answers.append((200, {}, b'{"data":[],"has_more":true,"next":"evt_9"}'))
    found = json.loads(CliRunner().invoke(main, ["events", "list", "--api-url", url, "--api-key", "tp_live_x"]).stdout)
    assert (found, len(asked)) == ({"data": [], "has_more": True, "next": "evt_9"}, 1)


def test_all_is_printed_as_it_comes_and_ends_with_its_reader(refusing: Any, shell: Shell) -> None:
    url, asked, answers = refusing
    entries = [{"id": f"evt_{n}", "data": {"text": "x" * 2000}} for n in range(100)]
    page = json.dumps({"data": entries, "has_more": True, "next": "evt_1"}).encode()
    answers += [(200, {}, page)] * 1000
    env = {"TRACKPOST_API_URL": url, "TRACKPOST_API_KEY": "tp_live_x"}
    with shell.start("trackpost", "events", "list", "--all", env=env) as process:
        assert process.stdout is not None
        assert process.stdout.read(20) == '{"data":[{"id":"evt_'
        process.stdout.close()
        assert process.wait(60) == 1
    assert 0 < len(asked) < 1000
