from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.core import routing
from dispatcher.core.rendering import is_type
from dispatcher.core.routing import Registry, fits, valid_filter
from dispatcher.model import AccountId, Endpoint, EndpointId, EndpointStatus


def endpoint(number: int, *events: str, account: int = 1, status: EndpointStatus = EndpointStatus.ACTIVE) -> Endpoint:
    return Endpoint(
        id=EndpointId(number),
        public_id=f"wh_{number}",
        account_id=AccountId(account),
        account=f"account-{account}",
        url="https://a.example/",
        events=events,
        status=status,
    )


def matched(registry: Registry, event_type: str, account: int = 1) -> list[int]:
    return [found.id for found in registry.match(f"account-{account}", event_type)]


def test_a_type_matches_itself_only() -> None:
    registry = Registry([endpoint(1, "email.sent")], 1)
    assert matched(registry, "email.sent") == [1]
    assert matched(registry, "email.sent.twice") == []
    assert matched(registry, "email") == []


def test_a_prefix_matches_everything_below_it_and_not_itself() -> None:
    registry = Registry([endpoint(1, "email.*"), endpoint(2, "billing.eu.*")], 1)
    assert matched(registry, "email.sent") == [1]
    assert matched(registry, "email.a.b") == [1]
    assert matched(registry, "email") == []
    assert matched(registry, "emails.x") == []
    assert matched(registry, "my.email.sent") == []
    assert matched(registry, "billing.eu.paid") == [2]
    assert matched(registry, "billing.us.paid") == []
    assert matched(registry, "billing.eu") == []


def test_a_star_matches_every_type_of_its_own_account() -> None:
    registry = Registry([endpoint(1, "*"), endpoint(2, "*", account=2)], 1)
    assert matched(registry, "email.sent") == [1]
    assert matched(registry, "email.sent", account=2) == [2]
    assert matched(registry, "email.sent", account=3) == []


@given(
    st.sampled_from(["*", "email.*", "email.eu.*", "email.sent", "email.eu.sent", "emails.*"]),
    st.sampled_from(["email.sent", "email.eu.sent", "emails.sent", "email.eu", "billing.paid"]),
)
def test_a_single_filter_fits_what_a_registry_of_it_matches(wanted: str, event_type: str) -> None:
    assert fits(event_type, wanted) == (matched(Registry([endpoint(1, wanted)], 1), event_type) == [1])


def test_a_webhook_with_overlapping_filters_matches_once() -> None:
    registry = Registry([endpoint(1, "*", "email.*", "email.a.*", "email.a.b", "email.a.b")], 1)
    assert matched(registry, "email.a.b") == [1]


def test_disabled_webhooks_receive_nothing_and_paused_ones_everything() -> None:
    registry = Registry(
        [endpoint(1, "*", status=EndpointStatus.PAUSED), endpoint(2, "*", status=EndpointStatus.DISABLED)], 1
    )
    assert matched(registry, "email.sent") == [1]


def test_matches_come_by_ascending_id() -> None:
    registry = Registry([endpoint(3, "*"), endpoint(1, "email.sent"), endpoint(2, "email.*")], 1)
    assert matched(registry, "email.sent") == [1, 2, 3]


def test_any_webhook_is_found_by_its_id() -> None:
    disabled = endpoint(2, "*", status=EndpointStatus.DISABLED)
    registry = Registry([endpoint(1, "*"), disabled], 1)
    assert registry.by_id(EndpointId(2)) is disabled
    assert registry.by_id(EndpointId(3)) is None
    assert len(registry) == 2
    assert [found.id for found in registry] == [1, 2]


def test_a_registry_tells_its_version_and_size() -> None:
    assert repr(Registry([endpoint(1, "*"), endpoint(2, "*")], 7)) == "<Registry version 7, 2 endpoints of 1 accounts>"


@pytest.mark.interpreted
def test_the_memory_of_answers_is_bounded_and_changes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "MEMO_MAX", 4)
    registry = Registry([endpoint(1, "n.*")], 1)
    for _ in range(2):
        for number in range(20):
            assert matched(registry, f"n.x{number}") == [1]
            assert matched(registry, f"m.x{number}") == []
            assert len(registry._memo) <= 4


def test_a_repeated_question_gets_the_very_same_answer() -> None:
    registry = Registry([endpoint(1, "n.*")], 1)
    assert registry.match("account-1", "n.x") is registry.match("account-1", "n.x")


@pytest.mark.parametrize("text", ["*", "email.sent", "email.*", "billing.eu.*", "a_1.b_2", "_._", "a.b.c.d.*"])
def test_valid_filters_are_accepted(text: str) -> None:
    assert valid_filter(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "email", "Email.sent", "email.", ".email", "email..sent", "email.sent ", "email.sent\n", "e-mail.sent"),
        *("email*", "*.sent", "email.*.sent", ".*", "**", "email.**", "émail.sent", "email.s\u0663", "email.*\n"),
        "a." + "b" * 127,
        "a" * 127 + ".*",
    ],
)
def test_invalid_filters_are_refused(text: str) -> None:
    assert not valid_filter(text)
    assert not is_type(text)


def test_the_longest_type_and_prefix_are_accepted() -> None:
    assert is_type("a." + "b" * 126)
    assert valid_filter("a" * 126 + ".*")
    assert not is_type("email.*")
    assert not is_type("*")


# The same question answered the slow way

parts = st.sampled_from(["a", "b", "email", "emails", "x_1"])
types = st.lists(parts, min_size=2, max_size=4).map(".".join)
filters = st.one_of(
    st.just("*"), types, st.lists(parts, min_size=1, max_size=3).map(lambda some: ".".join(some) + ".*")
)


def naive(endpoints: list[Endpoint], account: int, event_type: str) -> list[int]:
    def wants(text: str) -> bool:
        return text in ("*", event_type) or (text.endswith(".*") and event_type.startswith(text.removesuffix("*")))

    return sorted(
        found.id
        for found in endpoints
        if found.account_id == account
        and found.status is not EndpointStatus.DISABLED
        and any(wants(text) for text in found.events)
    )


@given(
    st.lists(st.tuples(st.lists(filters, max_size=4), st.integers(1, 2), st.sampled_from(EndpointStatus)), max_size=8),
    st.lists(types, min_size=1, max_size=6),
)
def test_matching_agrees_with_asking_every_webhook(
    drawn: list[tuple[list[str], int, EndpointStatus]], event_types: list[str]
) -> None:
    endpoints = [
        endpoint(number, *events, account=account, status=status)
        for number, (events, account, status) in enumerate(drawn)
    ]
    registry = Registry(reversed(endpoints), 1)
    for event_type in event_types * 2:
        for account in (1, 2, 3):
            assert matched(registry, event_type, account) == naive(endpoints, account, event_type)


@given(filters)
def test_every_filter_drawn_here_is_valid(text: str) -> None:
    assert valid_filter(text)
