"""`/v1/webhooks/{id}/replay` and `…/replays`: new deliveries of old events.

`status` chooses: `failed` events that were given up, `missed` ones that never arrived (those from before the webhook
existed among them), or `all`. `dry_run` counts what would be sent and begins nothing; of a long history it counts the
first part, and `is_lower_bound` says so. What is on its way already is never replayed.

A replay that was begun by mistake is cancelled by DELETE: what it queued and nobody attempted is taken back.
"""

# No `from __future__ import annotations` here: the fields' annotations are objects that bodies.py works with.

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Final

import msgspec
from aiohttp import web
from msgspec import UNSET, Meta, UnsetType

from dispatcher.core.routing import valid_filter
from dispatcher.model import EndpointId, EndpointStatus
from dispatcher.store.replays import ID_PREFIX, RUNNING_MAX, Choice, ReplayRecord, ReplayStatus, Selection
from dispatcher.web.answers import answer, cut, moment, no_query, page, wanted
from dispatcher.web.asked import A_MOMENT, WEBHOOK, read_moment
from dispatcher.web.auth import caller
from dispatcher.web.bodies import Check, expecting, read_body
from dispatcher.web.openapi import PAGE, Answer, PageOf, operation
from dispatcher.web.parts import Log, Web
from dispatcher.web.problems import FieldError, Problem, invalid, not_found

TYPES_MAX: Final = 100
CANCELLED: Final = "cancelled by its owner"


class NewReplay(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of POST …/replay. `since` and `until` say when an event was written; `types` narrows the webhook's."""

    since: Annotated[str, expecting(A_MOMENT)]
    until: Annotated[str | UnsetType | None, expecting(A_MOMENT)] = UNSET
    status: Annotated[Selection, expecting('"failed", "missed" or "all"')]
    types: Annotated[
        Annotated[list[str], Meta(min_length=1, max_length=TYPES_MAX)] | UnsetType | None,
        expecting(f'a list of 1 to {TYPES_MAX} event types, like ["email.delivered", "billing.*"]'),
    ] = UNSET
    dry_run: Annotated[bool, expecting("true or false")] = False


class ReplayAnswer(msgspec.Struct, kw_only=True):
    """A replay. `looked` counts events looked at, `queued` the deliveries made of them; `progress` goes from 0 to 1."""

    id: str
    webhook_id: str
    status: ReplayStatus
    reason: str | None
    selection: Selection
    types: list[str] | None
    since: str | None
    until: str | None
    looked: int
    queued: int
    progress: float
    created_at: str | None
    finished_at: str | None


class PreviewAnswer(msgspec.Struct, kw_only=True):
    """What a replay would queue."""

    dry_run: bool
    count: int
    is_lower_bound: bool
    looked: int


class Replays:
    """The calls."""

    def __init__(self, parts: Web, log: Log) -> None:
        self._web = parts
        self._log = log

    def routes(self) -> list[web.RouteDef]:
        """Paths below /v1."""
        one = f"{WEBHOOK}/replays/{{job:[A-Za-z0-9_-]{{1,64}}}}"
        return [
            web.post(f"{WEBHOOK}/replay", self.create),
            web.get(f"{WEBHOOK}/replays", self.browse),
            web.get(one, self.get),
            web.delete(one, self.cancel),
        ]

    @operation(
        "Deliveries",
        body=NewReplay,
        answers={200: PreviewAnswer, 202: Answer(ReplayAnswer, headers=("Location",))},
        problems=["webhook_disabled", "too_many_replays"],
    )
    async def create(self, request: web.Request) -> web.Response:
        """Begin a replay: 202 with it. With dry_run, count: 200."""
        no_query(request)
        body = await read_body(request, NewReplay, CHECKS)
        found = await self.begin(caller(request).account_id, request.match_info["id"], body)
        if isinstance(found, PreviewAnswer):
            return answer(found)
        return answer(found, 202, {"Location": f"/v1/webhooks/{found.webhook_id}/replays/{found.id}"})

    @operation("Deliveries", answers={200: ReplayAnswer})
    async def get(self, request: web.Request) -> web.Response:
        """A replay and how far it has come."""
        no_query(request)
        account_id, webhook_id = caller(request).account_id, request.match_info["id"]
        record = await self._log.replays.get(await self._endpoint(account_id, webhook_id), request.match_info["job"])
        if record is None:
            raise not_found("replay")
        return answer(shown(record, webhook_id))

    @operation("Deliveries", parameters=PAGE, answers={200: PageOf(ReplayAnswer)})
    async def browse(self, request: web.Request) -> web.Response:
        """A webhook's replays, newest first."""
        part = wanted(request, prefix=ID_PREFIX)
        endpoint_id = await self._endpoint(caller(request).account_id, request.match_info["id"])
        found = await self._log.replays.browse(endpoint_id, limit=part.limit + 1, after=part.after, before=part.before)
        records, next_cursor = cut(found, part)
        return page([shown(record, request.match_info["id"]) for record in records], next_cursor)

    @operation("Deliveries", answers={200: Answer(ReplayAnswer, "The replay as it ended.")})
    async def cancel(self, request: web.Request) -> web.Response:
        """Stop a replay. What it queued is taken back, except for what is about to be sent; `queued` counts the rest.

        One of which everything was sent already stays as it is.
        """
        no_query(request)
        endpoint_id = await self._endpoint(caller(request).account_id, request.match_info["id"])
        record = await self._log.replays.cancel(endpoint_id, request.match_info["job"], CANCELLED)
        if record is None:
            raise not_found("replay")
        return answer(shown(record, request.match_info["id"]))

    async def begin(self, account_id: int, webhook_id: str, body: NewReplay) -> ReplayAnswer | PreviewAnswer:
        """Do what a body that was checked asks for. Raises Problem."""
        endpoint_id = await self._endpoint(account_id, webhook_id)
        choice = _choice(body)
        if body.dry_run:
            return await self._preview(endpoint_id, choice)
        record = await self._log.replays.create(endpoint_id, choice)
        if record is None:
            raise await self._refusal(account_id, webhook_id)
        return shown(record, webhook_id)

    async def _preview(self, endpoint_id: EndpointId, choice: Choice) -> PreviewAnswer:
        found = await self._log.replays.preview(endpoint_id, choice)
        if found is None:
            raise not_found("webhook")
        return PreviewAnswer(dry_run=True, count=found.count, is_lower_bound=not found.is_whole, looked=found.looked)

    async def _endpoint(self, account_id: int, webhook_id: str) -> EndpointId:
        found = await self._log.deliveries.endpoint(account_id, webhook_id)
        if found is None:
            raise not_found("webhook")
        return found

    async def _refusal(self, account_id: int, webhook_id: str) -> Problem:
        webhook = await self._web.endpoints.get(account_id, webhook_id)
        if webhook is None:
            return not_found("webhook")
        if webhook.status is EndpointStatus.DISABLED:
            return Problem(409, "webhook_disabled", "A disabled webhook receives nothing: resume it first.")
        return Problem(409, "too_many_replays", f"At most {RUNNING_MAX} replays of a webhook run at once.")


def shown(record: ReplayRecord, webhook_id: str) -> ReplayAnswer:
    """A replay as JSON tells it."""
    return ReplayAnswer(
        id=record.id,
        webhook_id=webhook_id,
        status=record.status,
        reason=record.reason,
        selection=record.selection,
        types=record.types,
        since=moment(record.since),
        until=moment(record.until),
        looked=record.looked,
        queued=record.queued,
        progress=record.progress,
        created_at=moment(record.created_at),
        finished_at=moment(record.finished_at),
    )


def _choice(body: NewReplay) -> Choice:
    """What the body asks for; until now, if it does not say. Raises Problem."""
    since, now = read_moment(body.since), datetime.now(UTC)
    until = read_moment(body.until) if isinstance(body.until, str) else now
    assert since is not None
    assert until is not None
    if until <= since:
        field = "until" if isinstance(body.until, str) else "since"
        raise invalid(
            [FieldError(field, "expected a time after since" if field == "until" else "expected a time in the past")]
        )
    types = body.types if isinstance(body.types, list) else None
    return Choice(selection=body.status, since=since, until=min(until, now), types=types)


def _since(text: str) -> Iterator[FieldError]:
    return _check_moment("since", text)


def _until(text: str) -> Iterator[FieldError]:
    return _check_moment("until", text)


def _check_moment(field: str, text: str) -> Iterator[FieldError]:
    if read_moment(text) is None:
        yield FieldError(field, f"expected {A_MOMENT}")


def _check_types(types: list[str]) -> Iterator[FieldError]:
    for place, name in enumerate(types):
        if not valid_filter(name):
            yield FieldError(f"types[{place}]", 'expected a type like "email.delivered", or a prefix like "email.*"')


CHECKS: Final[dict[str, Check]] = {"since": _since, "until": _until, "types": _check_types}
"""What is wrong with a body beyond its types."""
