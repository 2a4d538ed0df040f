"""`trackpost webhooks`: where events are sent to."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import click

from dispatcher.cli.asking import browse, connected, part, read_secret, show_one, tell_more
from dispatcher.cli.completing import event_filters, event_types, webhook_ids
from dispatcher.cli.output import (
    FAILED,
    Failure,
    examples,
    for_programs,
    hint,
    is_plain,
    json_option,
    print_json,
    print_record,
    print_table,
    refuse,
    since,
    text_argument,
    warn,
)

if TYPE_CHECKING:
    from dispatcher.cli.client import Api

RESETTABLE: Final = ("retry", "max_concurrency", "rate_limit", "timeout_s")
SECRET_ADVISED_CHARACTERS: Final = 24
WATCH_S: Final = 0.5


@click.group()
def webhooks() -> None:
    """Your webhooks: URLs of yours that events are sent to.

    A webhook is `active`, `paused` (it holds its events until it is resumed) or `disabled` (it receives none; `get`
    says why). IDs begin with wh_, and your shell completes them: see `trackpost completion`.
    """


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
        click.option("--description", metavar="WORDS", help="What it is for; only you see it."),
        click.option("--no-secret", is_flag=True, help="Send requests without a signature."),
        click.option(
            "--secret-file", type=click.Path(), metavar="FILE|-", help="A file with the secret, or standard input."
        ),
        click.option(
            "--secret", metavar="SECRET", help="The secret to sign with. Shows in ps and in the shell's history."
        ),
    ):
        command = option(command)
    return command


events_option = functools.partial(
    click.option,
    "--events",
    multiple=True,
    metavar="A,B",
    shell_complete=event_filters,
    help="Event types, * for all, or prefixes like email.*",
)


@webhooks.command(
    "create",
    epilog=examples(
        "trackpost webhooks create --url https://yourapp.com/hooks --events email.delivered,email.bounced",
        "trackpost webhooks create --url https://yourapp.com/hooks --events 'email.*' --secret-file secret.txt",
        "trackpost webhooks create --url https://yourapp.com/hooks --events '*' --body-style python --retry 10s,1m,1h",
    ),
)
@click.option("--url", required=True, metavar="URL", help="Your endpoint; https.")
@events_option(required=True)
@settings_options
@json_option
@connected
async def create_webhook(api: Api, *, url: str, events: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Register a URL for events.

    From then on, each event whose type is asked for is posted there, signed with the webhook's secret. Without --secret
    or --secret-file, a secret is made and printed: put it where your handler finds it. `get --show-secret` shows it
    again.

    The URL must be https and public. To receive events on your own machine, `trackpost listen` needs no webhook at all.
    Settings you do not name follow the service's defaults, also when those change.
    """
    made = await api.call("POST", "webhooks", body={"url": url, "events": _listed(events), **_settings(options)})
    if for_programs(as_json):
        print_json(made)
        return
    print_record(made)
    if made.get("secret"):
        hint("Give the secret to your handler: requests are signed with it.")


@webhooks.command("update", epilog=examples("trackpost webhooks update wh_… --events '*' --reset rate_limit"))
@click.argument("webhook_id", metavar="ID", shell_complete=webhook_ids)
@click.option("--url", metavar="URL", help="Your endpoint; https.")
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
    """Change what you name and leave the rest.

    --events and --header replace what was there. A new URL, secret or body style counts for everything that is sent
    from now on, retries included. A secret given here replaces the old one at once: `rotate-secret` lets both sign for
    a while.
    """
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
    """List your webhooks, newest first.

    `why` is the reason why a webhook is disabled, else its last error.
    """
    page = await browse(api, "webhooks", query=part(limit, after), every=every, as_json=as_json)
    if page is None:
        return
    print_table(
        ("id", "status", "url", "events", "why"),
        (
            (w["id"], w["status"], w["url"], w["events"], w["disabled_reason"] or w["last_error"] or "")
            for w in page["data"]
        ),
        empty="no webhooks yet: trackpost webhooks create --url URL --events A,B",
        folding=("url", "events", "why"),
    )
    tell_more(page)


@webhooks.command("get", epilog=examples("trackpost webhooks get wh_…", "trackpost webhooks get wh_… --show-secret"))
@click.argument("webhook_id", metavar="ID", shell_complete=webhook_ids)
@click.option("--show-secret", is_flag=True, help="With the secret its requests are signed with.")
@json_option
@connected
async def get_webhook(api: Api, webhook_id: str, *, show_secret: bool, as_json: bool) -> None:
    """Show one webhook with every setting as it is in effect.

    The secret is shown only with --show-secret.
    """
    found = await api.call("GET", "webhooks", webhook_id)
    if show_secret:
        found |= await api.call("GET", "webhooks", webhook_id, "secret")
    show_one(found, as_json)


@webhooks.command("delete", epilog=examples("trackpost webhooks delete wh_…", "trackpost webhooks delete wh_… --yes"))
@click.argument("webhook_id", metavar="ID", shell_complete=webhook_ids)
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@json_option
@connected
async def delete_webhook(api: Api, webhook_id: str, *, yes: bool, as_json: bool) -> None:
    """Remove a webhook and what waits for it.

    Asks first; where nobody can answer, --yes is needed. It cannot be undone. To hold events back instead, pause it.
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


@webhooks.command("pause", epilog=examples("trackpost webhooks pause wh_…"))
@click.argument("webhook_id", metavar="ID", shell_complete=webhook_ids)
@json_option
@connected
async def pause_webhook(api: Api, webhook_id: str, *, as_json: bool) -> None:
    """Stop sending and hold what comes, until it is resumed.

    New attempts stop at once; requests in flight finish. Events are held as long as events are kept.
    """
    _show_status(await api.call("POST", "webhooks", webhook_id, "pause"), as_json)


@webhooks.command("resume", epilog=examples("trackpost webhooks resume wh_…"))
@click.argument("webhook_id", metavar="ID", shell_complete=webhook_ids)
@json_option
@connected
async def resume_webhook(api: Api, webhook_id: str, *, as_json: bool) -> None:
    """Send again, first what was held, in order of age.

    Activates a disabled webhook, too. What happened while it was disabled was not held: `trackpost webhooks replay
    --status missed` sends it.
    """
    _show_status(await api.call("POST", "webhooks", webhook_id, "resume"), as_json)


def _show_status(webhook: Mapping[str, Any], as_json: bool) -> None:
    if for_programs(as_json):
        print_json(webhook)
    else:
        click.echo(f"{webhook['id']} is {webhook['status']}")


# ── trying out, replacing the secret, replaying, looking back ──────────────────────────────────────────────────────


@webhooks.command(
    "test",
    epilog=examples("trackpost webhooks test wh_…", "trackpost webhooks test wh_… --type email.bounced --data @b.json"),
)
@click.argument("webhook_id", metavar="ID", shell_complete=webhook_ids)
@click.option(
    "--type",
    "type_",
    metavar="TYPE",
    shell_complete=event_types,
    help="Which event's sample to send. [default: one it asks for]",
)
@click.option("--data", metavar="JSON|@FILE|-", help="Your own data in place of the sample.")
@json_option
@connected
async def try_webhook(api: Api, webhook_id: str, *, type_: str | None, data: str | None, as_json: bool) -> None:
    """Send one event now and show what your endpoint answers.

    It is a sample of a type, in no log, and not retried. A handler that answers 401 or 403 is also tried with the other
    body style, and you are told if it accepts that. Ends with exit code 1 unless the answer is 2xx.
    """
    body: dict[str, Any] = {} if type_ is None else {"type": type_}
    if data is not None:
        body["data"] = _parsed(text_argument(data, "--data"))
    told = await api.call("POST", "webhooks", webhook_id, "test", body=body)
    if for_programs(as_json):
        print_json(told)
    else:
        names = ("type", "status", "error", "latency_ms", "body_style", "response_headers", "response_body")
        print_record({name: told[name] for name in names if told[name] not in (None, {})})
        _advise(webhook_id, told)
    if not told["delivered"]:
        raise click.exceptions.Exit(FAILED)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        refuse(f"expected JSON: {error}", "--data")


def _advise(webhook_id: str, told: Mapping[str, Any]) -> None:
    accepted = told["body_style_accepted"]
    if not told["delivered"] and accepted == told["body_style"]:
        hint("Your handler still verifies with the previous secret.")
    elif not told["delivered"] and accepted is not None:
        hint(
            f"Your handler accepts the other body style: trackpost webhooks update {webhook_id} --body-style {accepted}"
        )
    elif len(told["tries"]) > 1:
        hint(
            "Your handler accepts neither body style. It has another secret, or does not find the signature's header: "
            f"trackpost webhooks get {webhook_id} --show-secret prints what we sign with."
        )


@webhooks.command(
    "rotate-secret",
    epilog=examples("trackpost webhooks rotate-secret wh_…", "trackpost webhooks rotate-secret wh_… --grace 0"),
)
@click.argument("webhook_id", metavar="ID", shell_complete=webhook_ids)
@click.option(
    "--secret-file", type=click.Path(), metavar="FILE|-", help="A file with the new secret, or standard input."
)
@click.option("--secret", metavar="SECRET", help="The new secret. Shows in ps and in the shell's history.")
@click.option("--grace", type=float, metavar="SECONDS", help="How long the old one signs as well. [default: a day]")
@json_option
@connected
async def rotate_secret(
    api: Api, webhook_id: str, *, secret: str | None, secret_file: str | None, grace: float | None, as_json: bool
) -> None:
    """Replace the secret without losing a request.

    Without one of yours, a new one is made and printed. For a day `webhook-signature` carries both signatures, and a
    request that is answered with 401 or 403 is sent again at once with X-Trackpost-Signature by the old secret: so your
    handler can change over at any moment in between.
    """
    options = {"secret": secret, "secret_file": secret_file, "no_secret": False}
    body: dict[str, Any] = {**_secret(options), **({} if grace is None else {"grace_s": grace})}
    made = await api.call("POST", "webhooks", webhook_id, "rotate-secret", body=body)
    if for_programs(as_json):
        print_json(made)
        return
    print_record({name: made[name] for name in ("id", "secret", "previous_secret_expires_at")})
    hint("Give the secret to your handler before the old one ends.")


@webhooks.command(
    "replay",
    epilog=examples(
        "trackpost webhooks replay wh_… --since 2025-01-15T10:00:00Z --status failed --dry-run",
        "trackpost webhooks replay wh_… --since 2025-01-01T00:00:00Z --status missed --types email.bounced",
    ),
)
@click.argument("webhook_id", metavar="ID", shell_complete=webhook_ids)
@click.option("--since", "start", required=True, metavar="TIME", help="Events from then on, like 2025-01-15T10:30:00Z.")
@click.option("--until", metavar="TIME", help="Events before then. [default: now]")
@click.option(
    "--status",
    required=True,
    type=click.Choice(["failed", "missed", "all"]),
    help="failed: given up. missed: never arrived, those from before the webhook existed included.",
)
@click.option(
    "--types",
    multiple=True,
    metavar="A,B",
    shell_complete=event_filters,
    help="Only events of these types. Repeatable.",
)
@click.option("--dry-run", is_flag=True, help="Count them and send nothing.")
@click.option("--no-wait", is_flag=True, help="Begin and return; do not wait for the end.")
@json_option
@connected
async def replay_events(
    api: Api,
    webhook_id: str,
    *,
    start: str,
    until: str | None,
    status: str,
    types: tuple[str, ...],
    dry_run: bool,
    no_wait: bool,
    as_json: bool,
) -> None:
    """Send old events again, as new deliveries.

    Waits until all are queued. Interrupting this does not end the replay: `trackpost webhooks cancel-replay` does.
    What is on its way already is not sent twice, and live events do not wait behind a replay.
    """
    body: dict[str, Any] = {"since": start, "status": status, "dry_run": dry_run}
    body |= {"until": until} if until else {}
    body |= {"types": _listed(types)} if types else {}
    begun = await api.call("POST", "webhooks", webhook_id, "replay", body=body)
    if not dry_run and not no_wait:
        begun = await _watch(api, webhook_id, begun)
    if for_programs(as_json):
        print_json(begun)
    elif dry_run:
        click.echo(f"{'at least ' if begun['is_lower_bound'] else ''}{begun['count']} events would be sent")
    else:
        click.echo(f"{begun['id']} is {begun['status']}: {begun['queued']} queued of {begun['looked']} looked at")
    if not dry_run and begun["status"] == "cancelled":
        raise Failure(begun["reason"])


async def _watch(api: Api, webhook_id: str, job: dict[str, Any]) -> dict[str, Any]:
    """Follow a replay to its end, with a bar for people, on standard error."""
    import asyncio

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    console = Console(stderr=True, no_color=is_plain())
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("replaying", total=1.0)
        try:
            while job["status"] == "running":
                progress.update(task, completed=job["progress"], description=f"{job['queued']} queued")
                await asyncio.sleep(WATCH_S)
                job = await api.call("GET", "webhooks", webhook_id, "replays", job["id"])
        except asyncio.CancelledError:
            hint(f"It goes on. To end it: trackpost webhooks cancel-replay {webhook_id} {job['id']}")
            raise
    return job


@webhooks.command("replays", epilog=examples("trackpost webhooks replays wh_…"))
@click.argument("webhook_id", metavar="ID", shell_complete=webhook_ids)
@click.option("--limit", type=click.IntRange(1, 100), default=20, show_default=True, help="How many.")
@click.option("--after", metavar="CURSOR", help="Those that follow: the `next` of the page before.")
@click.option("--all", "every", is_flag=True, help="All of them.")
@json_option
@connected
async def list_replays(api: Api, webhook_id: str, *, limit: int, after: str | None, every: bool, as_json: bool) -> None:
    """List a webhook's replays, newest first.

    Each with how far it has come: events it looked at, deliveries it queued.
    """
    page = await browse(api, "webhooks", webhook_id, "replays", query=part(limit, after), every=every, as_json=as_json)
    if page is None:
        return
    print_table(
        ("id", "status", "of", "progress", "queued", "begun", "why"),
        (
            (
                r["id"],
                r["status"],
                r["selection"],
                f"{r['progress']:.0%}",
                r["queued"],
                since(r["created_at"]),
                r["reason"],
            )
            for r in page["data"]
        ),
        empty="no replays",
        folding=("why",),
    )
    tell_more(page)


@webhooks.command("cancel-replay", epilog=examples("trackpost webhooks cancel-replay wh_… rpl_…"))
@click.argument("webhook_id", metavar="ID", shell_complete=webhook_ids)
@click.argument("replay_id", metavar="REPLAY")
@json_option
@connected
async def cancel_replay(api: Api, webhook_id: str, replay_id: str, *, as_json: bool) -> None:
    """End a replay, and take back what it queued.

    What was sent already stays sent, and what is about to be sent may still go out.
    """
    job = await api.call("DELETE", "webhooks", webhook_id, "replays", replay_id)
    if for_programs(as_json):
        print_json(job)
    else:
        click.echo(f"{job['id']} is {job['status']}: {job['queued']} of its deliveries were or will be sent")


@webhooks.command("stats", epilog=examples("trackpost webhooks stats wh_… --window 7d"))
@click.argument("webhook_id", metavar="ID", shell_complete=webhook_ids)
@click.option("--window", default="24h", show_default=True, metavar="DURATION", help="How far back: 1m to 30d.")
@json_option
@connected
async def show_stats(api: Api, webhook_id: str, *, window: str, as_json: bool) -> None:
    """Show how a webhook has fared.

    How its deliveries ended, what its attempts came to, and in which time half of them (p50) and 95 of 100 (p95) were
    answered.
    """
    stats = await api.call("GET", "webhooks", webhook_id, "stats", query={"window": window})
    if for_programs(as_json):
        print_json(stats)
        return
    rate = stats["success_rate"]
    print_record(
        {
            "from": stats["from"] + ("" if stats["complete"] else " (there were too many to go further back)"),
            **stats["deliveries"],
            "success rate": None if rate is None else f"{rate:.1%}",
            "attempts": stats["attempts"],
            "by result": stats["attempts_by_result"],
            "p50 ms": stats["latency_ms"]["p50"],
            "p95 ms": stats["latency_ms"]["p95"],
        }
    )
