"""One request at once, outside every lane: for trying a webhook out.

It uses the transport and its guard, and a pool of its own that is closed behind it. Nothing is logged, retried or
learnt.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from dispatcher.core.addresses import Guard
from dispatcher.core.attempt import Attempt
from dispatcher.core.head import fields_of, signatures
from dispatcher.core.rendering import Payload
from dispatcher.core.signing import Signer
from dispatcher.engine.connection import Released
from dispatcher.engine.transport import Transport
from dispatcher.errors import AddressRefused, Undeliverable
from dispatcher.model import BodyStyle, Endpoint, Result

ATTEMPT: Final = 1


class SingleShot:
    """Sends single requests. `guard` gives the guard in force, which a reload may replace."""

    def __init__(
        self,
        transport: Transport,
        guard: Callable[[], Guard],
        *,
        user_agent: str,
        header_prefix: str,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._transport = transport
        self._guard = guard
        self._user_agent = user_agent
        self._prefix = header_prefix
        self._wall = wall

    async def send(
        self, endpoint: Endpoint, payload: Payload, style: BodyStyle, delivery_id: str, *, by_previous: bool = False
    ) -> tuple[Attempt, list[tuple[str, str]], bytes]:
        """Send one event to one webhook; return what came of it (an Attempt or a Released), header fields and body.

        A previous secret signs too: whoever calls leaves it out when its time is over.
        """
        try:
            target = self._guard().check_url(endpoint.url)
            body = payload.body(style)
        except (AddressRefused, Undeliverable) as error:
            return Attempt(Result.BLOCKED, error=str(error)), [], b""
        timestamp = str(int(self._wall()))
        signer = Signer(endpoint.secret, endpoint.previous_secret, prefix=self._prefix)
        signed = signatures(signer, self._prefix, payload.event_id, timestamp, body, by_previous=by_previous)
        fields = fields_of(
            host=target.host_header,
            user_agent=self._user_agent,
            prefix=self._prefix,
            own=endpoint.headers,
            type=payload.type,
            event_id=payload.event_id,
            delivery_id=delivery_id,
            attempt=ATTEMPT,
            timestamp=timestamp,
            signatures=signed,
            body_bytes=len(body),
        )
        head = f"POST {target.path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields) + "\r\n"
        answered: asyncio.Future[Attempt] = asyncio.get_running_loop().create_future()
        origin = self._transport.origin(target)
        try:
            origin.submit(head.encode("latin-1") + body, endpoint.timeout_s, _settle, answered)
            return await answered, fields, body
        finally:
            origin.close()


def _settle(answered: asyncio.Future[Attempt], attempt: Attempt) -> None:
    if not answered.done():  # whoever asked may have gone
        answered.set_result(attempt)


def is_released(attempt: Attempt) -> bool:
    """Whether it was not sent, or given up, for a reason of ours."""
    return isinstance(attempt, Released)
