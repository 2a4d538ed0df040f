"""What failures mean, and what to do about them, in words."""

from __future__ import annotations


def explained(error: str | None) -> tuple[str, str]:
    """What an attempt's failure means, and what to do about it."""
    error = error or "no answer"
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
        case 429:
            return "It answers 429: too many requests.", "Set a rate limit it can keep up with."
        case status if 300 <= status < 400:
            return f"It answers {error}: redirects are not followed.", "Register the URL it redirects to."
        case status if status >= 500:
            return f"It answers {error}: its handler fails.", "Look at its own log, then replay what was given up."
    return f"It answers {error}.", "Send a test event to see its whole answer."
