"""What does not flow: since when, why, and what to do about it, in words."""

from __future__ import annotations

import dataclasses
from datetime import datetime, timedelta
from typing import Final

from dispatcher.model import EndpointStatus
from dispatcher.store.overview import WebhookState

FAILING: Final = timedelta(seconds=30)  # of nothing but failures: less is a hiccup
LATE: Final = timedelta(minutes=2)  # waiting this long without any reason on record


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """One thing that does not flow: since when, why, and where to put it right."""

    level: str  # "bad" or "warn"
    title: str
    reason: str
    since: datetime | None
    remedy: str
    webhook: WebhookState | None = None
    resumable: bool = False


def trouble_of(webhook: WebhookState, now: datetime) -> Trouble | None:
    """What is wrong with a webhook; None if nothing is."""
    if webhook.status is EndpointStatus.DISABLED:
        return Trouble(
            level="bad",
            title="Disabled",
            reason=f"Receives nothing: {webhook.disabled_reason}.",
            since=webhook.updated_at,
            remedy="Mend the endpoint, send a test event, then resume, and replay what it missed.",
            webhook=webhook,
            resumable=True,
        )
    if webhook.failing_since is not None and now - webhook.failing_since >= FAILING:
        reason, remedy = explained(webhook.last_error)
        return Trouble(
            level="bad",
            title="Failing",
            reason=f"{reason} No attempt has succeeded since.",
            since=webhook.failing_since,
            remedy=remedy,
            webhook=webhook,
        )
    if webhook.status is EndpointStatus.PAUSED:
        return Trouble(
            level="warn",
            title="Paused",
            reason="Its events are held.",
            since=webhook.updated_at,
            remedy="Resume it, and what is held is sent, the oldest first.",
            webhook=webhook,
            resumable=True,
        )
    if webhook.oldest_at is not None and now - webhook.oldest_at > LATE:
        return Trouble(
            level="warn",
            title="Behind",
            reason="It takes requests more slowly than events arrive, or some of them are being retried.",
            since=webhook.oldest_at,
            remedy="Look at what is being retried, or allow it more requests at a time.",
            webhook=webhook,
        )
    return None


def explained(error: str | None) -> tuple[str, str]:
    """What an attempt's failure means, and what to do about it."""
    error = error or "no answer"
    if error.startswith("timed out"):
        return (
            f"It takes too long: {error}.",
            "Let its handler answer 2xx at once and work later, or give it more time in the settings.",
        )
    if not error.isdecimal():
        return (
            f"It could not be reached: {error}.",
            "Check the address, its DNS name, its certificate and its firewall.",
        )
    match int(error):
        case 401 | 403:
            return (
                f"It answers {error}: it does not accept the signature.",
                "Send a test event: it finds out which secret and body style the handler verifies.",
            )
        case 404 | 405:
            return f"It answers {error}: nothing takes POST requests there.", "Check the path of the URL."
        case 410:
            return "It answers 410: it wants nothing more.", "Resume its webhook once it does, and send this again."
        case 429:
            return "It answers 429: too many requests.", "Set a rate limit it can keep up with."
        case status if 300 <= status < 400:
            return f"It answers {error}: redirects are not followed.", "Register the URL it redirects to."
        case status if status >= 500:
            return f"It answers {error}: its handler fails.", "Look at its own log, then replay what was given up."
    return f"It answers {error}.", "Send a test event to see its whole answer."
