"""Who is looking: sessions as cookies, and proof that a form was sent from one of our own pages.

Signing in always makes a new session id, so one that was planted in a browser beforehand (session fixation) is worth
nothing. A form carries a token made from the session's id, which no other site can read, and is refused as well if the
browser says that another site sent it. Before there is a session, a random cookie stands in for its id.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
import secrets
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Final
from urllib.parse import quote, urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from aiohttp import web

from dispatcher.store.sessions import ID_BYTES, LIFE, Session, SessionStore
from dispatcher.web.auth import LOOK_UP_TIMEOUT_S, RateLimit
from dispatcher.web.problems import Problem

FORM_BYTES_MAX: Final = 1 << 20
FORM_TIMEOUT_S: Final = 30.0
TOKEN_FIELD: Final = "csrf"  # noqa: S105  a name, not a secret
SESSION_COOKIE: Final = "dispatcher_session"
GUEST_COOKIE: Final = "dispatcher_guest"  # before signing in
ZONE_COOKIE: Final = "dispatcher_zone"  # the reader's time zone, as the browser knows it
THEME_COOKIE: Final = "dispatcher_theme"
THEMES: Final = ("light", "dark")

SIGN_IN_BURST: Final = 20
SIGN_IN_PER_SECOND: Final = 0.2

_is_zone: Final = re.compile(r"[A-Za-z][A-Za-z0-9_+-]*(?:/[A-Za-z0-9_+-]+){0,2}").fullmatch

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Visit(msgspec.Struct, frozen=True, kw_only=True):
    """One request for a page: who asks (None: nobody signed in), and how they read."""

    session: Session | None
    token: str  # for the forms of the page
    zone: ZoneInfo | None  # None: not known yet, so UTC
    theme: str  # "light", "dark", or "" for what the system prefers


_VISIT: Final = web.RequestKey("visit", Visit)
_GUEST: Final = web.RequestKey("guest", str)


def visit_of(request: web.Request) -> Visit:
    """The visit that this request is."""
    return request[_VISIT]


def session_of(request: web.Request) -> Session:
    """Who is signed in, on pages where somebody is."""
    session = visit_of(request).session
    assert session is not None, "the door was passed"
    return session


def named(request: web.Request) -> tuple[int, str]:
    """The account that asks, and the webhook of the path."""
    return session_of(request).owner.account_id, request.match_info["id"]


class Door:
    """Lets visitors in: recognises sessions, checks forms, begins and ends sessions."""

    def __init__(self, sessions: SessionStore, attempts: RateLimit | None = None) -> None:
        self._sessions = sessions
        self._attempts = attempts or RateLimit(SIGN_IN_PER_SECOND, SIGN_IN_BURST)

    def for_all(self, handler: Handler) -> Handler:
        """A page that needs nobody signed in."""

        async def serve(request: web.Request) -> web.StreamResponse:
            await self.recognise(request)
            if request.method == "POST":
                await _check_form(request)
            response = await handler(request)
            self.keep_guest(request, response)
            return response

        return serve

    def signed_in(self, handler: Handler) -> Handler:
        """A page for those who are signed in; others are asked to, and then led here."""

        async def serve(request: web.Request) -> web.StreamResponse:
            if (await self.recognise(request)).session is None:
                raise web.HTTPSeeOther(sign_in_path(request))
            if request.method == "POST":
                await _check_form(request)
            return await handler(request)

        return serve

    async def recognise(self, request: web.Request) -> Visit:
        """Find out who is asking; afterwards `visit_of` knows."""
        if _VISIT not in request:
            session_id = request.cookies.get(_name(request, SESSION_COOKIE), "")
            session = None
            if session_id:
                async with asyncio.timeout(LOOK_UP_TIMEOUT_S):
                    session = await self._sessions.find(session_id)
            if session is None:
                self.receive(request)
            else:
                request[_VISIT] = _visit(request, session_id, session)
        return request[_VISIT]

    def receive(self, request: web.Request) -> None:
        """Take the request as one of nobody who is known."""
        request[_GUEST] = request.cookies.get(_name(request, GUEST_COOKIE), "") or secrets.token_urlsafe(ID_BYTES)
        request[_VISIT] = _visit(request, request[_GUEST], None)

    def keep_guest(self, request: web.Request, response: web.StreamResponse) -> None:
        """Let the forms of a page work for somebody who is not signed in."""
        if request.get(_GUEST) and not response.prepared and _name(request, GUEST_COOKIE) not in request.cookies:
            _set_cookie(request, response, GUEST_COOKIE, request[_GUEST], None)

    def count_attempt(self, request: web.Request) -> float:
        """Count an attempt to sign in from this address: 0.0 if it may go on, else the seconds until it may."""
        return self._attempts.take(_network(request.remote or ""))

    async def let_in(self, request: web.Request, key_id: str, response: web.StreamResponse) -> None:
        """Begin a session and hand it to the browser; one that it had before ends."""
        await self._end(request)
        session_id = await self._sessions.begin(key_id)
        _set_cookie(request, response, SESSION_COOKIE, session_id, int(LIFE.total_seconds()))
        response.del_cookie(_name(request, GUEST_COOKIE), path="/")

    async def let_out(self, request: web.Request, response: web.StreamResponse) -> None:
        """End the session, here and in the browser."""
        await self._end(request)
        response.del_cookie(_name(request, SESSION_COOKIE), path="/")

    async def is_over(self, request: web.Request) -> bool:
        """Whether the session that a long answer began with has ended since."""
        return await self._sessions.find(request.cookies.get(_name(request, SESSION_COOKIE), "")) is None

    async def _end(self, request: web.Request) -> None:
        await self._sessions.end(request.cookies.get(_name(request, SESSION_COOKIE), ""))


def sign_in_path(request: web.Request) -> str:
    """Where to sign in to come back to this page; a form's page cannot be come back to."""
    if request.method != "GET" or request.path == "/":
        return "/sign-in"
    return f"/sign-in?next={quote(request.path_qs, safe='/')}"


def local_path(text: str) -> str:
    """`text` if it is a path on this host, else the overview: nobody is sent elsewhere by a link to our sign-in."""
    parts = urlsplit(text)
    is_local = text.startswith("/") and not text.startswith(("//", "/\\")) and not parts.scheme and not parts.netloc
    return text if is_local and text.isascii() and text.isprintable() and "\\" not in text else "/"


def set_preference(request: web.Request, response: web.StreamResponse, name: str, value: str) -> None:
    """Remember how somebody reads, for a year. Nothing secret: the page's own scripts set them too."""
    if value:
        response.set_cookie(name, value, max_age=365 * 86400, path="/", samesite="Strict", secure=is_secure(request))
    else:
        response.del_cookie(name, path="/")


def is_secure(request: web.Request) -> bool:
    """Whether the browser reached us by https, itself or by a proxy that says so."""
    return request.secure or request.headers.get("X-Forwarded-Proto", "").lower() == "https"


async def _check_form(request: web.Request) -> None:
    """Refuse a form that did not come from one of our pages. Raises Problem."""
    if not _is_from_here(request):
        raise Problem(403, "cross_site", "This form was sent from another site.")
    form = await read_form(request)
    token = form.get(TOKEN_FIELD, "")
    # Constant time: the token is a secret of the session.
    if not isinstance(token, str) or not hmac.compare_digest(token.encode(), visit_of(request).token.encode()):
        raise Problem(403, "stale_form", "This form is out of date: go back, load the page again, and send it anew.")


async def read_form(request: web.Request) -> dict[str, str]:
    """The form's fields; of one that is there several times, the values line by line. Raises Problem."""
    if request.content_type != "application/x-www-form-urlencoded":
        raise Problem(415, "unsupported_media_type", "Send the form as application/x-www-form-urlencoded.")
    try:
        async with asyncio.timeout(FORM_TIMEOUT_S):
            form = await request.post()
    except TimeoutError:
        raise Problem(408, "body_timeout", f"The form did not arrive within {FORM_TIMEOUT_S:g} s.") from None
    except web.HTTPRequestEntityTooLarge:
        raise Problem(413, "too_large", f"A form has at most {FORM_BYTES_MAX} bytes.") from None
    except (ValueError, web.RequestPayloadError, ConnectionError):
        raise Problem(400, "invalid_form", "The form could not be read.") from None
    found: dict[str, str] = {}
    for name, value in form.items():
        assert isinstance(value, str), "only multipart forms hold files"
        found[name] = f"{found[name]}\n{value}" if name in found else value
    return found


def _is_from_here(request: web.Request) -> bool:
    if request.headers.get("Sec-Fetch-Site", "same-origin") not in {"same-origin", "none"}:
        return False
    origin = request.headers.get("Origin")
    if origin is None:
        return True  # no browser: those name the origin of every form
    # A proxy may give us another Host; no site can make a browser send the header in which it says so.
    hosts = {request.host, request.headers.get("X-Forwarded-Host", request.host)}
    return urlsplit(origin).netloc in hosts


def _visit(request: web.Request, session_id: str, session: Session | None) -> Visit:
    theme = request.cookies.get(THEME_COOKIE, "")
    return Visit(
        session=session,
        token=_token(session_id),
        zone=_zone(request.cookies.get(ZONE_COOKIE, "")),
        theme=theme if theme in THEMES else "",
    )


def _token(session_id: str) -> str:
    return hmac.digest(session_id.encode(), b"form token", "sha256").hex()


def _zone(name: str) -> ZoneInfo | None:
    try:
        return ZoneInfo(name) if _is_zone(name) else None
    except (ZoneInfoNotFoundError, ValueError, OSError):  # no zone of this system's, or a folder of them
        return None


def _name(request: web.Request, name: str) -> str:
    """With the prefix, a browser takes the cookie from nobody but this very host, and over https only."""
    return f"__Host-{name}" if is_secure(request) else name


def _set_cookie(request: web.Request, response: web.StreamResponse, name: str, value: str, max_age: int | None) -> None:
    response.set_cookie(
        _name(request, name),
        value,
        max_age=max_age,
        path="/",
        httponly=True,
        samesite="Strict",
        secure=is_secure(request),
    )


def _network(address: str) -> str:
    """What one visitor can hardly have many of: an IPv4 address, or an IPv6 network of a household."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    return str(parsed if parsed.version == 4 else ipaddress.ip_network((parsed, 64), strict=False))


def utc_now() -> datetime:
    """This moment."""
    return datetime.now(UTC)
