"""`trackpost events` and `trackpost trigger`: what happened, and making it happen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from dispatcher.cli.asking import browse, connected, part, tell_more
from dispatcher.cli.completing import event_types
from dispatcher.cli.output import (
    MISUSED,
    Failure,
    examples,
    for_programs,
    json_option,
    print_json,
    print_record,
    print_table,
    refuse,
    since,
    text_argument,
)

if TYPE_CHECKING:
    from dispatcher.cli.client import Api


@click.group()
def events() -> None:
    """Events of your account, and the types there are.

    An event is one fact, and makes a delivery for each webhook that asks for its type. IDs begin with evt_.
    """


@events.command("list", epilog=examples("trackpost events list --type email.bounced --limit 5"))
@click.option("--type", "type_", metavar="TYPE", shell_complete=event_types, help="Only events of this type.")
@click.option("--limit", type=click.IntRange(1, 100), default=20, show_default=True, help="How many.")
@click.option("--after", metavar="CURSOR", help="Those that follow: the `next` of the page before.")
@click.option("--all", "every", is_flag=True, help="All of them.")
@json_option
@connected
async def list_events(
    api: Api, *, type_: str | None, limit: int, after: str | None, every: bool, as_json: bool
) -> None:
    """List events, newest first.

    A `discarded` one cannot be sent to anybody, and `why` says what is wrong with it.
    """
    query = part(limit, after) | ({"type": type_} if type_ else {})
    page = await browse(api, "events", query=query, every=every, as_json=as_json)
    if page is None:
        return
    print_table(
        ("id", "type", "created", "status", "why"),
        ((e["id"], e["type"], since(e["created_at"]), e["status"], e["reason"] or "") for e in page["data"]),
        empty="no events",
        folding=("why",),
    )
    tell_more(page)


@events.command("get", epilog=examples("trackpost events get evt_…", "trackpost events get evt_… --json | jq .data"))
@click.argument("event_id", metavar="ID")
@json_option
@connected
async def get_event(api: Api, event_id: str, *, as_json: bool) -> None:
    """Show one event with its data.

    What became of it at a webhook: `trackpost deliveries list WEBHOOK --event ID`.
    """
    event = await api.call("GET", "events", event_id)
    if for_programs(as_json):
        print_json(event)
        return
    print_record({name: value for name, value in event.items() if name != "data" and value is not None})
    print_json(event["data"])


@events.command("types", epilog=examples("trackpost events types", "trackpost events types email.bounced"))
@click.argument("type_", metavar="[TYPE]", required=False, shell_complete=event_types)
@json_option
@connected
async def list_types(api: Api, type_: str | None, *, as_json: bool) -> None:
    """List the event types, or show one.

    With TYPE, its JSON Schema and the sample that `trigger` and `webhooks test` send.
    """
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
            ("type", "description", "when"),
            ((t["name"], t["description"], t.get("when", "")) for t in page["data"]),
            folding=("description", "when"),
        )


def _type_of(catalogue: Mapping[str, Any], name: str) -> dict[str, Any]:
    import difflib

    found: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in catalogue["data"]}
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1)
        advice = f"did you mean {near[0]}?" if near else "trackpost events types lists those that are"
        raise Failure(f"{name!r} is not in the catalogue: {advice}", MISUSED)
    return found[name]


@click.command(
    epilog=examples(
        "trackpost trigger email.delivered",
        "trackpost trigger email.bounced --set data.to=x@y.z --set data.location.city=Berlin",
        "trackpost trigger invoice.paid --data @invoice.json --idempotency-key invoice-17",
    )
)
@click.argument("type_", metavar="TYPE", shell_complete=event_types)
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
    """Emit an event: a sample of TYPE, with your changes.

    It is a real event, and goes to every webhook of yours that asks for its type, and to `trackpost listen`. A type
    that is not in the catalogue has no sample: give --data.
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
