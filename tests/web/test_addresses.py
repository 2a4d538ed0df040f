"""No notation of a refused address gets past the API. That none is connected to either: tests/hostile."""

from __future__ import annotations

from typing import TYPE_CHECKING

from notations import REFUSED_HOSTS

if TYPE_CHECKING:
    from tests.web.conftest import Api


async def test_no_notation_can_be_saved(api: Api) -> None:
    """Over HTTP, for a new webhook and for one that is there; what each means is for the core's own tests."""
    api.parts.rate_limit._burst = 1e9
    made = await api.webhook()
    for number, (host, code) in enumerate(REFUSED_HOSTS):
        if "\ud800" in host:
            continue  # no JSON carries it
        url = f"https://{host}/hook"
        method, path = ("POST", "/v1/webhooks") if number % 2 else ("PATCH", f"/v1/webhooks/{made['id']}")
        answer = await api(method, path, {"url": url, "events": ["*"]})
        assert (answer.status, answer.fields) == (422, ["url"]), (host, code, answer.text)
    assert (await api("GET", f"/v1/webhooks/{made['id']}")).json["url"] == made["url"]
