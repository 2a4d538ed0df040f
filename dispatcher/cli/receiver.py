"""The demonstration's receiver: two handlers as subscribers write them, who trust nobody's word for a signature.

Each handler verifies every request in both ways there are:

    X-Trackpost-Signature    as the handlers of the webhook guide do it: parse the body, print it again with the own
                             language's serialiser, hash that. `express` prints as JSON.stringify does, `flask` as
                             json.dumps does
    webhook-signature        with the reference library of Standard Webhooks, or by its specification where that library
                             is not installed

Nothing here is shared with the code that signs: a mistake made once would otherwise verify itself.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Mapping
from decimal import Decimal
from importlib.util import find_spec
from typing import Any, Final, Self

from aiohttp import web

TOLERANCE_S: Final = 300
INDEX_MAX: Final = 2**32 - 2  # the largest array index of ECMAScript
BODY_BYTES_MAX: Final = 1 << 20
LANDED_MAX: Final = 10_000  # requests nobody has looked at yet; more than that are refused, and come again
SHUTDOWN_S: Final = 1.0

Check = Callable[[bytes, Mapping[str, str], str], bool]
"""Whether a body with these headers was signed with this secret."""


@dataclasses.dataclass(frozen=True, slots=True)
class Landing:
    """One request as it arrived."""

    handler: str
    at_unix_s: float
    at_s: float  # by time.perf_counter(): the loop's clock is cached, to the millisecond
    type: str
    event_id: str
    delivery_id: str
    attempt: str
    by_guide: bool
    by_standard: bool

    @property
    def verified(self) -> bool:
        """Whether both signatures are genuine."""
        return self.by_guide and self.by_standard


class Receiver:
    """A server on a free port of this host with a handler under each of its paths."""

    def __init__(self) -> None:
        self.landings: asyncio.Queue[Landing] = asyncio.Queue(LANDED_MAX)
        self.secrets: dict[str, str] = {}  # by handler, once known
        self.url = ""
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        app.add_routes([web.post(f"/{name}", self._receiving(name, printed)) for name, printed in HANDLERS.items()])
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=SHUTDOWN_S)

    def __repr__(self) -> str:
        return f"<Receiver {self.url} {', '.join(HANDLERS)}, {self.landings.qsize()} landed>"

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    def _receiving(self, name: str, printed: Callable[[bytes], bytes]) -> Callable[[web.Request], Any]:
        async def receive(request: web.Request) -> web.Response:
            at_s, at_unix_s = time.perf_counter(), time.time()
            body = await request.read()
            secret = self.secrets.get(name, "")
            landing = Landing(
                handler=name,
                at_unix_s=at_unix_s,
                at_s=at_s,
                type=request.headers.get("X-Trackpost-Event", ""),
                event_id=request.headers.get("webhook-id", ""),
                delivery_id=request.headers.get("X-Trackpost-Delivery", ""),
                attempt=request.headers.get("X-Trackpost-Attempt", ""),
                by_guide=verified_by_guide(body, request.headers, secret, printed),
                by_standard=verified_by_standard(body, request.headers, secret),
            )
            self.landings.put_nowait(landing)
            # As in the guide: a wrong signature is 401, everything else is thanked for.
            return web.Response(text="OK") if landing.verified else web.Response(status=401, text="Invalid signature")

        return receive


# ── the guide's scheme ─────────────────────────────────────────────────────────────────────────────────────────────


def verified_by_guide(body: bytes, headers: Mapping[str, str], secret: str, printed: Callable[[bytes], bytes]) -> bool:
    """What `verifySignature` of the guide does, with `printed` for the language's way to print what it parsed."""
    try:
        expected = hmac.new(secret.encode(), printed(body), hashlib.sha256).hexdigest()
    except (ValueError, RecursionError):
        return False
    return hmac.compare_digest(expected.encode(), headers.get("X-Trackpost-Signature", "").encode())


def as_flask_prints(body: bytes) -> bytes:
    """`json.dumps(request.json).encode()`."""
    return json.dumps(json.loads(body)).encode()


def as_express_prints(body: bytes) -> bytes:
    """`JSON.stringify(JSON.parse(body))`, where every number is a double."""
    return stringify(json.loads(body, parse_int=float)).encode()


HANDLERS: Final[dict[str, Callable[[bytes], bytes]]] = {"express": as_express_prints, "flask": as_flask_prints}


def stringify(value: Any) -> str:
    """What ECMAScript prints for a parsed document."""
    if isinstance(value, dict):
        indexes = sorted((key for key in value if _is_index(key)), key=int)
        keys = [*indexes, *(key for key in value if not _is_index(key))]
        return "{" + ",".join(f"{stringify(key)}:{stringify(value[key])}" for key in keys) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(stringify, value)) + "]"
    if isinstance(value, float):
        return _number(value)
    return json.dumps(value, ensure_ascii=False)


def _is_index(key: str) -> bool:
    return key.isascii() and key.isdecimal() and str(int(key[:11])) == key and int(key) <= INDEX_MAX


def _number(value: float) -> str:
    """Number::toString of ECMA-262: the shortest digits, laid out by where the decimal point falls."""
    if value == 0.0:
        return "0"
    _, figures, exponent = Decimal(repr(abs(value))).normalize().as_tuple()
    digits, minus = "".join(map(str, figures)), "-" if value < 0.0 else ""
    assert isinstance(exponent, int), "JSON has no infinity"
    point = len(digits) + exponent
    if exponent >= 0 and point <= 21:
        return minus + digits + "0" * exponent
    if 0 < point <= 21:
        return f"{minus}{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"{minus}0.{'0' * -point}{digits}"
    mantissa = digits if len(digits) == 1 else f"{digits[0]}.{digits[1:]}"
    return f"{minus}{mantissa}e{point - 1:+d}"


# ── Standard Webhooks ──────────────────────────────────────────────────────────────────────────────────────────────


def _by_reference(body: bytes, headers: Mapping[str, str], secret: str) -> bool:
    from standardwebhooks import Webhook, WebhookVerificationError

    try:
        Webhook(secret).verify(body, dict(headers))
    except (WebhookVerificationError, ValueError, RuntimeError):
        return False
    return True


def by_specification(body: bytes, headers: Mapping[str, str], secret: str) -> bool:
    """Standard Webhooks 1.0.0, symmetric: `v1,` and the HMAC of `id.timestamp.body`, at most five minutes old."""
    id_, timestamp = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    if not id_ or not timestamp.isdecimal() or abs(time.time() - int(timestamp)) > TOLERANCE_S:
        return False
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except ValueError:
        return False
    content = b".".join((id_.encode(), timestamp.encode(), body))
    expected = "v1," + base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()
    given = headers.get("webhook-signature", "").split()
    return any(hmac.compare_digest(expected.encode(), signature.encode()) for signature in given)


_HAS_REFERENCE: Final = find_spec("standardwebhooks") is not None

verified_by_standard: Final[Check] = _by_reference if _HAS_REFERENCE else by_specification
STANDARD_VERIFIER: Final = "the reference library" if _HAS_REFERENCE else "the specification"
