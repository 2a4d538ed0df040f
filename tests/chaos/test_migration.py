"""An upgrade from the first release under load, in which everything is killed that can be.

`tests/test_upgrade.py` holds the upgrade as it should go.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from daemons import connected, until
from releases import ROOT, Release, unpack_first_release
from siege import Siege

from dispatcher.store.schema import FIRST_RELEASE, migrations

NAME = "TrackPost-Webhooks/1.0"  # what both releases call themselves
OLD_EVENTS = 400
LOAD = 60
KILLS = 4
# Writers hold the tables most of the time, and a migration that cannot have its lock within 100 ms lets them go on: how
# many tries it takes is a matter of luck, and the program goes on for five minutes.
MIGRATION_S = 200.0
LIFE_S = 1.2  # at most, of a migration: half of it goes by before it has connected


async def subscribe(connection: Any, siege: Siege) -> None:
    """As it could be done in the first release."""
    await connection.executemany(
        "INSERT INTO dispatcher.endpoint (public_id, account_id, url, events)"
        " SELECT $1, id, $2, ARRAY[$3] FROM dispatcher.account",
        [
            (f"wh_{number}", f"{siege.subscribers.url}{path}", events)
            for number, (path, events) in enumerate(siege.proof.webhooks.items())
        ],
    )


@pytest.mark.timeout(280)
async def test_migration_and_daemon_are_killed_in_the_middle_of_an_upgrade_under_load(
    besiege: Callable[[str], Siege], empty_database: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tree = tmp_path / "first-release"
    tree.mkdir()
    old, new = (Release(each, tmp_path, empty_database) for each in (unpack_first_release(tree), ROOT))
    request.addfinalizer(old.end)
    request.addfinalizer(new.end)
    siege = besiege(empty_database)
    assert (await old.act("migrate"))[0] == 0
    async with connected(empty_database) as connection:
        await subscribe(connection, siege)
        daemon = await old.run("active")
        async with siege.application.writing():
            await siege.application.burst(OLD_EVENTS)
            await until(lambda: len(siege.subscribers.arrivals) > LOAD, "the load to be under way")
            for _ in range(KILLS):
                migration = new.start("migrate")
                await asyncio.sleep(siege.dice.uniform(0, LIFE_S))
                migration.kill()
                migration.wait()
            await siege.application.burst(LOAD)
            daemon.send_signal(signal.SIGKILL)
            daemon.wait()
            await siege.proof.crashed(NAME)
            assert (await new.act("migrate", patience_s=MIGRATION_S))[0] == 0
            version = await connection.fetchval("SELECT max(version) FROM dispatcher.migration")
            assert FIRST_RELEASE < version == migrations()[-1].version
            daemon = await new.run("active")
        siege.tell(await siege.proof.holds())
    daemon.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(daemon.wait, 60) == 0
