"""`trackpost`, the customer's command line: webhooks and events of one account, over the REST API alone.

Everything below the commands is imported when a command needs it, so that `--help` and completion stay instant.
"""

from __future__ import annotations

import os
import sys

import click

from dispatcher import __version__
from dispatcher.cli.deliveries import deliveries
from dispatcher.cli.events import events, trigger
from dispatcher.cli.listen import listen
from dispatcher.cli.output import (
    HELP,
    Program,
    debug_option,
    examples,
    file_argument,
    for_programs,
    json_option,
    print_json,
    refuse,
)
from dispatcher.cli.signatures import sign, verify
from dispatcher.cli.webhooks import webhooks


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


for room in (webhooks, deliveries, events, trigger, listen, sign, verify):
    main.add_command(room)


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


@main.command(
    epilog=examples(
        "trackpost completion bash > ~/.local/share/bash-completion/completions/trackpost",
        "trackpost completion zsh > ~/.zfunc/_trackpost",
        "trackpost completion fish > ~/.config/fish/completions/trackpost.fish",
    )
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what teaches a shell to complete `trackpost`.

    Commands and options, event types, stored logins, and your webhooks with their URLs, which are asked of the API.
    """
    from dispatcher.cli.completing import script

    click.echo(script(main, "trackpost", shell))
