"""What a result means, for every status and every result."""

from __future__ import annotations

import pytest

from dispatcher.core.outcome import RELEASED, Outcome, Verdict, judge
from dispatcher.core.window import Signal
from dispatcher.model import Result

ANSWERED = [Result.OK, Result.REDIRECT, Result.CLIENT_ERROR, Result.SERVER_ERROR]
UNANSWERED = [Result.TIMEOUT, Result.CONNECT, Result.TLS, Result.DNS, Result.PROTOCOL]
THREE_DIGITS = range(100, 1000)


def expected(status: int) -> tuple[Verdict, Signal]:
    """The table once more, written the other way round: by what stands in a row."""
    if status in range(200, 300):
        return Verdict.DELIVERED, Signal.UP
    if status == 410:
        return Verdict.DISABLE, Signal.UP
    if status in {408, 425, 429, 502, 503, 504} or status not in range(300, 600):
        return Verdict.RETRY, Signal.DOWN
    return Verdict.RETRY, Signal.UP if status < 500 else Signal.HOLD


@pytest.mark.parametrize("result", ANSWERED)
def test_a_complete_response_means_what_its_status_says(result: Result) -> None:
    meanings = {status: judge(result, status) for status in THREE_DIGITS}
    assert {status: (meant.verdict, meant.signal) for status, meant in meanings.items()} == {
        status: expected(status) for status in THREE_DIGITS
    }


def test_only_429_and_503_delay_the_next_attempt_by_their_retry_after() -> None:
    honoured = {status for status in THREE_DIGITS if judge(Result.CLIENT_ERROR, status).honours_retry_after}
    assert honoured == {429, 503}


@pytest.mark.parametrize("result", UNANSWERED)
def test_a_request_without_a_complete_answer_is_retried_whatever_status_was_seen(result: Result) -> None:
    meanings = {judge(result, status) for status in (0, *THREE_DIGITS)}
    assert meanings == {Outcome(Verdict.RETRY, Signal.DOWN, honours_retry_after=False)}


def test_an_address_our_guard_refuses_is_discarded_and_not_held_against_the_endpoint() -> None:
    meanings = {judge(Result.BLOCKED, status) for status in (0, *THREE_DIGITS)}
    assert meanings == {Outcome(Verdict.DISCARD, Signal.IGNORE)}


def test_a_release_counts_for_nothing() -> None:
    assert Outcome(Verdict.RELEASE, Signal.IGNORE) == RELEASED


def test_every_result_stands_in_the_table() -> None:
    assert {*ANSWERED, *UNANSWERED, Result.BLOCKED} == set(Result)


def test_no_answer_ever_means_released_or_ignored() -> None:
    for result in ANSWERED + UNANSWERED:
        for status in range(1000):
            meant = judge(result, status)
            assert meant.verdict not in {Verdict.RELEASE, Verdict.DISCARD}
            assert meant.signal is not Signal.IGNORE


def test_a_status_of_fewer_than_three_digits_is_not_an_answer() -> None:
    assert {judge(Result.OK, status) for status in range(100)} == {Outcome(Verdict.RETRY, Signal.DOWN)}


@pytest.mark.parametrize("status", [200, 302, 404, 410, 429, 500, 503])
def test_outcomes_are_shared_so_that_judging_allocates_nothing(status: int) -> None:
    assert judge(Result.OK, status) is judge(Result.OK, status)
