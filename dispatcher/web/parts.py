"""What the outside is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping

from dispatcher.core.addresses import Guard
from dispatcher.core.attempt import Attempt
from dispatcher.core.catalogue import Catalogue
from dispatcher.core.ids import DeliveryIds
from dispatcher.core.rendering import Payload
from dispatcher.model import BodyStyle, Endpoint
from dispatcher.snapshot import Snapshot
from dispatcher.store.accounts import AccountStore
from dispatcher.store.deliveries import DeliveryStore
from dispatcher.store.endpoints import EndpointDefaults, EndpointStore
from dispatcher.store.events import EventStore
from dispatcher.store.operator import OperatorStore
from dispatcher.store.overview import OverviewStore
from dispatcher.store.replays import ReplayStore
from dispatcher.store.sessions import SessionStore
from dispatcher.web.auth import RateLimit


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One request to be sent now."""

    endpoint: Endpoint
    payload: Payload
    style: BodyStyle
    delivery_id: str
    by_previous: bool = False  # X-Trackpost-Signature by the secret that is being replaced


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """What was sent, and what it came to. `attempt` is None when it could not be sent for a reason of ours."""

    attempt: Attempt | None
    fields: list[tuple[str, str]]
    body: bytes
    reason: str = ""


Send = Callable[[Trial], Awaitable[Tried]]
"""Sends one request by the way that all take. It never raises for an endpoint's sake."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """What became of events, and what makes it happen again."""

    deliveries: DeliveryStore
    replays: ReplayStore
    ids: DeliveryIds
    send: Send


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stores:
    """What only the dashboard reads and writes."""

    sessions: SessionStore
    overview: OverviewStore


@dataclasses.dataclass(slots=True, kw_only=True)
class Operator:
    """What the operator's page is made of. `settings` are those in force, secrets masked: section → key → value."""

    key: str = dataclasses.field(repr=False)
    store: OperatorStore
    settings: Mapping[str, Mapping[str, object]]


@dataclasses.dataclass(slots=True, kw_only=True)
class Web:
    """Everything that handlers use. A reload of the configuration replaces guard, catalogue and defaults in place,
    and what the operator is shown of it.
    """

    accounts: AccountStore
    endpoints: EndpointStore
    events: EventStore
    guard: Guard
    catalogue: Catalogue
    defaults: EndpointDefaults
    snapshot: Callable[[], Snapshot]
    log: Log | None = None  # None: no call about deliveries is served
    stores: Stores | None = None  # None: no dashboard is served
    operator: Operator | None = None  # None: the operator has no page
    brand: str = "TrackPost"
    header_prefix: str = "X-Trackpost-"
    user_agent: str = "TrackPost-Webhooks/1.0"
    rate_limit: RateLimit = dataclasses.field(default_factory=RateLimit)
