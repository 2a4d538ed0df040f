"""`trackpost`, the customer's command line: webhooks and events of one account, over the REST API alone.

Everything below the commands is imported when a command needs it, so that `--help` and completion stay instant.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, Final

import click

from dispatcher import __version__
from dispatcher.cli.output import (
    FAILED,
    HELP,
    MISUSED,
    Failure,
    Program,
    debug_option,
    decoded,
    examples,
    file_argument,
    for_programs,
    hint,
    json_option,
    print_json,
    print_record,
    print_table,
    refuse,
    text_argument,
    warn,
)

if TYPE_CHECKING:
    from dispatcher.cli.client import Api

COMPLETION_VARIABLE: Final = "_TRACKPOST_COMPLETE"
RESETTABLE: Final = ("retry", "max_concurrency", "rate_limit", "timeout_s")
SECRET_ADVISED_CHARACTERS: Final = 24


@click.group(
    cls=Program,
    context_settings=HELP,
    epilog=examples(
        "trackpost login",
        "trackpost webhooks create --url https://yourapp.com/webhooks/trackpost --events email.delivered,email.bounced",
        "trackpost trigger email.bounced --set data.to=someone@example.com",
    ),
)
@click.version_option(__version__, prog_name="trackpost")
@debug_option
def main() -> None:
    """Webhooks of your account: register them, emit events, check signatures.

    API and key come from --api-url and --api-key, else TRACKPOST_API_URL and TRACKPOST_API_KEY, else the profile that
    `trackpost login` stored ($XDG_CONFIG_HOME/trackpost/config.toml).

    Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 cannot reach the server, 4 not authorised.
    """


# ── access ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def access_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options by which a command finds the API."""
    for option in (
        click.option(
            "--profile", metavar="NAME", help="Which stored login to use. [default: $TRACKPOST_PROFILE, else default]"
        ),
        click.option("--api-key", metavar="KEY", help="The API key. Shows in ps and in the shell's history."),
        click.option("--api-url", metavar="URL", help="Where the API is."),
    ):
        command = option(command)
    return command


def connected(act: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A command that asks the API: `act` gets it as its first argument."""

    @access_options
    @functools.wraps(act)
    def command(*args: Any, api_url: str | None, api_key: str | None, profile: str | None, **options: Any) -> None:
        import asyncio

        from dispatcher.cli.client import Api
        from dispatcher.cli.profiles import find_access

        access = find_access(url=api_url, key=api_key, profile=profile)
        api = Api(access.url, access.key)
        if api.is_exposed:
            warn(f"{api.url} is not https: whoever is in between can read your key")

        async def run() -> None:
            async with api:
                await act(api, *args, **options)

        asyncio.run(run())

    return command


@main.command(
    epilog=examples(
        "trackpost login",
        "trackpost login --profile staging --api-url https://hooks.staging.example",
        "trackpost login < key.txt",
    )
)
@click.option("--profile", default="default", show_default=True, metavar="NAME", help="Under which name to store it.")
@click.option("--api-key", metavar="KEY", help="The API key. Better typed when asked, or on standard input.")
@click.option(
    "--api-url", metavar="URL", help="Where the API is. [default: $TRACKPOST_API_URL, else the public service]"
)
@json_option
def login(profile: str, api_key: str | None, api_url: str | None, as_json: bool) -> None:
    """Store API and key for the commands to come.

    The key is tried first, and stored only if the API takes it, in a file only you can read.
    """
    import asyncio

    from dispatcher.cli.client import Api
    from dispatcher.cli.profiles import URL, Access, is_profile_name, write_profile

    if not is_profile_name(profile):
        refuse("expected letters, digits, - and _", "--profile")
    api = Api(api_url or os.environ.get("TRACKPOST_API_URL") or URL, api_key or _typed_key())

    async def check() -> None:
        async with api:
            await api.call("GET", "webhooks", query={"limit": 1})

    asyncio.run(check())
    path = write_profile(profile, Access(api.url, api.key))
    if for_programs(as_json):
        print_json({"profile": profile, "url": api.url, "file": str(path)})
    else:
        click.echo(f"logged in to {api.url}; stored as {profile} in {path}")


def _typed_key() -> str:
    if sys.stdin.isatty():
        key: str = click.prompt("API key", hide_input=True, err=True)
    else:
        key = file_argument("-", "--api-key").decode("utf-8", "replace")
    if not key.strip():
        refuse("expected a key on standard input", "--api-key")
    return key.strip()


# ── webhooks ───────────────────────────────────────────────────────────────────────────────────────────────────────


@main.group()
def webhooks() -> None:
    """Your webhooks: URLs of yours that events are sent to."""


def settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The settings that create and update share."""
    for option in (
        click.option("--timeout", type=float, metavar="SECONDS", help="How long a request may take, start to end."),
        click.option("--ordered/--no-ordered", default=None, help="One at a time, in the order of the events."),
        click.option("--rate-limit", type=float, metavar="N", help="Requests per second, at most."),
        click.option("--max-concurrency", type=int, metavar="N", help="Requests at once, at most."),
        click.option(
            "--retry",
            metavar="SCHEDULE",
            help="Delays like 1m,10m,1h, or the name of a preset: standard, none, default.",
        ),
        click.option(
            "--body-style",
            type=click.Choice(["compact", "python"]),
            help="compact verifies with JSON.stringify (Express, Lambda), python with json.dumps (Flask).",
        ),
        click.option(
            "--header", "headers", multiple=True, metavar="NAME=VALUE", help="Sent with each request. Repeatable."
        ),
        click.option("--description", metavar="TEXT", help="For you."),
        click.option("--no-secret", is_flag=True, help="Requests without a signature."),
        click.option("--secret-file", metavar="FILE|-", help="A file with the secret, or standard input."),
        click.option(
            "--secret", metavar="SECRET", help="The secret to sign with. Shows in ps and in the shell's history."
        ),
    ):
        command = option(command)
    return command


events_option = functools.partial(
    click.option, "--events", multiple=True, metavar="A,B", help="Event types, * for all, or prefixes like email.*"
)


@webhooks.command(
    "create",
    epilog=examples(
        "trackpost webhooks create --url https://yourapp.com/hooks --events email.delivered,email.bounced",
        "trackpost webhooks create --url https://yourapp.com/hooks --events 'email.*' --secret-file secret.txt",
        "trackpost webhooks create --url https://yourapp.com/hooks --events '*' --body-style python --retry 10s,1m,1h",
    ),
)
@click.option("--url", required=True, help="Your endpoint; https.")
@events_option(required=True)
@settings_options
@json_option
@connected
async def create_webhook(api: Api, *, url: str, events: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Register a URL for events.

    Without --secret or --secret-file, a secret is made and printed: put it where your handler finds it.
    """
    made = await api.call("POST", "webhooks", body={"url": url, "events": _listed(events), **_settings(options)})
    if for_programs(as_json):
        print_json(made)
        return
    print_record(made)
    if made.get("secret"):
        hint("Give the secret to your handler: requests are signed with it.")


@webhooks.command("update", epilog=examples("trackpost webhooks update wh_… --events '*' --reset rate_limit"))
@click.argument("webhook_id", metavar="ID")
@click.option("--url", help="Your endpoint; https.")
@events_option()
@settings_options
@click.option("--no-headers", is_flag=True, help="Send none of your own headers any more.")
@click.option("--reset", multiple=True, type=click.Choice(RESETTABLE), help="Back to the default. Repeatable.")
@json_option
@connected
async def update_webhook(
    api: Api,
    webhook_id: str,
    *,
    url: str | None,
    events: tuple[str, ...],
    no_headers: bool,
    reset: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Change what you name and leave the rest. --events and --header replace what was there."""
    change = {**_settings(options), **dict.fromkeys(reset)}
    if url is not None:
        change["url"] = url
    if events:
        change["events"] = _listed(events)
    if no_headers:
        change["headers"] = {}
    if not change:
        raise click.UsageError("nothing to change: name at least one setting")
    _show_one(await api.call("PATCH", "webhooks", webhook_id, body=change), as_json)


def _listed(events: tuple[str, ...]) -> list[str]:
    return [name.strip() for text in events for name in text.split(",") if name.strip()]


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the options say, as the API takes it."""
    said: dict[str, Any] = {
        "description": options["description"],
        "headers": _headers(options["headers"]),
        "body_style": options["body_style"],
        "retry": _retry(options["retry"]),
        "max_concurrency": options["max_concurrency"],
        "rate_limit": options["rate_limit"],
        "ordered": options["ordered"],
        "timeout_s": options["timeout"],
    }
    return {name: value for name, value in said.items() if value is not None} | _secret(options)


def _headers(given: tuple[str, ...]) -> dict[str, str] | None:
    headers = {}
    for text in given:
        name, separator, value = text.partition("=")
        if not separator or not name:
            refuse(f"{text!r}: expected NAME=VALUE", "--header")
        headers[name] = value
    return headers or None


def _retry(text: str | None) -> str | list[str] | None:
    """A preset has a name; delays begin with a digit."""
    if text is None:
        return None
    return [part.strip() for part in text.split(",")] if text[:1].isdigit() else text


def _secret(options: Mapping[str, Any]) -> dict[str, str | None]:
    secret, file, none = options["secret"], options["secret_file"], options["no_secret"]
    if sum((secret is not None, file is not None, none)) > 1:
        raise click.UsageError("--secret, --secret-file and --no-secret exclude each other")
    if none:
        return {"secret": None}
    if secret is None and file is None:
        return {}
    secret = _read_secret(secret, file)
    if len(secret) < SECRET_ADVISED_CHARACTERS:
        warn(f"that secret is short: {SECRET_ADVISED_CHARACTERS} random characters or more are hard to guess")
    return {"secret": secret}


def _read_secret(secret: str | None, file: str | None) -> str:
    """The secret of one of the two options; a file's last line break is not part of it."""
    if file is not None:
        return decoded(file_argument(file, "--secret-file"), "--secret-file").rstrip("\r\n")
    assert secret is not None, "one of them was given"
    warn("--secret shows in ps and in the shell's history; --secret-file does not")
    return decoded(os.fsencode(secret), "--secret")


@webhooks.command(
    "list", epilog=examples("trackpost webhooks list", "trackpost webhooks list --all --json | jq -r '.data[].url'")
)
@click.option("--limit", type=click.IntRange(1, 100), default=20, show_default=True, help="How many.")
@click.option("--after", metavar="CURSOR", help="Those that follow: the `next` of the page before.")
@click.option("--all", "every", is_flag=True, help="All of them.")
@json_option
@connected
async def list_webhooks(api: Api, *, limit: int, after: str | None, every: bool, as_json: bool) -> None:
    """List your webhooks, newest first."""
    page = await _browse(api, "webhooks", query=_part(limit, after), every=every)
    if for_programs(as_json):
        print_json(page)
        return
    print_table(
        ("id", "status", "url", "events", "why"),
        (
            (w["id"], w["status"], w["url"], w["events"], w["disabled_reason"] or w["last_error"] or "")
            for w in page["data"]
        ),
        empty="no webhooks yet: trackpost webhooks create --url URL --events A,B",
    )
    _tell_more(page)


@webhooks.command("get")
@click.argument("webhook_id", metavar="ID")
@click.option("--show-secret", is_flag=True, help="With the secret its requests are signed with.")
@json_option
@connected
async def get_webhook(api: Api, webhook_id: str, *, show_secret: bool, as_json: bool) -> None:
    """Show one webhook with every setting as it is in effect."""
    found = await api.call("GET", "webhooks", webhook_id)
    if show_secret:
        found |= await api.call("GET", "webhooks", webhook_id, "secret")
    _show_one(found, as_json)


@webhooks.command("delete", epilog=examples("trackpost webhooks delete wh_…", "trackpost webhooks delete wh_… --yes"))
@click.argument("webhook_id", metavar="ID")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@json_option
@connected
async def delete_webhook(api: Api, webhook_id: str, *, yes: bool, as_json: bool) -> None:
    """Remove a webhook and everything that still waits to be sent to it.

    Asks first; where nobody can answer, --yes is needed. To hold events back instead, pause it.
    """
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("deleting cannot be undone: confirm with --yes")
        found = await api.call("GET", "webhooks", webhook_id)
        click.confirm(f"Delete {webhook_id}, {found['url']}, and what waits for it?", abort=True, err=True)
    await api.call("DELETE", "webhooks", webhook_id)
    if for_programs(as_json):
        print_json({"id": webhook_id, "deleted": True})
    else:
        click.echo(f"deleted {webhook_id}")


@webhooks.command("pause")
@click.argument("webhook_id", metavar="ID")
@json_option
@connected
async def pause_webhook(api: Api, webhook_id: str, *, as_json: bool) -> None:
    """Stop sending and hold what comes, until it is resumed."""
    _show_status(await api.call("POST", "webhooks", webhook_id, "pause"), as_json)


@webhooks.command("resume")
@click.argument("webhook_id", metavar="ID")
@json_option
@connected
async def resume_webhook(api: Api, webhook_id: str, *, as_json: bool) -> None:
    """Send again, first what was held, in order of age. Activates a disabled webhook, too."""
    _show_status(await api.call("POST", "webhooks", webhook_id, "resume"), as_json)


def _show_status(webhook: Mapping[str, Any], as_json: bool) -> None:
    if for_programs(as_json):
        print_json(webhook)
    else:
        click.echo(f"{webhook['id']} is {webhook['status']}")


# ── events ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@main.group()
def events() -> None:
    """Events of your account, and the types there are."""


@events.command("list", epilog=examples("trackpost events list --type email.bounced --limit 5"))
@click.option("--type", "type_", metavar="TYPE", help="Only events of this type.")
@click.option("--limit", type=click.IntRange(1, 100), default=20, show_default=True, help="How many.")
@click.option("--after", metavar="CURSOR", help="Those that follow: the `next` of the page before.")
@click.option("--all", "every", is_flag=True, help="All of them.")
@json_option
@connected
async def list_events(
    api: Api, *, type_: str | None, limit: int, after: str | None, every: bool, as_json: bool
) -> None:
    """List events, newest first."""
    query = _part(limit, after) | ({"type": type_} if type_ else {})
    page = await _browse(api, "events", query=query, every=every)
    if for_programs(as_json):
        print_json(page)
        return
    print_table(
        ("id", "type", "created", "status", "why"),
        ((e["id"], e["type"], e["created_at"], e["status"], e["reason"] or "") for e in page["data"]),
        empty="no events",
    )
    _tell_more(page)


@events.command("get")
@click.argument("event_id", metavar="ID")
@json_option
@connected
async def get_event(api: Api, event_id: str, *, as_json: bool) -> None:
    """Show one event with its data."""
    event = await api.call("GET", "events", event_id)
    if for_programs(as_json):
        print_json(event)
        return
    print_record({name: value for name, value in event.items() if name != "data" and value is not None})
    print_json(event["data"])


@events.command("types", epilog=examples("trackpost events types", "trackpost events types email.bounced"))
@click.argument("type_", metavar="[TYPE]", required=False)
@json_option
@connected
async def list_types(api: Api, type_: str | None, *, as_json: bool) -> None:
    """List the event types there are; with TYPE, show its schema and a sample."""
    page = await api.call("GET", "event-types")
    if type_ is not None:
        found = _type_of(page, type_)
        if for_programs(as_json):
            print_json(found)
        else:
            print_record({name: found[name] for name in ("name", "description", "when") if found.get(name)})
            print_json({"sample": found["sample"], "schema": found["schema"]})
    elif for_programs(as_json):
        print_json(page)
    else:
        print_table(
            ("type", "description", "when"), ((t["name"], t["description"], t.get("when", "")) for t in page["data"])
        )


def _type_of(catalogue: Mapping[str, Any], name: str) -> dict[str, Any]:
    import difflib

    found: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in catalogue["data"]}
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1)
        advice = f"did you mean {near[0]}?" if near else "trackpost events types lists those that are"
        raise Failure(f"{name!r} is not in the catalogue: {advice}", MISUSED)
    return found[name]


@main.command(
    epilog=examples(
        "trackpost trigger email.delivered",
        "trackpost trigger email.bounced --set data.to=x@y.z --set data.location.city=Berlin",
        "trackpost trigger invoice.paid --data @invoice.json --idempotency-key invoice-17",
    )
)
@click.argument("type_", metavar="TYPE")
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="PATH=VALUE",
    help="Change the sample: data.to=x@y.z. Repeatable; JSON or text.",
)
@click.option("--data", metavar="JSON|@FILE|-", help="Your own data in place of the sample.")
@click.option("--idempotency-key", metavar="KEY", help="Used again within 24 hours, it returns the first event.")
@json_option
@connected
async def trigger(
    api: Api, type_: str, *, changes: tuple[str, ...], data: str | None, idempotency_key: str | None, as_json: bool
) -> None:
    """Emit an event: the catalogue's sample of TYPE, with the changes you name.

    It is a real event, and goes to every webhook of yours that asks for its type.
    """
    text = None if data is None else text_argument(data, "--data")
    if text is None or changes:
        base = _type_of(await api.call("GET", "event-types"), type_)["sample"] if text is None else _json_object(text)
        text = json.dumps(_changed(base, changes))
    else:
        _json_object(text)
    # The data's own text is sent, to the byte: parsing and printing would change numbers.
    body = b'{"type":%b,"data":%b}' % (json.dumps(type_).encode(), text.encode())
    headers = {"Idempotency-Key": idempotency_key} if idempotency_key is not None else {}
    event = await api.call("POST", "events", body=body, headers=headers)
    if for_programs(as_json):
        print_json(event)
    else:
        click.echo(event["id"])


def _json_object(text: str) -> Any:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        refuse(f"expected JSON: {error}", "--data")
    if not isinstance(document, dict):
        refuse("expected a JSON object", "--data")
    return document


def _changed(data: Any, changes: tuple[str, ...]) -> Any:
    """The data with each `data.PATH=VALUE` done to it."""
    whole = {"data": data}
    for text in changes:
        path, separator, value = text.partition("=")
        steps = path.split(".")
        if not separator or steps[0] != "data" or len(steps) < 2 or "" in steps:
            refuse(f"{text!r}: expected data.FIELD=VALUE", "--set")
        place: Any = whole
        for step in steps[:-1]:
            place = _below(place, step, text)
        if isinstance(place, list):
            place[_index(place, steps[-1], text)] = _value(value)
        else:
            place[steps[-1]] = _value(value)
    return whole["data"]


def _below(place: Any, step: str, text: str) -> Any:
    """What is under `step`; made, if it was not there."""
    below = place[_index(place, step, text)] if isinstance(place, list) else place.setdefault(step, {})
    if not isinstance(below, dict | list):
        refuse(f"{text!r}: {step} is neither an object nor a list", "--set")
    return below


def _index(place: list[Any], step: str, text: str) -> int:
    if not step.isdecimal() or int(step) >= len(place):
        refuse(f"{text!r}: {step} is no place in a list of {len(place)}", "--set")
    return int(step)


def _value(text: str) -> Any:
    """JSON if it is any, else the text itself: `01234` and `x@y.z` are texts, `3` and `true` are not."""
    try:
        return json.loads(text, parse_constant=str)
    except ValueError:
        return text


# ── signatures ─────────────────────────────────────────────────────────────────────────────────────────────────────


def secret_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Where the secret comes from."""
    for option in (
        click.option("--secret-file", metavar="FILE", help="A file with the secret."),
        click.option("--secret", metavar="SECRET", help="The secret. Shows in ps and in the shell's history."),
    ):
        command = option(command)
    return command


def _given_secret(secret: str | None, file: str | None, body: str) -> str:
    if (secret is None) == (file is None):
        raise click.UsageError("name the secret, by --secret-file or --secret")
    if file == "-" and body == "-":
        raise click.UsageError("secret and body cannot both come from standard input")
    found = _read_secret(secret, file)
    if not found:
        refuse("expected a secret that is not empty", "--secret")
    return found


@main.command(
    epilog=examples(
        "trackpost sign --secret-file secret.txt body.json",
        "trackpost sign --secret-file secret.txt body.json --json | jq -r '.\"X-Trackpost-Signature\"'",
    )
)
@click.argument("file", default="-")
@secret_options
@click.option("--webhook-id", metavar="ID", help="[default: the id in the body, else msg_0]")
@click.option("--webhook-timestamp", type=click.IntRange(0), metavar="UNIX", help="[default: now]")
@json_option
def sign(
    *,
    file: str,
    secret: str | None,
    secret_file: str | None,
    webhook_id: str | None,
    webhook_timestamp: int | None,
    as_json: bool,
) -> None:
    """Print the signature headers of a body (FILE, or standard input), as they would be sent.

    The body is signed to the byte: a line break at the end of the file belongs to it.
    """
    from dispatcher.core.signing import Signer

    signer = Signer(_given_secret(secret, secret_file, file))
    body = file_argument(file, "FILE")
    id_ = webhook_id or _id_in(body) or "msg_0"
    at = str(int(time.time()) if webhook_timestamp is None else webhook_timestamp)
    headers = {
        "X-Trackpost-Signature": signer.legacy(body).decode(),
        "webhook-id": id_,
        "webhook-timestamp": at,
        "webhook-signature": signer.standard(id_.encode(), at.encode(), body).decode(),
    }
    if for_programs(as_json):
        print_json(headers)
    else:
        click.echo("\n".join(f"{name}: {value}" for name, value in headers.items()))


def _id_in(body: bytes) -> str | None:
    try:
        found = json.loads(body)["id"]
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    return found if isinstance(found, str) and found.isprintable() else None


@main.command(
    epilog=examples(
        "trackpost verify --secret-file secret.txt --signature 5f0c… body.json",
        "trackpost verify --secret-file secret.txt --webhook-id evt_… --webhook-timestamp 1736937002 \\",
        "                 --webhook-signature 'v1,K5oZ…' body.json",
    )
)
@click.argument("file", default="-")
@secret_options
@click.option("--signature", metavar="HEX", help="The value of X-Trackpost-Signature.")
@click.option("--webhook-id", metavar="ID", help="The value of webhook-id.")
@click.option("--webhook-timestamp", metavar="UNIX", help="The value of webhook-timestamp.")
@click.option("--webhook-signature", metavar="V1", help="The value of webhook-signature.")
@click.option("--ignore-age", is_flag=True, help="Do not mind a webhook-timestamp more than 5 minutes away.")
@json_option
def verify(
    *,
    file: str,
    secret: str | None,
    secret_file: str | None,
    signature: str | None,
    webhook_id: str | None,
    webhook_timestamp: str | None,
    webhook_signature: str | None,
    ignore_age: bool,
    as_json: bool,
) -> None:
    """Check the signature of a body (FILE, or standard input): the exit code is 0 if it is valid, 1 if not.

    Give --signature, or all of --webhook-id, --webhook-timestamp and --webhook-signature, or all four.
    """
    from dispatcher.core.signing import Signer, Verdict

    standard = (webhook_id, webhook_timestamp, webhook_signature)
    if any(standard) and not all(standard):
        raise click.UsageError("--webhook-id, --webhook-timestamp and --webhook-signature belong together")
    if signature is None and not all(standard):
        raise click.UsageError("nothing to check: give --signature, or the three --webhook-… options")
    signer = Signer(_given_secret(secret, secret_file, file))
    body = file_argument(file, "FILE")

    def judge(body: bytes) -> dict[str, Verdict]:
        verdicts = {}
        if signature is not None:
            verdicts["X-Trackpost-Signature"] = signer.verify_legacy(body, signature.strip())
        if webhook_id and webhook_timestamp and webhook_signature:
            tolerance_s = float("inf") if ignore_age else 300.0
            verdicts["webhook-signature"] = signer.verify_standard(
                webhook_id, webhook_timestamp, body, webhook_signature, now=time.time(), tolerance_s=tolerance_s
            )
        return verdicts

    verdicts = judge(body)
    if for_programs(as_json):
        shown = {
            name: {"valid": bool(v), "verdict": v.name.lower(), "message": v.value} for name, v in verdicts.items()
        }
        print_json({"valid": all(verdicts.values()), "signatures": shown})
    else:
        click.echo("\n".join(f"{name}: {verdict.value}" for name, verdict in verdicts.items()))
    if not all(verdicts.values()):
        if body.endswith(b"\n") and all(judge(body.rstrip(b"\r\n")).values()):
            hint("It is valid without the line break at the end of the file, which an editor may have added.")
        click.get_current_context().exit(FAILED)


# ── completion ─────────────────────────────────────────────────────────────────────────────────────────────────────


@main.command(
    epilog=examples(
        "trackpost completion bash > ~/.local/share/bash-completion/completions/trackpost",
        "trackpost completion zsh > ~/.zfunc/_trackpost",
        "trackpost completion fish > ~/.config/fish/completions/trackpost.fish",
    )
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what teaches a shell to complete this command line."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None, "click knows these shells"
    click.echo(found(main, {}, "trackpost", COMPLETION_VARIABLE).source())


# ── lists and records ──────────────────────────────────────────────────────────────────────────────────────────────


def _part(limit: int, after: str | None) -> dict[str, str | int]:
    return {"limit": limit, **({"after": after} if after else {})}


async def _browse(api: Api, *path: str, query: dict[str, str | int], every: bool) -> dict[str, Any]:
    """A page of a list; with `every`, all that follow in one."""
    from dispatcher.cli.client import PAGE_MAX

    if not every:
        page: dict[str, Any] = await api.call("GET", *path, query=query)
        return page
    data = [entry async for entry in _entries(api, *path, query={**query, "limit": PAGE_MAX})]
    return {"data": data, "has_more": False, "next": None}


async def _entries(api: Api, *path: str, query: dict[str, str | int]) -> AsyncIterator[Any]:
    async for page in api.pages(*path, query=query):
        for entry in page["data"]:
            yield entry


def _tell_more(page: Mapping[str, Any]) -> None:
    if page["has_more"]:
        hint(f"There are more: --after {page['next']}, or --all.")


def _show_one(record: Mapping[str, Any], as_json: bool) -> None:
    if for_programs(as_json):
        print_json(record)
    else:
        print_record(record)
