"""`trackpost webhooks`: where events are sent to."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import click

from dispatcher.cli.asking import browse, connected, part, read_secret, show_one, tell_more
from dispatcher.cli.output import (
    examples,
    for_programs,
    hint,
    json_option,
    print_json,
    print_record,
    print_table,
    refuse,
    warn,
)

if TYPE_CHECKING:
    from dispatcher.cli.client import Api

RESETTABLE: Final = ("retry", "max_concurrency", "rate_limit", "timeout_s")
SECRET_ADVISED_CHARACTERS: Final = 24


@click.group()
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
    show_one(await api.call("PATCH", "webhooks", webhook_id, body=change), as_json)


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
    secret = read_secret(secret, file)
    if len(secret) < SECRET_ADVISED_CHARACTERS:
        warn(f"that secret is short: {SECRET_ADVISED_CHARACTERS} random characters or more are hard to guess")
    return {"secret": secret}


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
    page = await browse(api, "webhooks", query=part(limit, after), every=every)
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
    tell_more(page)


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
    show_one(found, as_json)


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
