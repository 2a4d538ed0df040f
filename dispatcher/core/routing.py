"""Which webhooks an event is for.

A registry is one version of the whole table of webhooks, read in one snapshot: it never changes and is replaced as a
whole, so its answers can be remembered without ever going stale.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import Final

from dispatcher.core.rendering import TYPE_BYTES_MAX, is_type
from dispatcher.model import Endpoint, EndpointId, EndpointStatus

MEMO_MAX: Final = 8192  # types are any text an application inserts; at ≈ 200 bytes each, below 2 MiB

_PREFIX: Final = re.compile(r"(?:[a-z0-9_]+\.)+\*")


def valid_filter(text: str) -> bool:
    """Whether this can stand in a webhook's `events`: a type, `*` for all of them, or a prefix like `email.*`."""
    if text == "*" or is_type(text):
        return True
    return len(text) <= TYPE_BYTES_MAX and _PREFIX.fullmatch(text) is not None


def fits(event_type: str, wanted: str) -> bool:
    """Whether a filter lets a type through. A registry answers the same for a whole table of them, and faster."""
    return wanted in {"*", event_type} or (wanted.endswith(".*") and event_type.startswith(wanted[:-1]))


@dataclasses.dataclass(slots=True)
class _Routes:
    """One account's filters. Endpoints are kept by id, so that two filters of one webhook yield it once."""

    exact: defaultdict[str, dict[EndpointId, Endpoint]]  # by type
    prefix: defaultdict[str, dict[EndpointId, Endpoint]]  # by what stands before the `*`, dot included
    all: dict[EndpointId, Endpoint]

    def add(self, endpoint: Endpoint) -> None:
        for text in endpoint.events:
            if text == "*":
                self.all[endpoint.id] = endpoint
            elif text.endswith(".*"):
                self.prefix[text[:-1]][endpoint.id] = endpoint
            else:
                self.exact[text][endpoint.id] = endpoint

    def match(self, event_type: str) -> dict[EndpointId, Endpoint]:
        found = self.all | self.exact.get(event_type, {})
        dot = event_type.find(".")
        while dot != -1:
            found |= self.prefix.get(event_type[: dot + 1], {})
            dot = event_type.find(".", dot + 1)
        return found


class Registry:
    """Every webhook at one version of the table.

    Disabled webhooks match nothing; paused ones do, since their events are held and not dropped.
    """

    def __init__(self, endpoints: Iterable[Endpoint], version: int) -> None:
        self.version = version
        self._by_id: Final = {endpoint.id: endpoint for endpoint in endpoints}
        self._routes: defaultdict[str, _Routes] = defaultdict(lambda: _Routes(defaultdict(dict), defaultdict(dict), {}))
        self._memo: dict[tuple[str, str], tuple[Endpoint, ...]] = {}
        # Transactions from this one on began when each webhook was there: nobody needs to be asked whether it was.
        self.all_since = max((endpoint.created_snapshot[1] for endpoint in self._by_id.values()), default=0)
        for endpoint in self._by_id.values():
            if endpoint.status is not EndpointStatus.DISABLED:
                self._routes[endpoint.account].add(endpoint)

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Endpoint]:
        return iter(self._by_id.values())

    def __repr__(self) -> str:
        return f"<Registry version {self.version}, {len(self)} endpoints of {len(self._routes)} accounts>"

    def match(self, account: str, event_type: str) -> tuple[Endpoint, ...]:
        """The webhooks of this account that receive this type: each once, by ascending id."""
        key = (account, event_type)
        found = self._memo.get(key)
        if found is None:
            if len(self._memo) >= MEMO_MAX:
                self._memo.clear()
            found = self._memo[key] = self._find(account, event_type)
        return found

    def by_id(self, endpoint_id: EndpointId) -> Endpoint | None:
        """The webhook of that id, disabled ones included; None if there is none at this version."""
        return self._by_id.get(endpoint_id)

    def _find(self, account: str, event_type: str) -> tuple[Endpoint, ...]:
        routes = self._routes.get(account)
        return tuple(sorted(routes.match(event_type).values(), key=attrgetter("id"))) if routes is not None else ()
