"""Live events: each once, none missed, in whatever order transactions commit."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import aiohttp
import asyncpg
import pytest
from aiohttp.test_utils import TestServer

from dispatcher.core.rendering import render
from dispatcher.model import BodyStyle
from dispatcher.store.tail import Row, Tail
from dispatcher.web import listen
from dispatcher.web.api import build_api_app
from dispatcher.web.listen import Listener, Message

if TYPE_CHECKING:
    from tests.web.conftest import Api

PATIENCE_S = 30.0
ODD = {"n": 1.0, "2": "two", "1": 1e21, "ä": "😀\u2028\\", "deep": [[], {}, {"x": -0.0}]}


class Stream:
    """What a client reads: messages as dicts of their fields; comments under the name of an empty text."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response

    async def next(self) -> dict[str, str]:
        message: dict[str, str] = {}
        async with asyncio.timeout(PATIENCE_S):
            async for line in self.response.content:
                text = line.decode().removesuffix("\n")
                if not text and message:
                    return message
                name, _, value = text.partition(":")
                message[name] = value.removeprefix(" ")
        raise EOFError

    async def event(self) -> dict[str, str]:
        while "event" not in (message := await self.next()):
            pass
        return message

    async def types(self, many: int) -> list[str]:
        return [(await self.event())["event"] for _ in range(many)]


@contextlib.asynccontextmanager
async def listening(api: Api, query: str = "", *, key: str = "acme", **headers: str) -> AsyncIterator[Stream]:
    """A stream that has begun: what is committed from here on must come."""
    given = {"Authorization": f"Bearer {api.keys[key]}", **{name.replace("_", "-"): v for name, v in headers.items()}}
    async with api._client.get(f"/v1/listen{query}", headers=given) as response:
        assert response.status == 200, await response.text()
        assert response.content_type == "text/event-stream"
        stream = Stream(response)
        assert (await stream.next())[""] == "listening"
        yield stream


@pytest.fixture
async def app(database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()


async def insert(connection: asyncpg.Connection, type_: str, account: str = "acme", data: str = "{}") -> str:
    sql = "INSERT INTO dispatcher.outbox (account, type, data) VALUES ($1, $2, $3) RETURNING id"
    return str(await connection.fetchval(sql, account, type_, data))


async def test_an_event_comes_as_it_would_be_sent(api: Api, app: asyncpg.Connection) -> None:
    async with listening(api) as compact, listening(api, "?body_style=python") as python:
        event_id = await insert(app, "email.sent", data=json.dumps(ODD))
        created_at = await app.fetchval("SELECT created_at FROM dispatcher.outbox")
        for stream, style in ((compact, BodyStyle.COMPACT), (python, BodyStyle.PYTHON)):
            message = await stream.event()
            body = render(
                event_id=event_id, type="email.sent", created_at=created_at, data=json.dumps(ODD), style=style
            )
            assert message == {"id": event_id, "event": "email.sent", "data": body.decode()}


async def test_only_what_is_committed_comes_and_only_to_its_account(api: Api, app: asyncpg.Connection) -> None:
    async with listening(api) as mine, listening(api, key="rival") as theirs:
        with contextlib.suppress(ZeroDivisionError):
            async with app.transaction():
                await insert(app, "never.committed")
                raise ZeroDivisionError
        await insert(app, "to.acme")
        await insert(app, "to.rival", "rival")
        assert await mine.types(1) == ["to.acme"]
        assert await theirs.types(1) == ["to.rival"]


async def test_filters_pick_types(api: Api, app: asyncpg.Connection) -> None:
    async with listening(api, "?events=email.sent,domain.*") as stream:
        for type_ in ("email.bounced", "email.sent", "domain.verified", "domainx.verified", "email.sent"):
            await insert(app, type_)
        assert await stream.types(3) == ["email.sent", "domain.verified", "email.sent"]


async def test_what_cannot_be_sent_is_left_out(api: Api, app: asyncpg.Connection) -> None:
    async with listening(api) as stream:
        await insert(app, "a.list", data="[]")
        await insert(app, "Not a type")
        await insert(app, "a.b")
        assert await stream.types(1) == ["a.b"]


async def test_a_transaction_that_commits_late_is_not_missed(api: Api, app: asyncpg.Connection, database: str) -> None:
    """Its id, its sequence number and its transaction id are all older than those of an event that came long ago."""
    slow = await asyncpg.connect(database)
    try:
        async with listening(api) as stream:
            async with slow.transaction():
                await insert(slow, "begun.first")
                await insert(app, "begun.second")
                assert await stream.types(1) == ["begun.second"]
            assert await stream.types(1) == ["begun.first"]
    finally:
        await slow.close()


async def test_last_event_id_goes_on_behind_that_event(api: Api, app: asyncpg.Connection) -> None:
    async with listening(api) as stream:
        await insert(app, "number.one")
        seen = await stream.event()
    await insert(app, "number.two")
    async with listening(api, Last_Event_ID=seen["id"]) as stream:
        await insert(app, "number.three")
        assert await stream.types(2) == ["number.two", "number.three"]


async def test_an_event_of_the_list_is_a_place_to_go_on_from(api: Api, app: asyncpg.Connection) -> None:
    first = await insert(app, "number.one")
    await insert(app, "number.two")
    async with listening(api, Last_Event_ID=first) as stream:
        assert await stream.types(1) == ["number.two"]


async def test_going_on_misses_no_transaction_that_was_open_and_repeats_none(
    api: Api, app: asyncpg.Connection, database: str
) -> None:
    slow = await asyncpg.connect(database)
    try:
        async with slow.transaction():
            await insert(slow, "begun.first")
            async with listening(api) as stream:
                await insert(app, "begun.second")
                seen = await stream.event()
                assert seen["id"].startswith(f"{json.loads(seen['data'])['id']}.")
        await insert(app, "begun.third")
        async with listening(api, Last_Event_ID=seen["id"]) as stream:
            both = [await stream.event(), await stream.event()]
        assert [message["event"] for message in both] == ["begun.first", "begun.third"]
        # Having come after begun.second, begun.first stands for a place behind both.
        async with listening(api, Last_Event_ID=both[0]["id"]) as stream:
            assert await stream.types(1) == ["begun.third"]
    finally:
        await slow.close()


@pytest.mark.parametrize("given", ["evt_unknown", "no id at all", "x.y", "evt_1.AAAA", "x" * 300, "é"])
async def test_a_place_that_is_unknown_is_422(api: Api, given: str) -> None:
    answer = await api("GET", "/v1/listen", headers={"Last-Event-ID": given})
    assert (answer.status, answer.fields) == (422, ["Last-Event-ID"])


async def test_a_place_of_another_account_is_unknown(api: Api, app: asyncpg.Connection, database: str) -> None:
    slow = await asyncpg.connect(database)
    try:
        async with slow.transaction():
            await insert(slow, "keeps.ids_sealed", "rival")
            async with listening(api, key="rival") as stream:
                await insert(app, "a.b", "rival")
                sealed = (await stream.event())["id"]
    finally:
        await slow.close()
    for given in (sealed, sealed.partition(".")[0]):
        answer = await api("GET", "/v1/listen", headers={"Last-Event-ID": given})
        assert answer.status == 422
    async with listening(api, key="rival", Last_Event_ID=sealed) as stream:
        assert await stream.types(1) == ["keeps.ids_sealed"]


async def test_what_is_sent_again_comes_again_without_an_id(
    api: Api, app: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listen, "AGAIN_S", 0.0)
    await api.webhook()
    event_id = await insert(app, "email.sent")
    async with listening(api) as stream, listening(api, key="rival") as theirs:
        for generation, attempt in ((0, 2), (1, 1), (1, 2), (2, 1)):
            await app.execute(
                "INSERT INTO dispatcher.attempt (at, event_seq, event_xid, endpoint_id, generation, attempt, state,"
                " duration_us) SELECT now(), o.seq, o.xid, e.id, $1, $2, 'delivered', 1"
                " FROM dispatcher.outbox o, dispatcher.endpoint e",
                generation,
                attempt,
            )
        again = [await stream.event(), await stream.event()]
        assert [json.loads(message["data"])["id"] for message in again] == [event_id, event_id]
        assert all("id" not in message for message in again)
        await insert(app, "the.end")
        await insert(app, "the.end", "rival")
        assert await stream.types(1) == ["the.end"]
        assert await theirs.types(1) == ["the.end"]


async def retry_by_hand(app: asyncpg.Connection) -> int:
    """As the API makes one, for a webhook that can take nothing: its generation."""
    return await app.fetchval(  # type: ignore[no-any-return]
        "INSERT INTO dispatcher.pending"
        " (endpoint_id, event_seq, generation, event_xid, event_at, state, attempts, due_at)"
        " SELECT e.id, o.seq, nextval('dispatcher.generation_seq'), o.xid, o.written_at, 'pending', 0, 'infinity'"
        " FROM dispatcher.outbox o, dispatcher.endpoint e WHERE o.type = 'email.sent' RETURNING generation"
    )


async def test_a_retry_by_hand_comes_when_it_is_made_and_not_again_when_it_is_sent(
    api: Api, app: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listen, "AGAIN_S", 0.0)
    await api.webhook()
    event_id = await insert(app, "email.sent")
    await retry_by_hand(app)  # before anybody listened
    async with listening(api) as stream, listening(api, key="rival") as theirs:
        generation = await retry_by_hand(app)
        again = await stream.event()
        assert (json.loads(again["data"])["id"], "id" in again) == (event_id, False)
        async with listening(api) as late:  # to whom it is old
            await app.execute(
                "WITH gone AS (DELETE FROM dispatcher.pending WHERE generation = $1 RETURNING *)"
                " INSERT INTO dispatcher.attempt"
                " (at, event_seq, event_xid, endpoint_id, generation, attempt, state, duration_us)"
                " SELECT now(), event_seq, event_xid, endpoint_id, generation, 1, 'delivered', 1 FROM gone",
                generation,
            )
            for account in ("acme", "rival"):
                await insert(app, "the.middle", account)
            for each in (stream, theirs, late):
                assert await each.types(1) == ["the.middle"]
            # What is sent again is looked for between two pages: what must not come would come before this.
            for account in ("acme", "rival"):
                await insert(app, "the.end", account)
            for each in (stream, theirs, late):
                assert await each.types(1) == ["the.end"]


async def test_what_a_replay_holds_comes_when_it_is_sent(
    api: Api, app: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listen, "AGAIN_S", 0.0)
    await api.webhook()
    await insert(app, "email.sent")
    async with listening(api) as stream:
        generation = await retry_by_hand(app)
        await stream.event()
        await app.execute(
            "INSERT INTO dispatcher.replay (id, endpoint_id, generation, selection, since, until)"
            " SELECT 'rpl_1', id, $1, 'all', now() - interval '1 day', now() FROM dispatcher.endpoint",
            generation + 1,
        )
        await retry_by_hand(app)  # draws the generation of that replay
        await retry_by_hand(app)
        await stream.event()
        await insert(app, "the.end")
        assert await stream.types(1) == ["the.end"]


async def test_nothing_runs_when_nobody_listens(parts: Any) -> None:
    call = listen.Listen(parts, parts.events.tail())
    one, other = Listener("acme", ("*",), BodyStyle.COMPACT), Listener("acme", ("*",), BodyStyle.COMPACT)
    assert not call.feed.is_running
    async with call.feed.joined(one):
        async with call.feed.joined(other):
            assert call.feed.is_running
        assert call.feed.is_running
    assert not call.feed.is_running
    assert call.feed.listeners == set()


async def test_a_client_that_left_is_noticed_without_an_event(api: Api) -> None:
    async with listening(api) as stream:
        stream.response.close()
    async with asyncio.timeout(PATIENCE_S):
        while any("listen feed" in task.get_name() for task in asyncio.all_tasks()):
            await asyncio.sleep(0.01)


async def test_a_heartbeat_shows_that_the_connection_lives_and_ends_it_for_a_revoked_key(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listen, "HEARTBEAT_S", 0.05)
    async with listening(api) as stream:
        assert (await stream.next())[""] == "heartbeat"
        for record in await api.parts.accounts.list_keys():
            await api.parts.accounts.revoke_key(record.id)
        with contextlib.suppress(EOFError):
            while (await stream.next())[""] == "heartbeat":
                pass
        assert stream.response.content.at_eof()


async def test_a_client_that_does_not_keep_up_is_cut_off(
    api: Api, app: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listen, "QUEUE_BYTES_MAX", 1000)
    async with listening(api) as stream:
        await app.execute(
            "INSERT INTO dispatcher.outbox (account, type, data)"
            " SELECT 'acme', 'email.sent', json_build_object('x', repeat('x', 2000)) FROM generate_series(1, 3)"
        )
        with pytest.raises((EOFError, aiohttp.ClientError)):
            await stream.event()


async def test_too_many_listeners_are_refused(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "ACCOUNT_LISTENERS_MAX", 1)
    async with listening(api), listening(api, key="rival"):
        answer = await api("GET", "/v1/listen")
        assert (answer.status, answer.json["code"]) == (429, "too_many_listeners")
        assert int(answer.headers["Retry-After"]) > 0


@pytest.mark.parametrize(
    ("query", "field"),
    [("?events=emial.sent", "events"), ("?body_style=pretty", "body_style"), ("?event=a.b", "event"),
     ("?events=" + ",".join(["a.*"] * 101), "events")],
)  # fmt: skip
async def test_a_wrong_wish_is_422(api: Api, query: str, field: str) -> None:
    answer = await api("GET", f"/v1/listen{query}")
    assert (answer.status, answer.fields) == (422, [field])


async def test_without_a_key_there_is_nothing_to_hear(api: Api) -> None:
    assert (await api("GET", "/v1/listen", key="")).status == 401


async def test_a_shutdown_ends_every_stream(parts: Any) -> None:
    server = TestServer(build_api_app(parts))
    await server.start_server()
    _, key = await parts.accounts.create_key("acme")
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as session,
        session.get(server.make_url("/v1/listen")) as response,
    ):
        await Stream(response).next()
        async with asyncio.timeout(PATIENCE_S):
            closing = asyncio.create_task(server.close())
            assert await response.content.read() == b""
            await closing


async def test_many_producers_and_short_pages_lose_nothing(parts: Any, database: str) -> None:
    """Against a list: several connections commit at random while two rooms listen, one of them coming and going."""
    many, producers = 60, 4
    feed = listen.Feed(Tail(parts.events.tail()._db, look_max=7))
    got: list[str] = []

    async def produce(number: int) -> None:
        connection = await asyncpg.connect(database)
        for n in range(many):
            async with connection.transaction():
                await insert(connection, f"p{number}.n{n}")
                await asyncio.sleep((n * 7 + number) % 5 * 0.001)
        await connection.close()

    listener = Listener("acme", ("*",), BodyStyle.COMPACT)
    async with feed.joined(listener):
        position = await feed.tail.now()
        async with asyncio.TaskGroup() as tasks:
            for number in range(producers):
                tasks.create_task(produce(number))
        while len(got) < many * producers:
            message = await listener.next(PATIENCE_S)
            assert message is not None, f"{len(got)} came"
            got.append(message.row.type)
    assert sorted(got) == sorted(f"p{number}.n{n}" for number in range(producers) for n in range(many))
    # And read from the beginning again, page by page, each page begun at the name of the last row of the one before.
    again: list[str] = []
    while True:
        page = await feed.tail.read(position, ["acme"])
        again += [row.type for row in page.rows]
        if page.is_last:
            break
        found = await feed.tail.find("acme", feed.tail.name(page.rows[-1]))
        assert found is not None
        position = found
    assert sorted(again) == sorted(got)


def test_a_queue_is_bounded_and_ends_its_listener() -> None:
    listener = Listener("acme", ("*",), BodyStyle.COMPACT)
    row = Row("evt_1", "acme", "a.b", '"' + "x" * (1 << 20) + '"', None, 0, None)
    for _ in range(3):
        listener.offer(Message(row, None))
    assert not listener.is_over
    listener.offer(Message(row, None))
    assert listener.is_over
