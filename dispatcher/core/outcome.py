"""What a result means: for the delivery, and for the lane. One table, two columns.

**Problem.** The same answer says different things about the message and about the endpoint. A 404 means that this
delivery failed and that the host is perfectly well; a 503 that it may be fine later and the host wants less of us; a
500 that a handler has a bug, which fewer requests at once will not mend. Code that knows only "failed" throttles
healthy hosts and hammers drowning ones.

**Rule.**

    result                                     delivery                          lane
    2xx                                        delivered                         up
    410                                        discarded, the webhook disabled   up: it answered
    other 3xx, 4xx                             retry; 3xx is never followed      up: it answered
    429, 503                                   retry, not before Retry-After     down: it asks for less
    408, 425, 502, 504                         retry                             down
    timeout, connect, TLS, DNS                 retry                             down
    not HTTP: garbage, 1xx or ≥ 600 as final   retry                             down
    500, other 5xx                             retry                             hold
    address refused by our guard               discarded                         ignore
    our shutdown, our pool, our bug            released, not counted             ignore

A 410 to an endpoint's taste is a perfectly working endpoint. Garbage is `down`: what answers there is not the
subscriber's handler but something in front of it, half up or half gone, and less of us is the safe guess.

**Invariant.** Total: every `Result` with every status has a meaning, settled at import; `judge` is two index
operations and cannot fail on anything a peer can send.

**Edge.** A response that broke off has a status and is no answer: only the four `Result`s of a complete response look
at the status, the others have said everything. The last row has no `Result`, since no attempt was made that counts:
whoever releases a delivery uses `RELEASED`. Whether a retry is left, and when, is the schedule's business.

**Source.** RFC 9110 §15 (status codes) and §10.2.3 (Retry-After), RFC 6585 §4 (429), RFC 8470 §5.2 (425); Postfix's
separation of the site's faults from the message's.
"""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Final, assert_never

from dispatcher.core.window import Signal
from dispatcher.model import Result


class Verdict(Enum):
    """What becomes of the delivery."""

    DELIVERED = "delivered"
    RETRY = "retry"  # if its schedule has another attempt, else exhausted
    DISCARD = "discard"
    DISABLE = "disable"  # discard, and disable the webhook
    RELEASE = "release"  # back to pending as if never taken: no attempt is counted


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """One row of the table."""

    verdict: Verdict
    signal: Signal
    honours_retry_after: bool = False  # a Retry-After of the response delays the next attempt


RELEASED: Final = Outcome(Verdict.RELEASE, Signal.IGNORE)

_DELIVERED: Final = Outcome(Verdict.DELIVERED, Signal.UP)
_GONE: Final = Outcome(Verdict.DISABLE, Signal.UP)
_REFUSED: Final = Outcome(Verdict.RETRY, Signal.UP)
_OVERLOADED: Final = Outcome(Verdict.RETRY, Signal.DOWN)
_ASKS_TO_WAIT: Final = Outcome(Verdict.RETRY, Signal.DOWN, honours_retry_after=True)
_BROKEN: Final = Outcome(Verdict.RETRY, Signal.HOLD)
_BLOCKED: Final = Outcome(Verdict.DISCARD, Signal.IGNORE)

_STATUSES: Final = range(1000)  # what three digits can say; 0 stands for no status at all


def judge(result: Result, status: int) -> Outcome:
    """Return what an attempt means. `status` is the final status code, 0 if none was read."""
    return _TABLE[result][status]


def _answer(status: int) -> Outcome:
    """Return what a complete response means."""
    match status:
        case 410:
            return _GONE
        case 429 | 503:
            return _ASKS_TO_WAIT
        case 408 | 425 | 502 | 504:
            return _OVERLOADED
    match status // 100:
        case 2:
            return _DELIVERED
        case 3 | 4:
            return _REFUSED
        case 5:
            return _BROKEN
        case _:
            return _OVERLOADED


_ANSWERS: Final = tuple(map(_answer, _STATUSES))


def _row(result: Result) -> tuple[Outcome, ...]:
    match result:
        case Result.OK | Result.REDIRECT | Result.CLIENT_ERROR | Result.SERVER_ERROR:
            return _ANSWERS
        case Result.TIMEOUT | Result.CONNECT | Result.TLS | Result.DNS | Result.PROTOCOL:
            return (_OVERLOADED,) * len(_STATUSES)
        case Result.BLOCKED:
            return (_BLOCKED,) * len(_STATUSES)
        case _:
            assert_never(result)


# Rows are shared or repeat one object, so the table is 10 tuples of 8 KB at most.
_TABLE: Final[dict[Result, tuple[Outcome, ...]]] = {result: _row(result) for result in Result}
