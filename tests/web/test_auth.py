from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.web import auth
from dispatcher.web.auth import RateLimit

if TYPE_CHECKING:
    from tests.web.conftest import Api


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_a_valid_key_opens(api: Api) -> None:
    assert (await api("GET", "/v1/webhooks")).status == 200


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_the_scheme_is_read_without_regard_to_case(api: Api, scheme: str) -> None:
    headers = {"Authorization": f"{scheme} {api.keys['acme']}"}
    assert (await api("GET", "/v1/webhooks", headers=headers, key="")).status == 200


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "Basic dXNlcjpwYXNz", "{key}", "Token {key}", "Bearer\t{key}", "Bearer {key} more",
     "Bearer ümlaut", "Bearer " + "x" * 5000],
)  # fmt: skip
async def test_what_is_no_valid_bearer_is_401(api: Api, header: str) -> None:
    answer = await api("GET", "/v1/webhooks", headers={"Authorization": header.format(key=api.keys["acme"])}, key="")
    assert (answer.status, answer.json["code"]) == (401, "unauthorized")


async def test_the_challenge_tells_a_missing_key_from_a_wrong_one(api: Api) -> None:
    missing, wrong = [await api("GET", "/v1/webhooks", key=key) for key in ("", "tp_live_unknown_and_long_enough")]
    assert missing.headers["WWW-Authenticate"] == "Bearer"
    assert wrong.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'


async def test_a_key_in_the_query_does_not_open(api: Api) -> None:
    answer = await api("GET", f"/v1/webhooks?api_key={api.keys['acme']}", key="")
    assert answer.status == 401


async def test_a_revoked_key_is_refused_from_the_next_call_on(api: Api) -> None:
    record, key = await api.parts.accounts.create_key("acme", "test")
    assert (await api("GET", "/v1/webhooks", key=key)).status == 200
    await api.parts.accounts.revoke_key(record.id)
    assert (await api("GET", "/v1/webhooks", key=key)).status == 401


async def test_two_keys_of_an_account_see_the_same(api: Api) -> None:
    _, other = await api.parts.accounts.create_key("acme", "test")
    made = await api.webhook()
    assert (await api("GET", f"/v1/webhooks/{made['id']}", key=other)).status == 200


async def test_an_exhausted_key_is_429_until_its_bucket_fills(api: Api) -> None:
    clock = Clock()
    RateLimit.__init__(api.parts.rate_limit, 0.25, 2, clock=clock)  # in place: the middleware holds it
    assert [(await api("GET", "/v1/webhooks")).status for _ in range(3)] == [200, 200, 429]
    answer = await api("GET", "/v1/webhooks")
    assert (answer.json["code"], answer.headers["Retry-After"]) == ("rate_limited", "4")
    assert (await api("GET", "/v1/webhooks", key=api.keys["rival"])).status == 200
    clock.now += 4.0
    assert [(await api("GET", "/v1/webhooks")).status for _ in range(2)] == [200, 429]


async def test_a_stranger_takes_no_tokens(api: Api) -> None:
    for _ in range(3):
        assert (await api("GET", "/v1/webhooks", key="tp_live_unknown_and_long_enough")).status == 401
    assert repr(api.parts.rate_limit) == "<RateLimit 100/s, burst 200, 0 keys>"


async def test_a_look_up_that_takes_too_long_is_503(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(*_: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(auth, "LOOK_UP_TIMEOUT_S", 0.0)
    monkeypatch.setattr(api.parts.accounts, "find_key", hang)
    answer = await api("GET", "/v1/webhooks")
    assert (answer.status, answer.json["code"]) == (503, "unavailable")


@given(
    rate=st.floats(0.1, 1000.0),
    burst=st.integers(1, 50),
    waits=st.lists(st.floats(0.0, 2.0), min_size=1, max_size=60),
)
def test_never_more_than_burst_and_rate_allow(rate: float, burst: int, waits: list[float]) -> None:
    clock = Clock()
    limit = RateLimit(rate, burst, clock=clock)
    taken = 0
    for wait in waits:
        clock.now += wait
        again_s = limit.take("key")
        assert (again_s > 0.0) == (again_s != 0.0)
        taken += again_s == 0.0
        assert taken <= burst + clock.now * rate + 1e-6
        assert again_s <= 1.0 / rate


@given(rate=st.floats(0.1, 1000.0), burst=st.integers(1, 20))
def test_who_waits_as_long_as_told_gets_through(rate: float, burst: int) -> None:
    clock = Clock()
    limit = RateLimit(rate, burst, clock=clock)
    assert [limit.take("key") for _ in range(burst)] == [0.0] * burst
    clock.now += limit.take("key") + 1e-9
    assert limit.take("key") == 0.0


def test_buckets_are_bounded_and_the_exhausted_ones_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "BUCKETS_MAX", 3)
    clock = Clock()
    limit = RateLimit(1.0, 1, clock=clock)
    limit.take("early")
    limit.take("early too")
    clock.now += 1.0
    limit.take("spent")
    limit.take("one more")
    assert repr(limit) == "<RateLimit 1/s, burst 1, 2 keys>"
    assert limit.take("spent") > 0.0


def test_when_all_buckets_are_in_use_they_start_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "BUCKETS_MAX", 3)
    limit = RateLimit(1.0, 1, clock=Clock())
    for key in "abcd":
        assert limit.take(key) == 0.0
    assert repr(limit) == "<RateLimit 1/s, burst 1, 1 keys>"
