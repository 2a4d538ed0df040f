"""What a look at something came to."""

from __future__ import annotations

import dataclasses
import enum


class Verdict(enum.StrEnum):
    """How bad it is."""

    OK = "ok"
    ADVICE = "advice"  # it works, and could be better
    PROBLEM = "problem"  # it does not work, or will not for long


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: what was found, and what to change."""

    subject: str
    verdict: Verdict
    found: str
    remedy: str = ""


def ok(subject: str, found: str) -> Finding:
    """It is as it should be."""
    return Finding(subject, Verdict.OK, found)


def advice(subject: str, found: str, remedy: str) -> Finding:
    """It works, and `remedy` would make it better."""
    return Finding(subject, Verdict.ADVICE, found, remedy)


def problem(subject: str, found: str, remedy: str) -> Finding:
    """It does not work, or will not for long, unless `remedy` is done."""
    return Finding(subject, Verdict.PROBLEM, found, remedy)
