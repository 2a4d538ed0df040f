"""What the outside is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from dispatcher.core.addresses import Guard
from dispatcher.core.catalogue import Catalogue
from dispatcher.store.accounts import AccountStore
from dispatcher.store.endpoints import EndpointDefaults, EndpointStore
from dispatcher.store.events import EventStore
from dispatcher.telemetry import Snapshot
from dispatcher.web.auth import RateLimit


@dataclasses.dataclass(slots=True, kw_only=True)
class Web:
    """Everything that handlers use. A reload of the configuration replaces guard, catalogue and defaults in place."""

    accounts: AccountStore
    endpoints: EndpointStore
    events: EventStore
    guard: Guard
    catalogue: Catalogue
    defaults: EndpointDefaults
    snapshot: Callable[[], Snapshot]
    header_prefix: str = "X-Trackpost-"
    rate_limit: RateLimit = dataclasses.field(default_factory=RateLimit)
