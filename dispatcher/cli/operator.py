"""`dispatcher`, the operator's command line: runs the daemon and looks after its database.

Everything below the commands is imported when a command needs it, so that `--help` and completion stay instant.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dispatcher import __version__
from dispatcher.cli.completing import event_types
from dispatcher.cli.output import (
    HELP,
    MISUSED,
    UNAUTHORISED,
    UNREACHABLE,
    Failure,
    Program,
    debug_option,
    examples,
    for_programs,
    hint,
    json_option,
    print_json,
    print_record,
    print_table,
    refuse,
    since,
    text_argument,
    warn,
)
from dispatcher.core.shards import SHARDS_MAX

if TYPE_CHECKING:
    from dispatcher.config import Config

T = TypeVar("T")

config_option = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The configuration; else $DISPATCHER_CONFIG, else /etc/dispatcher/dispatcher.toml if there is one.",
)


@click.group(
    cls=Program,
    context_settings=HELP,
    epilog=examples(
        "dispatcher demo                                    look around, with nothing installed but this",
        "dispatcher migrate && dispatcher run               the daemon, on the configured database",
        "dispatcher keys create --account acme              an API key for a customer",
    ),
)
@click.version_option(__version__, prog_name="dispatcher")
@debug_option
def main() -> None:
    """Deliver webhooks from a table of your own PostgreSQL.

    Settings come from a file (--config, else $DISPATCHER_CONFIG, else /etc/dispatcher/dispatcher.toml) and from
    DISPATCHER_<SECTION>_<KEY> in the environment, which wins. Without a [database] dsn, an embedded PostgreSQL is kept
    in the state directory.

    Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 cannot reach the database, 4 not authorised.
    """


# ── the daemon ─────────────────────────────────────────────────────────────────────────────────────────────────────


@main.command(
    epilog=examples(
        "dispatcher run --config /etc/dispatcher/dispatcher.toml",
        "DISPATCHER_DATABASE_DSN=postgresql://app@db/app dispatcher run --wait",
        "dispatcher run --only engine                       and API and dashboard elsewhere: --only web",
    )
)
@config_option
@click.option("--wait", is_flag=True, help="Wait for the database while it is away at the start, instead of giving up.")
@click.option(
    "--only",
    type=click.Choice(["engine", "web"]),
    help="Only deliver, or only serve API and dashboard. Each has its metrics listener.",
)
def run(config_file: Path | None, wait: bool, only: str | None) -> None:
    """Run the daemon in the foreground, until SIGTERM or Ctrl-C.

    It delivers, and serves API, dashboard and metrics. On SIGTERM it drains: nothing new is attempted, what is in
    flight may end within [delivery] drain_s, and the exit code is 0. A second signal ends it at once; nothing is lost
    then either. SIGHUP reloads the configuration and logs what needs a restart.
    """
    from dispatcher.daemon import reader_of
    from dispatcher.logs import start_logging

    read = reader_of(config_file)
    config = read()
    start_logging(config.log)

    async def serve() -> None:
        from dispatcher import daemon

        with _ending_on_sigterm():
            async with daemon.database(config) as reachable:

                def read_again() -> Config:
                    fresh = read()
                    return fresh if fresh.database.dsn else fresh.with_dsn(reachable.database.dsn)

                await daemon.run(reachable, wait=wait, only=only, reload=read_again)

    _run(serve())


@contextlib.contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """SIGTERM ends this task in order until the daemon listens for it: an embedded PostgreSQL is stopped."""
    import asyncio
    import signal

    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None, "this runs in a task"
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        yield
    except asyncio.CancelledError:
        task.uncancel()
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


@main.command(
    epilog=examples(
        "dispatcher demo                  and then open the dashboard it names",
        "dispatcher demo --once           a self-test: exit code 0 if everything arrived and was verified",
    )
)
@click.option(
    "--once", is_flag=True, help="Stop after the last delivery: 0 if all were delivered and verified, else 1."
)
@click.option("--port", type=click.IntRange(0, 65535), help="Of the API. [default: 8480, or a free one]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each delivery.")
def demo(once: bool, port: int | None, as_json: bool) -> None:
    """Show everything at work, and leave nothing behind.

    Starts an embedded PostgreSQL in a temporary directory, the engine, the API, and a receiver of its own,
    which is registered as two webhooks: one with a handler like the Express example of the webhook guide, one like the
    Flask example. Emits one sample of each event type and shows each delivery as it lands, with both signatures
    verified: X-Trackpost-Signature as the guide's handlers do it, webhook-signature as Standard Webhooks libraries do.
    """
    from dispatcher.cli.demo import show

    click.get_current_context().exit(_run(show(once=once, port=port, as_json=as_json)))


# ── configuration and schema ───────────────────────────────────────────────────────────────────────────────────────


@main.command(
    "check-config",
    epilog=examples(
        "dispatcher check-config", "dispatcher check-config /etc/dispatcher/dispatcher.toml --json | jq .delivery"
    ),
)
@click.argument("file", required=False, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of TOML.")
@click.option("--reference", "as_reference", is_flag=True, help="Print what every key is and means, as Markdown.")
@click.option("--example", "as_example", is_flag=True, help="Print a file with every key at its default.")
def check_config(file: Path | None, as_json: bool, as_reference: bool, as_example: bool) -> None:
    """Print the configuration in effect, or every mistake in it.

    Each key is printed with the value it has from file, environment or default; secrets are masked. A mistake is told
    with key, value and what was expected, and the exit code is 2.
    """
    if as_reference or as_example:
        from dispatcher.cli.reference import example, reference

        click.echo(reference() if as_reference else example(), nl=False)
        return
    config = _configuration(file)
    if config.events.catalogue:
        from dispatcher.daemon import catalogue_of

        catalogue_of(config)
    if as_json:
        print_json(config.masked())
    else:
        click.echo(config.masked_toml(), nl=False)


@main.command(epilog=examples("dispatcher migrate --dry-run", "dispatcher migrate"))
@config_option
@click.option("--dry-run", "-n", is_flag=True, help="Only say what would be applied.")
@json_option
def migrate(config_file: Path | None, dry_run: bool, as_json: bool) -> None:
    """Bring the database's schema up.

    Safe to run twice, under load, from two hosts at once, and beside daemons of the release before: migrate first, then
    restart one daemon after the other. Each migration is applied whole or not at all; none keeps producers waiting.
    One that takes away what a running older daemon needs is postponed: run this again when that daemon is gone. The
    embedded PostgreSQL needs no migrate: whoever starts it brings it up.
    """
    config = _configuration(config_file, quiet=True)

    async def act() -> tuple[list[dict[str, object]], list[dict[str, object]]]:
        from dispatcher.store.schema import migrate

        async with _database(config) as reachable:
            dsn = reachable.database.dsn
            applied = [] if dry_run else await migrate(dsn)
            missing = await migrate(dsn, dry_run=True)
        return (
            [{"version": step.version, "name": step.name} for step in applied],
            [{"version": step.version, "name": step.name} for step in missing],
        )

    applied, missing = _run(_mapped(act()))
    if for_programs(as_json):
        print_json({"dry_run": dry_run, "applied": applied, "missing": missing})
        return
    for step in applied:
        click.echo(f"applied {step['version']:04}: {step['name']}")
    for step in missing:
        click.echo(f"{'would apply' if dry_run else 'postponed'} {step['version']:04}: {step['name']}")
    if missing and not dry_run:
        hint("An older daemon still needs what that takes away: dispatcher status shows it. Then migrate again.")
    if not applied and not missing:
        click.echo("the schema is up to date")


@main.command(epilog=examples("dispatcher prune --dry-run", "dispatcher prune --json | jq .dropped"))
@config_option
@click.option("--dry-run", "-n", is_flag=True, help="Only say what would be made and dropped.")
@json_option
def prune(config_file: Path | None, dry_run: bool, as_json: bool) -> None:
    """Drop history older than [retention] says, now.

    And make the coming days' partitions. The daemon does this by itself every ten minutes; beside it, and another
    prune, this waits for its turn. What a delivery still needs is kept, however old. What somebody's transaction is
    in the way of is postponed.
    """

    async def act() -> Any:
        from dispatcher.store.retention import Retention

        async with _session(config_file) as (config, connection):
            retention = Retention(connection, config.retention.events_s, config.retention.attempts_s)
            return await retention.run(dry_run=dry_run)

    done = _run(_mapped(act()))
    if for_programs(as_json):
        print_json({"dry_run": dry_run, **{name: getattr(done, name) for name in done.__struct_fields__}})
        return
    would = "would be " if dry_run else ""
    lines = [
        *(f"{name} {would}made" for name in done.made),
        *(f"{name} {would}dropped" for name in done.dropped),
        *(f"{name} kept: a delivery still needs it" for name in done.kept),
        *(f"{name} postponed: a transaction is in the way" for name in done.postponed),
        *(f"{name} made of {rows:,} rows from the DEFAULT partition" for name, rows in done.moved.items()),
        *(f"{table}_default holds {rows:,} rows until they are old" for table, rows in done.astray.items()),
        *(f"{table}: {rows:,} rows deleted" for table, rows in done.deleted.items()),
    ]
    click.echo("\n".join(lines) or "nothing to do")


@main.command(
    epilog=examples(
        "dispatcher shards                how many there are, and who runs them",
        "dispatcher shards 4              spread the webhooks over four, while no daemon runs",
    )
)
@click.argument("number", required=False, type=click.IntRange(1, SHARDS_MAX))
@config_option
@json_option
def shards(number: int | None, config_file: Path | None, as_json: bool) -> None:
    """Show the shards, or change how many there are.

    Every webhook belongs to one shard, every shard is run by one daemon, and the daemons on a database share them out
    evenly: with one shard, the first daemon delivers and the others stand by. Each shard reads every event, so have as
    many as daemons, or few more. Their number is the database's and changes only while no daemon runs on it, those of
    --only web apart; nothing is lost or sent twice by that.
    """

    async def act() -> list[dict[str, object]]:
        from dispatcher.cli.status import shard_rows
        from dispatcher.errors import ShardsInUse
        from dispatcher.store.fleet import FleetStore

        async with _session(config_file) as (_, connection):
            if number is not None:
                try:
                    await FleetStore(connection).reshard(number)
                except ShardsInUse as error:
                    raise Failure(str(error)) from None
            return await shard_rows(connection)

    rows = _run(_mapped(act()))
    if for_programs(as_json):
        print_json({"shards": rows})
    else:
        print_table(("shard", "webhooks", "run by", "read up to"), (tuple(row.values()) for row in rows))


# ── API keys ───────────────────────────────────────────────────────────────────────────────────────────────────────


@main.group()
def keys() -> None:
    """API keys of the accounts, and the master key.

    The master key seals the webhooks' secrets. An API key opens one account: its webhooks, events and deliveries, in
    API and dashboard. It is stored as a hash.
    """


@keys.command(
    "create", epilog=examples("dispatcher keys create --account acme", "dispatcher keys create --account acme --test")
)
@click.option("--account", required=True, metavar="NAME", help="Whose key; the account is made if it is new.")
@click.option("--test", is_flag=True, help="A key for trying out: tp_test_… instead of tp_live_….")
@config_option
@json_option
def create_key(account: str, test: bool, config_file: Path | None, as_json: bool) -> None:
    """Make an API key, and its account if that is new.

    The key is printed this once and stored as a hash: nobody can show it again.
    """

    async def act() -> tuple[Any, str]:
        from dispatcher.store.accounts import AccountStore

        async with _session(config_file) as (config, connection):
            store = AccountStore(connection, config.brand.key_prefix)
            try:
                return await store.create_key(account, "test" if test else "live")
            except ValueError as error:
                refuse(str(error), "--account")

    record, key = _run(_mapped(act()))
    if for_programs(as_json):
        print_json({"id": record.id, "account": record.account, "key": key, "mode": record.mode})
    else:
        print_record({"id": record.id, "account": record.account, "key": key, "mode": record.mode})
        hint("Keep the key: it cannot be shown again.")


@keys.command("list", epilog=examples("dispatcher keys list"))
@config_option
@json_option
def list_keys(config_file: Path | None, as_json: bool) -> None:
    """List the keys of every account, oldest first.

    Revoked ones included. Of the key itself only the last four characters are known.
    """

    async def act() -> list[Any]:
        from dispatcher.store.accounts import PAGE_MAX, AccountStore

        async with _session(config_file) as (_, connection):
            store = AccountStore(connection)
            found = page = await store.list_keys()
            while len(page) == PAGE_MAX:
                page = await store.list_keys(after=page[-1].id)
                found += page
            return found

    found = [_key_fields(record) for record in _run(_mapped(act()))]
    if for_programs(as_json):
        print_json(found)
        return
    columns = ("id", "account", "mode", "key", "created", "revoked")
    rows = (
        (k["id"], k["account"], k["mode"], f"…{k['hint']}", since(k["created_at"]), since(k["revoked_at"]))
        for k in found
    )
    print_table(columns, rows, empty="no keys yet: dispatcher keys create --account NAME")


@keys.command("revoke", epilog=examples("dispatcher keys revoke key_…"))
@click.argument("key_id", metavar="ID")
@config_option
@json_option
def revoke_key(key_id: str, config_file: Path | None, as_json: bool) -> None:
    """Refuse a key from its next request on.

    ID is the key's id (`keys list`), not the key. It cannot be undone.
    """

    async def act() -> Any:
        from dispatcher.store.accounts import AccountStore

        async with _session(config_file) as (_, connection):
            return await AccountStore(connection).revoke_key(key_id)

    record = _run(_mapped(act()))
    if record is None:
        raise Failure(f"there is no key with the id {key_id}; dispatcher keys list shows them")
    if for_programs(as_json):
        print_json(_key_fields(record))
    else:
        click.echo(f"revoked {record.id} of {record.account}")


@keys.command(
    "rotate-master",
    epilog=examples(
        "DISPATCHER_SECRETS_KEY_FILE=new.key DISPATCHER_SECRETS_OTHER_KEY_FILES=old.key dispatcher keys rotate-master"
    ),
)
@config_option
@json_option
def rotate_master(config_file: Path | None, as_json: bool) -> None:
    """Seal every webhook's secret anew, with the current key.

    That is the one in [secrets] key_file. They are opened with that key or with one in [secrets] other_key_files.
    Daemons may be running: each must know both keys, and have the new one as its key_file. Safe to run twice; when it
    is done, the old key opens nothing any more.
    """

    async def act() -> int:
        from dispatcher.daemon import open_vault
        from dispatcher.store.resealing import reseal

        async with _session(config_file) as (config, connection):
            return await reseal(connection, open_vault(config))

    resealed = _run(_mapped(act()))
    if for_programs(as_json):
        print_json({"resealed": resealed})
    else:
        click.echo(
            f"sealed the secrets of {resealed} webhooks anew" if resealed else "nothing was sealed with another key"
        )


def _key_fields(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__struct_fields__}


# ── events ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@main.command(
    epilog=examples(
        """dispatcher emit email.delivered --data '{"email_id": "msg_def456"}'""",
        "dispatcher emit invoice.paid --account acme --data @invoice.json --idempotency-key invoice-17",
        "psql -Atc 'SELECT row_to_json(…)' | dispatcher emit order.placed --data -",
    )
)
@click.argument("type_", metavar="TYPE", shell_complete=event_types)
@click.option(
    "--data", required=True, metavar="JSON|@FILE|-", help="An object: itself, from a file, or from standard input."
)
@click.option("--account", default="default", show_default=True, metavar="NAME", help="Whose event it is.")
@click.option(
    "--idempotency-key",
    metavar="KEY",
    help="Used again within 24 hours with the same data, it returns the first event.",
)
@config_option
@json_option
def emit(
    *, type_: str, data: str, account: str, idempotency_key: str | None, config_file: Path | None, as_json: bool
) -> None:
    """Write one event through the outbox and print its id.

    The running daemon delivers it to the webhooks of its account. Data that could not be delivered is refused here with
    the reason, and nothing is written.
    """
    from dispatcher.store.accounts import is_account_name

    text = text_argument(data, "--data")
    _check_event(type_, text)
    if not is_account_name(account):
        refuse(f"{account!r:.80} is no name for an account", "--account")
    if idempotency_key is not None and not 1 <= len(idempotency_key) <= 255:
        refuse("expected 1 to 255 characters", "--idempotency-key")

    async def act() -> tuple[Any, bool]:
        from dispatcher.store.accounts import AccountStore
        from dispatcher.store.events import EventStore, IdempotencyConflict

        async with _session(config_file) as (_, connection):
            if not await AccountStore(connection).exists(account):
                warn(f"nobody has a key for the account {account}: who could receive this event?")
            try:
                return await EventStore(connection).emit(account, type_, text, idempotency_key)
            except IdempotencyConflict as conflict:
                raise Failure(f"this idempotency key was used with another type or other data: {conflict}") from None

    event, is_new = _run(_mapped(act()))
    if for_programs(as_json):
        print_json({"id": event.id, "type": type_, "account": account, "created": is_new})
    else:
        click.echo(event.id)
        if not is_new:
            hint("This idempotency key had made that event before: nothing was written.")


def _check_event(type_: str, data: str) -> None:
    """Refuse what would be discarded."""
    from dispatcher.core.rendering import check_data, is_type
    from dispatcher.errors import Undeliverable

    if not is_type(type_):
        refuse(f'{type_!r:.80}: expected lower-case words joined by dots, like "email.delivered"', "TYPE")
    try:
        check_data(type_, data)
    except Undeliverable as reason:
        refuse(str(reason), "--data")


@main.command(
    epilog=examples(
        "dispatcher status", "dispatcher status --watch", "dispatcher status --json | jq '.instances[].in_flight'"
    )
)
@click.option("--watch", "-w", is_flag=True, help="Keep looking, until Ctrl-C.")
@config_option
@json_option
def status(watch: bool, config_file: Path | None, as_json: bool) -> None:
    """Show the running engine.

    Rates, lag, requests in flight, retries, the webhooks in most trouble. Looks twice, a second apart, to tell rates.
    The exit code is 1 when no daemon runs on this database.
    """
    from dispatcher.cli.status import look

    config = _configuration(config_file, quiet=True)
    if not config.database.dsn and not (Path(config.state.directory) / "postgres" / "data").exists():
        from dispatcher.cli.status import no_daemon

        no_daemon("the embedded PostgreSQL", for_programs(as_json))

    async def act() -> None:
        async with _session(config_file) as (reachable, connection):
            await look(connection, reachable, watch=watch, as_json=for_programs(as_json))

    _run(_mapped(act()))


@main.command(
    epilog=examples(
        "dispatcher completion bash > ~/.local/share/bash-completion/completions/dispatcher",
        "dispatcher completion zsh > ~/.zfunc/_dispatcher",
        "dispatcher completion fish > ~/.config/fish/completions/dispatcher.fish",
    )
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what teaches a shell to complete `dispatcher`.

    Commands, options and event types.
    """
    from dispatcher.cli.completing import script

    click.echo(script(main, "dispatcher", shell))


@main.command(
    epilog=examples("dispatcher doctor", "dispatcher doctor --json | jq '.findings[] | select(.verdict != \"ok\")'")
)
@config_option
@json_option
def doctor(config_file: Path | None, as_json: bool) -> None:
    """Look at what has to be right, and say what to change.

    Clock, file limits, trust store, secrets key, disk and ports of this host; version, settings, connections and
    poolers of the database; schema, key, daemons and partitions in it. Changes nothing.

    Exit codes: 0 all is well, though there may be advice; 1 there is a problem; 2 the configuration is wrong; 3 the
    database cannot be reached.
    """
    from dispatcher.cli.doctor import examine, show

    findings, reached = _run(examine(_configuration(config_file, quiet=True)))
    click.get_current_context().exit(show(findings, reached=reached, as_json=for_programs(as_json)))


# ── what the commands share ────────────────────────────────────────────────────────────────────────────────────────


def _configuration(path: Path | None, *, quiet: bool = False) -> Config:
    """The configuration. `quiet` keeps the log of a short command to what went wrong. Raises ConfigurationError."""
    from dispatcher.config import load

    config = load(path, os.environ)
    if quiet:
        import msgspec

        from dispatcher.logs import start_logging

        start_logging(msgspec.structs.replace(config.log, level="error"))
    return config


@contextlib.asynccontextmanager
async def _database(config: Config) -> AsyncIterator[Config]:
    """`daemon.database`, which a short command loads only where it is needed: it is 0.3 s of imports."""
    if config.database.dsn:
        yield config
        return
    from dispatcher.daemon import database

    async with database(config) as reachable:
        yield reachable


@contextlib.asynccontextmanager
async def _session(config_file: Path | None) -> AsyncIterator[tuple[Config, Any]]:
    """The configuration and a connection to its database, whose schema is ours."""
    from dispatcher.store.database import connect
    from dispatcher.store.schema import check_schema

    async with _database(_configuration(config_file, quiet=True)) as config:
        connection = await connect(config.database.dsn, name="dispatcher command")
        try:
            await check_schema(connection)
            yield config, connection
        finally:
            await connection.close(timeout=5)


async def _mapped(act: Coroutine[Any, Any, T]) -> T:
    """Do it, and turn what PostgreSQL has against it into a Failure."""
    import asyncpg

    from dispatcher.store.database import TROUBLE

    try:
        return await act
    except asyncpg.InsufficientPrivilegeError as error:
        raise Failure(f"PostgreSQL does not let this user do that: {error}", UNAUTHORISED) from None
    except asyncpg.DataError as error:
        raise Failure(f"PostgreSQL refuses that: {error}", MISUSED) from None
    except TROUBLE as error:
        raise Failure(f"the database could not do that: {error or type(error).__name__}", UNREACHABLE) from None


def _run(act: Coroutine[Any, Any, T]) -> T:
    import uvloop

    return uvloop.run(act)
