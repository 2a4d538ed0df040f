"""The composition root: configuration in, a running daemon out.

Everything is made here and handed to whoever needs it; nobody below makes its own. Signals end here too: SIGTERM and
SIGINT drain, a second one exits at once, SIGHUP reloads what can be reloaded and says what cannot.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import os
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

from dispatcher import systemd
from dispatcher.config import Config, load
from dispatcher.core.addresses import Guard
from dispatcher.core.backoff import PRESETS
from dispatcher.core.catalogue import Catalogue
from dispatcher.core.ids import DeliveryIds
from dispatcher.embedded import EmbeddedPostgres
from dispatcher.engine.engine import EngineSettings
from dispatcher.engine.fleet import Fleet
from dispatcher.engine.onlooker import Onlooker
from dispatcher.engine.spans import open_spans
from dispatcher.engine.transport import Transport, TransportSettings
from dispatcher.engine.trials import SingleShot, is_released
from dispatcher.errors import ConfigurationError, DatabaseUnreachable, DispatcherError
from dispatcher.logs import get_logger, start_logging
from dispatcher.snapshot import Snapshot
from dispatcher.store.accounts import AccountStore
from dispatcher.store.database import connect, open_pool, place, statements
from dispatcher.store.deliveries import DeliveryStore
from dispatcher.store.endpoints import EndpointDefaults, EndpointStore
from dispatcher.store.events import EventStore
from dispatcher.store.operator import OperatorStore
from dispatcher.store.overview import OverviewStore
from dispatcher.store.replays import ReplayStore
from dispatcher.store.schema import check_schema, migrate
from dispatcher.store.sessions import SessionStore
from dispatcher.store.vault import Vault, new_key
from dispatcher.web.api import build_api_app
from dispatcher.web.door import CONNECTIONS_MAX
from dispatcher.web.metrics import build_metrics_app
from dispatcher.web.parts import Log, Operator, Send, Stores, Trial, Tried, Web
from dispatcher.web.server import serve

EMBEDDED_DIRECTORY: Final = "postgres"
FILES_PER_REQUEST: Final = 2  # in flight and idle connections
OTHER_FILES: Final = 2 * CONNECTIONS_MAX + 256  # of two listeners; the rest is small change
WAIT_S: Final = 1.0
START_S: Final = 60.0  # granted by the service manager at every try: longer than a try and the start after it take
READY_POLL_S: Final = 0.05
STATUS_S: Final = 5.0
SETTLE_S: Final = 10.0  # behind [delivery] drain_s: what was in flight is written down
ROTATE: Final = "dispatcher keys rotate-master, when every daemon has the new key as its key_file"
EXIT_NOW: Final = 130  # a second signal: at once, as a shell would report it

log = get_logger("dispatcher.daemon")


# -- database


@contextlib.asynccontextmanager
async def database(config: Config, *, ephemeral: bool = False) -> AsyncIterator[Config]:
    """The configuration with a DSN in it: the one configured, or that of the embedded PostgreSQL, started or joined
    meanwhile.

    The embedded one's schema is brought up as well: nobody else could. Raises EmbeddedError.
    """
    if config.database.dsn:
        yield config
        return
    directory = Path(config.state.directory) / EMBEDDED_DIRECTORY
    binaries = Path(config.embedded.bin) if config.embedded.bin else None
    async with EmbeddedPostgres(directory, binaries, ephemeral=ephemeral) as server:
        await migrate(server.dsn)
        keeper = asyncio.create_task(server.keep(), name="embedded PostgreSQL")
        try:
            yield config.with_dsn(server.dsn)
        finally:
            keeper.cancel()


async def _reach(config: Config, *, wait: bool) -> dict[str, str]:
    """Check that the database is there and its schema ours; return its settings. Raises what is wrong."""
    while True:
        try:
            connection = await connect(config.database.dsn, name="dispatcher start")
        except DatabaseUnreachable as error:
            if not wait:
                raise
            log.warning("database.waiting", reason=str(error))
            systemd.notify("STATUS=waiting for the database", f"EXTEND_TIMEOUT_USEC={int(START_S * 1e6)}")
            await asyncio.sleep(WAIT_S)
            continue
        try:
            await check_schema(connection)
            rows = await connection.fetch(statements("shard")["settings"])
            return {row["key"]: row["value"] for row in rows}
        finally:
            await connection.close(timeout=5)


# -- secrets


def open_vault(config: Config) -> Vault:
    """The vault with the configured keys; a key is made at the first start. Raises ConfigurationError."""
    path = Path(config.secrets.key_file)
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with contextlib.suppress(FileExistsError):
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "w") as file:
                    file.write(new_key().hex() + "\n")
    except OSError as error:
        raise _no_key("key_file", path, error) from error
    others = [_key_in(Path(other), "other_key_files") for other in config.secrets.other_key_files]
    return Vault(_key_in(path, "key_file"), others)


def _key_in(path: Path, name: str) -> bytes:
    try:
        return bytes.fromhex(path.read_text(encoding="ascii").strip())
    except (OSError, ValueError) as error:
        raise _no_key(name, path, error) from error


def _no_key(name: str, path: Path, error: Exception) -> ConfigurationError:
    return ConfigurationError([f"[secrets] {name} = {str(path)!r}: 64 hexadecimal digits expected: {error}"])


async def _agree_on_key(config: Config, vault: Vault, known: str | None) -> None:
    """Refuse keys without the one this database's secrets are sealed with; the first daemon's becomes it."""
    if known is None:
        connection = await connect(config.database.dsn, name="dispatcher start")
        try:
            known = await connection.fetchval(statements("shard")["claim_key"], vault.fingerprint)
        finally:
            await connection.close(timeout=5)
    if known not in vault.fingerprints:
        raise ConfigurationError(
            [
                (
                    f"[secrets] key_file = {config.secrets.key_file!r}: the secrets in this database were sealed with "
                    f"another key (fingerprint {known}, this one is {vault.fingerprint}); copy that key file here, or "
                    "name it in other_key_files if this one is to replace it"
                )
            ]
        )
    if known != vault.fingerprint:
        log.warning("secrets.two_keys", sealed_with=known, key_file=vault.fingerprint, remedy=ROTATE)


# -- the daemon


@dataclasses.dataclass(slots=True)
class Daemon:
    """A running daemon, as whoever started it sees it."""

    config: Config
    engine: Fleet | Onlooker
    pool: Any
    accounts: AccountStore
    web: Web
    url: str  # of API and dashboard; empty without them
    stopping: bool = False

    def stop(self) -> None:
        """Drain and end."""
        self.stopping = True
        self.engine.stop()


def catalogue_of(config: Config) -> Catalogue:
    """The built-in event types and the operator's own."""
    return Catalogue.builtin().with_files(
        {path: Path(path).read_text(encoding="utf-8") for path in config.events.catalogue}
    )


def _engine_settings(config: Config) -> EngineSettings:
    return EngineSettings(
        dsn=config.database.dsn,
        listen_dsn=config.database.listen_dsn,
        defaults=_defaults(config),
        jitter=config.retry.jitter,
        max_in_flight=min(config.delivery.max_in_flight, connections_max(config)),
        max_queued=config.delivery.max_queued,
        drain_s=config.delivery.drain_s,
        synchronous_commit=config.delivery.synchronous_commit,
        user_agent=config.brand.user_agent,
        header_prefix=config.brand.header_prefix,
        events_kept_s=config.retention.events_s,
        attempts_kept_s=config.retention.attempts_s,
        disable_after_s=config.auto_disable.after_s,
        log_failures=config.log.failures,
        log_successes=config.log.successes,
    )


def _defaults(config: Config) -> EndpointDefaults:
    schedule_s = config.retry.schedule_s
    return EndpointDefaults(
        schedule_s=schedule_s,
        schedules={**PRESETS, "default": schedule_s},
        max_concurrency=config.delivery.max_concurrency,
        timeout_s=config.delivery.timeout_s,
    )


def sender(shot: SingleShot) -> Send:
    """How trials are sent: by the engine's transport, which the API itself knows nothing of."""

    async def send(trial: Trial) -> Tried:
        attempt, fields, body = await shot.send(
            trial.endpoint, trial.payload, trial.style, trial.delivery_id, by_previous=trial.by_previous
        )
        if is_released(attempt):
            return Tried(attempt=None, fields=fields, body=body, reason=attempt.error or "released")
        return Tried(attempt=attempt, fields=fields, body=body)

    return send


def tune() -> None:
    """Settings of this process that were measured to matter."""
    # glibc maps and unmaps each of the loop's 256 KiB read buffers until a larger block was freed once: 50 → 21 µs a
    # read.
    block = bytes(16 << 20)
    del block
    gc.collect()
    gc.freeze()  # what is loaded by now stays: no collection needs to look at it again
    gc.set_threshold(50_000, 50, 100)


def files_wanted(config: Config) -> int:
    """How many descriptors a full load takes."""
    return config.delivery.max_in_flight * FILES_PER_REQUEST + OTHER_FILES


def connections_max(config: Config) -> int:
    """How many descriptors deliveries may take: what everything else leaves, but half of them if they are few."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        limit = files_wanted(config)
    return max(limit - OTHER_FILES, limit // 2)


def raise_file_limit(config: Config) -> None:
    """Every connection is a descriptor: take what the system lets us have, and say when it is too little."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = files_wanted(config)
    if soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        log.warning(
            "files.few",
            limit=soft,
            wanted=wanted,
            connections=connections_max(config),
            remedy="LimitNOFILE= in the unit, or a lower [delivery] max_in_flight",
        )


async def run(
    config: Config,
    *,
    wait: bool = False,
    only: str | None = None,
    reload: Callable[[], Config] | None = None,
    on_ready: Callable[[Daemon], None] | None = None,
    signals: bool = True,
) -> None:
    """Run until stopped by a signal or `Daemon.stop`. `config` has a DSN (see `database`).

    `wait` keeps trying while PostgreSQL is away at the start. `only` leaves one half out: "engine" serves no API and no
    dashboard, "web" delivers nothing. `reload` gives the configuration anew at SIGHUP.
    `on_ready` is called once events are being delivered, or another daemon does that and this one stands by. Raises
    ConfigurationError, SchemaMismatch, DatabaseUnreachable.
    """
    sockets = _passed_sockets()
    settings = await _reach(config, wait=wait)
    vault = open_vault(config)
    await _agree_on_key(config, vault, settings.get("key_fingerprint"))
    raise_file_limit(config)
    guard = Guard(config.network.allow, config.network.allow_http)
    transport = Transport(
        settings=TransportSettings(
            idle_connections_max=config.delivery.max_in_flight,  # fewer, and a full load would dial again and again
            connections_max=connections_max(config),
            ca_file=config.network.ca_file or None,
            proxy=config.network.proxy or None,
            source_address=config.network.source_address or None,
        ),
        guard=guard,
        clock=time.monotonic,
    )
    ids = DeliveryIds(bytes.fromhex(settings["delivery_id_key"]))
    spans = open_spans(config.otel.endpoint, config.otel.service, ids) if config.otel.endpoint else None
    pool = await open_pool(config.database.dsn, size=config.database.pool_size)
    engine = (
        Onlooker(pool, transport)
        if only == "web"
        else Fleet(_engine_settings(config), transport=transport, guard=guard, vault=vault, ids=ids, spans=spans)
    )
    accounts = AccountStore(pool, config.brand.key_prefix)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(pool.close)
        if spans is not None:
            stack.push_async_callback(spans.close)
        web = Web(
            endpoints=EndpointStore(pool, vault),
            accounts=accounts,
            events=EventStore(pool),
            guard=guard,
            catalogue=catalogue_of(config),
            defaults=_defaults(config),
            snapshot=engine.everything,
            stores=Stores(sessions=SessionStore(pool), overview=OverviewStore(pool)),
            brand=config.brand.name,
            header_prefix=config.brand.header_prefix,
            user_agent=config.brand.user_agent,
        )
        shot = SingleShot(transport, lambda: web.guard, user_agent=web.user_agent, header_prefix=web.header_prefix)
        web.log = Log(
            deliveries=DeliveryStore(pool, out=engine.out), replays=ReplayStore(pool), ids=ids, send=sender(shot)
        )
        if config.server.operator_key:
            web.operator = Operator(key=config.server.operator_key, store=OperatorStore(pool), settings=config.masked())
        url = ""
        if only != "engine":
            api = await serve(
                build_api_app(web), config.server.listen, key="[server] listen", sockets=sockets["server"]
            )
            stack.push_async_callback(api.cleanup)
            url = _url(api)
        if config.metrics.listen:
            metrics = await serve(
                build_metrics_app(engine.snapshot, state_directory=Path(config.state.directory)),
                config.metrics.listen,
                key="[metrics] listen",
                sockets=sockets["metrics"],
            )
            stack.push_async_callback(metrics.cleanup)
        daemon = Daemon(config, engine, pool, accounts, web, url)
        if signals:
            stack.callback(_handle_signals(daemon, reload))
        tune()
        running = asyncio.create_task(engine.run(), name="engine")
        announcing = asyncio.create_task(_announce(daemon, running, on_ready), name="announcer")
        try:
            await running
        finally:
            systemd.notify("STOPPING=1")
            announcing.cancel()
    log.info("stopped")


def _passed_sockets() -> dict[str, list[socket.socket]]:
    """Sockets passed by the service manager, by the section whose `listen` they replace. Raises ConfigurationError."""
    passed: dict[str, list[socket.socket]] = {"server": [], "metrics": []}
    try:
        for name, each in systemd.take_sockets():
            passed["metrics" if name == "metrics" else "server"].append(each)
    except OSError as error:
        raise ConfigurationError([f"LISTEN_FDS: expected sockets: {error.strerror}"]) from None
    return passed


def _url(runner: Any) -> str:
    """Where the API really listens: port 0 asks the system for one, and a socket may have been passed."""
    address = runner.addresses[0]
    if not isinstance(address, tuple):
        return f"unix:{address}"
    host, port = address[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _announce(daemon: Daemon, running: asyncio.Task[None], on_ready: Callable[[Daemon], None] | None) -> None:
    """Say when we are ready, then what we do, and feed the watchdog as long as there is progress."""
    engine = daemon.engine
    while not engine.settled and not running.done():  # noqa: ASYNC110  either may come first, and one of them is a task
        await asyncio.sleep(READY_POLL_S)
    log.info("ready", api=daemon.url or None, database=place(daemon.config.database.dsn), role=engine.snapshot().role)
    systemd.notify("READY=1", f"STATUS={engine.snapshot().role}")
    if on_ready is not None:
        on_ready(daemon)
    every = systemd.watchdog_s() or STATUS_S
    while True:
        await asyncio.sleep(min(every, STATUS_S))
        s = engine.snapshot()
        # A drain reads nothing more and has an end of its own.
        alive = ("WATCHDOG=1",) if daemon.stopping or s.progress_age_s < every else ()
        systemd.notify(f"STATUS={_status(s, stopping=daemon.stopping)}", *alive)


def _status(s: Snapshot, *, stopping: bool) -> str:
    """What `systemctl status` shows."""
    does = "draining" if stopping else s.role if s.database else "database away"
    return f"{does}: {s.queued} queued, {s.in_flight} in flight, {s.retries_waiting} retries waiting"


def _handle_signals(daemon: Daemon, reload: Callable[[], Config] | None) -> Callable[[], None]:
    """Install the handlers; return what takes them away again."""
    loop = asyncio.get_running_loop()
    asked = False

    def terminate() -> None:
        nonlocal asked
        if asked:
            os._exit(EXIT_NOW)  # nothing is lost: what is not settled is still in the outbox or pending
        asked = True
        daemon.stop()
        systemd.notify(
            "STOPPING=1",
            f"EXTEND_TIMEOUT_USEC={int((daemon.config.delivery.drain_s + SETTLE_S) * 1e6)}",
            f"STATUS={_status(daemon.engine.snapshot(), stopping=True)}",
        )

    def hang_up() -> None:
        if reload is not None:
            _reload(daemon, reload)

    for number, handler in ((signal.SIGTERM, terminate), (signal.SIGINT, terminate), (signal.SIGHUP, hang_up)):
        loop.add_signal_handler(number, handler)

    def restore() -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)

    return restore


def _reload(daemon: Daemon, read: Callable[[], Config]) -> None:
    """Take over what can be changed while running, and say what cannot."""
    systemd.reloading()
    try:
        fresh = read()
        can, cannot = daemon.config.reloadable_differences(fresh)
        daemon.config = daemon.config.with_reloadable_of(fresh)
        start_logging(daemon.config.log)
        guard = Guard(daemon.config.network.allow, daemon.config.network.allow_http)
        daemon.web.guard, daemon.web.catalogue, daemon.web.defaults = (
            guard,
            catalogue_of(fresh),
            _defaults(daemon.config),
        )
        if daemon.web.operator is not None:
            daemon.web.operator.settings = daemon.config.masked()
        daemon.engine.reconfigure(_engine_settings(daemon.config), guard)
        log.info("reloaded", changed=can, needs_restart=cannot)
    except DispatcherError as error:
        log.warning("reload.refused", reason=str(error))
    systemd.notify("READY=1")


def reader_of(path: Path | None) -> Callable[[], Config]:
    """What `run` takes as `reload`: the same file and environment, read again."""
    return lambda: load(path, os.environ)
