"""`trackpost deliveries`: what became of each event at a webhook, and once more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import click

from dispatcher.cli.asking import browse, connected, part, tell_more
from dispatcher.cli.completing import event_types, webhook_ids
from dispatcher.cli.output import (
    examples,
    for_programs,
    hint,
    json_option,
    print_json,
    print_record,
    print_table,
    printable,
    since,
)

if TYPE_CHECKING:
    from dispatcher.cli.client import Api

STATES: Final = ("pending", "in_flight", "retrying", "delivered", "exhausted", "discarded")
CLASSES: Final = ("2xx", "3xx", "4xx", "5xx", "timeout", "connect", "tls", "dns", "blocked", "protocol")


@click.group()
def deliveries() -> None:
    """Deliveries: one event for one webhook each.

    A delivery is `pending`, `in_flight`, `retrying`, `delivered`, `exhausted` (its last retry failed) or `discarded`
    (it cannot be sent; `get` says why). IDs begin with dlv_.
    """


@deliveries.command(
    "list",
    epilog=examples(
        "trackpost deliveries list wh_… --status exhausted",
        "trackpost deliveries list wh_… --class 5xx --since 2025-01-15T10:00:00Z --all",
    ),
)
@click.argument("webhook_id", metavar="WEBHOOK", shell_complete=webhook_ids)
@click.option("--status", type=click.Choice(STATES), metavar="STATE", help=f"Only in this state: {', '.join(STATES)}.")
@click.option("--type", metavar="TYPE", shell_complete=event_types, help="Only events of this type.")
@click.option("--event", "event_id", metavar="ID", help="Only of this event.")
@click.option(
    "--class",
    "status_class",
    type=click.Choice(CLASSES),
    metavar="CLASS",
    help=f"Only where the last attempt came to this: {', '.join(CLASSES)}.",
)
@click.option("--since", metavar="TIME", help="Last changed then or later, like 2025-01-15T10:30:00Z.")
@click.option("--until", metavar="TIME", help="Last changed earlier.")
@click.option("--limit", type=click.IntRange(1, 100), default=20, show_default=True, help="How many.")
@click.option("--after", metavar="CURSOR", help="Those that follow: the `next` of the page before.")
@click.option("--all", "every", is_flag=True, help="All of them.")
@json_option
@connected
async def list_deliveries(
    api: Api, webhook_id: str, *, limit: int, after: str | None, every: bool, as_json: bool, **filters: str | None
) -> None:
    """List a webhook's deliveries.

    What waits for its first attempt stands in front, then what changed last. Filters combine. A delivery that was just
    queued or is in flight for the first time comes into sight when it is settled or fails, or after two seconds.
    """
    query = part(limit, after) | {name: value for name, value in filters.items() if value is not None}
    page = await browse(api, "webhooks", webhook_id, "deliveries", query=query, every=every, as_json=as_json)
    if page is None:
        return
    print_table(
        ("id", "status", "type", "tries", "answer", "changed", "next"),
        (
            (
                *(d[name] for name in ("id", "status", "event_type", "attempts")),
                _answer(d),
                since(d["updated_at"]),
                since(d["next_attempt_at"]),
            )
            for d in page["data"]
        ),
        empty="no deliveries",
        folding=("answer",),
    )
    tell_more(page)


def _answer(delivery: Mapping[str, Any]) -> str:
    return str(delivery["error"] or delivery["status_code"] or "–")


@deliveries.command(
    "get",
    epilog=examples("trackpost deliveries get dlv_…", "trackpost deliveries get dlv_… --json | jq '.attempts[-1]'"),
)
@click.argument("delivery_id", metavar="ID")
@json_option
@connected
async def get_delivery(api: Api, delivery_id: str, *, as_json: bool) -> None:
    """Show one delivery with every attempt.

    What was sent (>) and what came back (<): headers, the body to the byte, the first 4 KiB of each response, errors,
    and when the next attempt is due.
    """
    found = await api.call("GET", "deliveries", delivery_id)
    if for_programs(as_json):
        print_json(found)
        return
    apart = {"attempts", "request_body"}
    print_record({name: value for name, value in found.items() if name not in apart and value is not None})
    for attempt in found["attempts"]:
        click.echo()
        shown = {"attempt": attempt["number"], **{name: attempt[name] for name in ("at", "duration_ms", "result")}}
        print_record(shown | {name: attempt[name] for name in ("status", "error") if attempt[name]})
        _print_headers(">", attempt["request_headers"])
        _print_headers("<", attempt["response_headers"])
        if attempt["response_body"]:
            name = "response_body, base64" if attempt["body_encoding"] == "base64" else "response_body"
            print_record({name: attempt["response_body"]})
    if found["request_body"] is not None:
        click.echo()
        print_record({"body": found["request_body"]})


def _print_headers(sign: str, headers: Mapping[str, str] | None) -> None:
    for name, value in (headers or {}).items():
        click.echo(printable(f"{sign} {name}: {value}"))


@deliveries.command("retry", epilog=examples("trackpost deliveries retry dlv_…"))
@click.argument("delivery_id", metavar="ID")
@json_option
@connected
async def retry_delivery(api: Api, delivery_id: str, *, as_json: bool) -> None:
    """Send its event to its webhook once more.

    That makes a new delivery, whatever became of the old one, with the same event id. To send many again, use
    `trackpost webhooks replay`.
    """
    made = await api.call("POST", "deliveries", delivery_id, "retry")
    if for_programs(as_json):
        print_json(made)
        return
    click.echo(f"{made['id']} is {made['status']}")
    hint(f"See what becomes of it: trackpost deliveries get {made['id']}")
