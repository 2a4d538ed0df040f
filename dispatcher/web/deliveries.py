"""`/v1/webhooks/{id}/deliveries` and `/v1/deliveries`: what became of each event at each webhook, and once more.

A delivery that is only in memory (just queued, or in flight for the first time) is in no list: it comes into sight when
it is settled or fails, after two seconds at the latest. `in_flight` is what the daemon that is asked has out itself:
what another one has out is `pending` or `retrying` here.

In a list `attempts` is how many there were; in a single delivery they stand themselves. `status` is the delivery's
state, `status_code` what the receiver answered last. A list begins with what waits for its first attempt; then comes
what changed last. Its cursors are opaque, ids of entries do as well, and what is attempted meanwhile moves to the
front.
"""

from __future__ import annotations

from typing import Final

from aiohttp import web

from dispatcher.model import DeliveryState, Result
from dispatcher.store.accounts import KeyOwner
from dispatcher.store.deliveries import DeliveryDetail
from dispatcher.store.endpoints import EndpointRecord
from dispatcher.web.answers import Wanted, answer, no_query, page, wanted
from dispatcher.web.asked import ID, WEBHOOK, nothing_said
from dispatcher.web.auth import caller
from dispatcher.web.chronicle import Chronicle, DeliveryAnswer, DeliveryDetailAnswer, filter_of
from dispatcher.web.openapi import PAGE, Answer, PageOf, Parameter, operation
from dispatcher.web.parts import Log, Web
from dispatcher.web.problems import not_found

FILTERS: Final = ("status", "type", "since", "until", "status_class", "event_id")
_DATE_TIME: Final = {"type": "string", "format": "date-time"}
_FILTERS: Final = (
    Parameter("status", "Only in this state.", {"enum": [state.value for state in DeliveryState]}),
    Parameter("type", "Only events of this type."),
    Parameter("since", "Last changed then or later; before the first attempt, written then or later.", _DATE_TIME),
    Parameter("until", "Last changed earlier.", _DATE_TIME),
    Parameter("status_class", "By what the last attempt came to.", {"enum": [result.value for result in Result]}),
    Parameter("event_id", "Only of this event."),
)


class Deliveries:
    """The calls."""

    def __init__(self, parts: Web, log: Log) -> None:
        self._log = log
        self._chronicle = Chronicle(parts, log)

    def routes(self) -> list[web.RouteDef]:
        """Paths below /v1."""
        one = f"/deliveries/{ID}"
        return [
            web.get(f"{WEBHOOK}/deliveries", self.browse),
            web.get(one, self.get),
            web.post(f"{one}/retry", self.retry),
        ]

    @operation("Deliveries", parameters=[*PAGE, *_FILTERS], answers={200: PageOf(DeliveryAnswer)})
    async def browse(self, request: web.Request) -> web.Response:
        """A webhook's deliveries; filters by status, type, since, until, status_class and event_id."""
        part = wanted(request, *FILTERS)
        return page(*await self.listed(caller(request), request.match_info["id"], part))

    async def listed(self, owner: KeyOwner, webhook_id: str, part: Wanted) -> tuple[list[DeliveryAnswer], str | None]:
        """A part of a webhook's list, and the cursor to go on from. Raises Problem."""
        chosen, told = filter_of(part.filters), self._chronicle
        endpoint_id = await self._log.deliveries.endpoint(owner.account_id, webhook_id)
        if endpoint_id is None:
            raise not_found("webhook")
        after = await told.place(owner.account_id, endpoint_id, "after", part.after)
        before = await told.place(owner.account_id, endpoint_id, "before", part.before)
        found = await self._log.deliveries.browse(
            endpoint_id, owner.account, chosen, limit=part.limit, after=after, before=before
        )
        cursor = None if found.reached is None else told.cursor(endpoint_id, found.reached)
        return [told.line(record, webhook_id) for record in found.deliveries], cursor

    @operation("Deliveries", answers={200: DeliveryDetailAnswer})
    async def get(self, request: web.Request) -> web.Response:
        """One delivery with every attempt."""
        no_query(request)
        return answer(self._chronicle.whole(*await self._found(request)))

    @operation(
        "Deliveries",
        answers={201: Answer(DeliveryAnswer, headers=("Location",))},
        problems=["webhook_disabled", "event_gone"],
    )
    async def retry(self, request: web.Request) -> web.Response:
        """Deliver its event to its webhook once more: 201 with a new delivery, whatever became of the old one."""
        await nothing_said(request)
        made = await self._chronicle.redeliver(*await self._found(request))
        return answer(made, 201, {"Location": f"/v1/deliveries/{made.id}"})

    async def _found(self, request: web.Request) -> tuple[DeliveryDetail, EndpointRecord]:
        return await self._chronicle.find(caller(request).account_id, request.match_info["id"])
