"""No object of ours shows a secret by its repr: that is what a traceback, a debugger or a careless log line prints."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from counter import open_desk

from dispatcher.store.endpoints import EndpointStore
from dispatcher.web import webhooks

if TYPE_CHECKING:
    from tests.web.conftest import Api

SECRET = "whsec_TUFSS0VELXRoYXQtbm90aGluZy1lbHNlLWlzLWxpa2U="
OTHER = "another MARKED secret, of plain text"
HEADER = "Bearer MARKED-header"
LIKE_IT = (SECRET, OTHER, HEADER)


def showing() -> list[str]:
    """What kinds of objects of ours, of all that are alive, have a repr that gives it away."""
    found = set()
    for thing in gc.get_objects():
        kind = type(thing)
        if str(kind.__module__).startswith("dispatcher.") and not isinstance(thing, type):
            text = repr(thing)
            found |= {kind.__qualname__ for secret in LIKE_IT if secret in text}
    return sorted(found)


async def test_nothing_alive_shows_a_secret(api: Api, pool: Any, database: str) -> None:
    async with open_desk(api, pool, database) as desk:
        await desk.start()
        webhook = await desk.webhook(headers={"Authorization": HEADER})
        await desk.ask("POST", f"/webhooks/{webhook}/rotate-secret", {"secret": SECRET})
        await desk.ask("POST", f"/webhooks/{webhook}/rotate-secret", {"secret": OTHER})
        await desk.emit("email.sent", "email.sent")
        await desk.settled(webhook, 2)
        store = EndpointStore(pool, desk.house.endpoints._vault)
        account = await pool.fetchval("SELECT account_id FROM dispatcher.endpoint WHERE public_id = $1", webhook)
        held = [await store.get(account, webhook), await store.secret(account, webhook)]
        assert showing() == []
        assert held


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in vars(webhooks).values()
        if isinstance(kind, type)
        and issubclass(kind, msgspec.Struct)
        and {"secret", "headers"} & set(kind.__struct_fields__)
    ],
)
def test_no_body_or_answer_with_a_secret_in_it_shows_it(kind: type[msgspec.Struct]) -> None:
    values = dict.fromkeys(kind.__struct_fields__, SECRET)
    assert SECRET not in repr(kind(**values))
