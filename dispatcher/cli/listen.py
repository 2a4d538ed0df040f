"""`trackpost listen`: live events, shown and forwarded to a server on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import click

from dispatcher.cli.asking import connected, read_secret
from dispatcher.cli.completing import event_filters
from dispatcher.cli.output import examples, for_programs, json_option, refuse
from dispatcher.cli.signatures import secret_options

if TYPE_CHECKING:
    from dispatcher.cli.client import Api

SECRET_RANDOM_BYTES: Final = 32


@click.command(
    epilog=examples(
        "trackpost listen --forward-to http://localhost:3000/webhooks/trackpost",
        "trackpost listen --forward-to localhost:5000/webhooks/trackpost --body-style python --events 'email.*'",
        "trackpost listen --json | jq .type",
    )
)
@click.option("--forward-to", metavar="URL", help="The local server. Without it events are only shown.")
@click.option(
    "--events",
    metavar="A,B",
    shell_complete=event_filters,
    help="Only these: email.delivered,billing.*  [default: all]",
)
@click.option(
    "--body-style",
    type=click.Choice(["compact", "python"]),
    default="compact",
    show_default=True,
    help="python for handlers that hash json.dumps(request.json).",
)
@secret_options
@json_option
@connected
async def listen(
    api: Api,
    *,
    forward_to: str | None,
    events: str | None,
    body_style: str,
    secret: str | None,
    secret_file: str | None,
    as_json: bool,
) -> None:
    """Show live events, and forward them to a local server.

    They are signed by a secret of this run, unless you name yours. Webhooks are not touched: what you have
    registered goes on receiving. Retries by hand and replays come along, automatic retries do not. Ctrl-C ends it.
    """
    import secrets

    from dispatcher.cli.forwarding import Session, Voice, run
    from dispatcher.core.signing import Signer, new_secret

    url = None if forward_to is None else _local_url(forward_to)
    if secret is None and secret_file is None:
        shown = new_secret(secrets.token_bytes(SECRET_RANDOM_BYTES))
    else:
        shown = read_secret(secret, secret_file)
    if not shown:
        refuse("expected a secret that is not empty", "--secret")
    query = {"body_style": body_style} | ({"events": events} if events else {})
    await run(Session(api, Signer(shown), url, query, Voice(for_programs(as_json))), shown)


def _local_url(text: str) -> str:
    url = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(url)
        is_fit = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_fit = False
    if not is_fit:
        refuse(f"{text!r}: expected a URL, like http://localhost:3000/webhooks/trackpost", "--forward-to")
    return url
