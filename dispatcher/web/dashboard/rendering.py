"""Templates into pages: everything escaped, everything undefined an error, and the headers each page carries.

Nothing on a page may come from elsewhere or stand inline: the Content-Security-Policy forbids it, so what slipped
through escaping would still not run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

import jinja2
from aiohttp import web
from markupsafe import Markup

from dispatcher.model import DeliveryState, EndpointStatus
from dispatcher.web.dashboard.assets import Assets
from dispatcher.web.dashboard.payloads import visible
from dispatcher.web.dashboard.visits import TOKEN_FIELD, Visit, utc_now, visit_of

POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    # Not no-referrer, with which browsers keep the origin of forms from us too.
    "Referrer-Policy": "same-origin",
}

NOTES: Final = {
    "paused": "Paused. What comes from now on is held until it is resumed.",
    "resumed": "Active. What was held is being sent, the oldest first.",
    "saved": "Saved.",
    "deleted": "The webhook is deleted, and what waited for it is dropped.",
    "replaying": "The replay has begun.",
    "cancelled": "The replay is cancelled, and what it had queued and nobody attempted is taken back.",
    "redelivered": "Queued as a new delivery, which is this one.",
    "styled": "The body style is changed. Send another test event to see it verified.",
}
"""What a page says once after something was done: its address names one of them as `?note=`."""

_STATUSES: Final = frozenset(status.value for status in HTTPStatus)
_STEPS: Final = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


class Templates:
    """The templates of `web/templates`."""

    def __init__(self, assets: Assets, brand: str) -> None:
        self._environment = jinja2.Environment(
            loader=jinja2.PackageLoader("dispatcher.web", "templates"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        self._environment.filters |= {
            "number": number,
            "percent": percent,
            "milliseconds": milliseconds,
            "duration": duration,
            "pretty": pretty,
            "place": place,
            "breakable": breakable,
            "visible": visible,
            "phrase": phrase,
            "target": target,
        }
        self._environment.globals |= {
            "asset": assets.path,
            "brand": brand,
            "DeliveryState": DeliveryState,
            "EndpointStatus": EndpointStatus,
        }

    def page(
        self,
        request: web.Request,
        template: str,
        *,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        **context: Any,
    ) -> web.Response:
        """The answer that a template makes of `context`."""
        visit, now = visit_of(request), utc_now()
        text = self._environment.get_template(template).render(
            context
            | {
                "visit": visit,
                "session": visit.session,
                "path": request.path,
                "here": request.path_qs,
                "now": now,
                "when": _Clock(visit, now),
                "csrf": _token_field(visit),
                "notice": NOTES.get(request.query.get("note", ""), ""),
            }
        )
        return web.Response(text=text, status=status, content_type="text/html", headers=HEADERS | dict(headers or {}))


class _Clock:
    """Moments as the reader counts them: `{{ when(at) }}` as a time of day or a date, `{{ when.ago(at) }}`."""

    def __init__(self, visit: Visit, now: datetime) -> None:
        self._zone = visit.zone or UTC
        self._known = visit.zone is not None
        self._now = now

    def __call__(self, at: datetime | str | None, *, seconds: bool = True) -> Markup:
        """A moment, in the reader's zone; in UTC on hover."""
        if at is None:
            return Markup('<span class="none">–</span>')
        moment = _moment(at)
        text = clock(moment, self._zone, self._now, seconds=seconds)
        return self._element(moment, text if self._known else f"{text} UTC", "seconds" if seconds else "minutes")

    def ago(self, at: datetime | str | None) -> Markup:
        """How long ago or how far ahead: "3 min ago", "in 12 s". Kept going in the browser."""
        if at is None:
            return Markup('<span class="none">–</span>')
        moment = _moment(at)
        return self._element(moment, relative(moment, self._now), "relative")

    def _element(self, moment: datetime, text: str, style: str) -> Markup:
        utc = moment.astimezone(UTC)
        return Markup('<time datetime="{}" title="{} UTC" data-time="{}">{}</time>').format(
            utc.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            utc.strftime("%a, %-d %b %Y, %H:%M:%S"),
            style,
            text,
        )


def clock(at: datetime, zone: ZoneInfo | Any, now: datetime, *, seconds: bool = True) -> str:
    """A moment as short as can be: today's as a time, this year's without the year."""
    local, today = at.astimezone(zone), now.astimezone(zone)
    time = local.strftime("%H:%M:%S" if seconds else "%H:%M")
    if local.date() == today.date():
        return time
    return f"{local.strftime('%-d %b' if local.year == today.year else '%-d %b %Y')}, {time}"


def relative(at: datetime, now: datetime) -> str:
    """How long ago, or how far ahead."""
    seconds = (now - at).total_seconds()
    if abs(seconds) < 1:
        return "now"
    return f"{duration(seconds)} ago" if seconds > 0 else f"in {duration(-seconds)}"


def duration(seconds: float | timedelta) -> str:
    """A stretch of time in one unit, or two where the second one matters: "42 s", "3 min", "2 h 5 min", "6 d"."""
    left = math.floor(seconds.total_seconds() if isinstance(seconds, timedelta) else seconds)
    for place, (size, unit) in enumerate(_STEPS):
        if left >= size:
            count, rest = divmod(left, size)
            small = ""
            if unit == "h" or (unit == "d" and count < 10):
                next_size, next_unit = _STEPS[place + 1]
                small = f" {rest // next_size:.0f} {next_unit}" if rest >= next_size else ""
            return f"{count:.0f} {unit}{small}"
    return "0 s"


def number(value: float, *, at_least: bool = False) -> str:
    """A count with thousands apart; `at_least` says that there are more."""
    return f"{value:,.0f}{'+' if at_least else ''}"


def percent(share: float | None) -> str:
    """A share of 1. Only what is whole is 100 %, only nothing is 0 %."""
    if share is None:
        return "–"
    if share in (0, 1):
        return f"{share:.0%}"
    return f"{min(max(share * 100, 0.1), 99.9):.1f}%"


def milliseconds(value: float | None) -> str:
    """A latency with three digits: "0.84 ms", "42 ms", "1.20 s"."""
    if value is None:
        return "–"
    if value >= 10_000:
        return f"{value / 1000:.1f} s"
    if value >= 1000:
        return f"{value / 1000:.2f} s"
    if value >= 10:
        return f"{value:.0f} ms"
    return f"{value:.1f} ms" if value >= 1 else f"{value:.2f} ms"


def place(url: str) -> str:
    """Where a URL points, without what all of them begin with."""
    return url.partition("://")[2].removesuffix("/") or url


def target(url: str) -> str:
    """What a request line asks for."""
    parts = urlsplit(url)
    return f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}"


def phrase(status: int) -> str:
    """What a status code is called; nothing for those that have no name."""
    return HTTPStatus(status).phrase if status in _STATUSES else ""


def breakable(name: str) -> Markup:
    """A dotted name that a narrow column may break behind its dots and underscores."""
    return Markup("<wbr>").join(re.split(r"(?<=[._])(?=.)", name))


def pretty(document: Any) -> str:
    """JSON for people."""
    return json.dumps(document, indent=2, ensure_ascii=False)


def _moment(at: datetime | str) -> datetime:
    return datetime.fromisoformat(at) if isinstance(at, str) else at


def _token_field(visit: Visit) -> Markup:
    return Markup('<input type="hidden" name="{}" value="{}">').format(TOKEN_FIELD, visit.token)
