"""Which shard a webhook belongs to, and which shards a daemon should run. Pure decisions; no I/O, no clock.

**Problem.** Several daemons share one database. A webhook's concurrency, rate and order are kept in the memory of one
engine, so a webhook must have exactly one; and the work should be spread evenly, without a coordinator.

**Rule, webhooks.** A webhook's shard is a hash of its id and of the number of shards. The schema spells the same hash
(`dispatcher.shard_of`). One shard is number 0; several are numbered from 1, so that a release that knows only shard 0
finds no row to work from, instead of taking the whole for its part.

**Rule, daemons.** Every daemon sees the same table of members and of what each holds, and computes the same targets:
shards ÷ members, and the remainder goes to those that hold most already, then by id. Whoever has more than its target
gives some up, whoever has fewer takes free ones. So targets sum up to the number of shards, no two differ by more than
one, and where nothing changes nothing moves.

**Edge.** Two views a moment apart may give targets that do not fit together: then two daemons want one shard, and its
lease decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from typing import Final

from dispatcher.model import Holdings

SHARDS_MAX: Final = 64  # five connections each: PostgreSQL's default of 100 is spent long before

_FACTOR: Final = 2654435761  # 2^32 ÷ golden ratio: consecutive ids fall far apart (Knuth, TAOCP 3, 6.4)
_RANGE: Final = 1 << 32


def shard_numbers(count: int) -> range:
    """The numbers of `count` shards."""
    return range(1) if count == 1 else range(1, count + 1)


def shard_of(endpoint_id: int, count: int) -> int:
    """The shard of a webhook among `count`."""
    return 0 if count == 1 else 1 + endpoint_id * _FACTOR % _RANGE * count // _RANGE


def target(view: Holdings, member: int) -> int:
    """How many shards a member should hold; 0 for who is none."""
    if member not in view.members:
        return 0
    held = list(view.holders.values())
    rank = sorted(view.members, key=lambda each: (-held.count(each), each)).index(member)
    share, remainder = divmod(view.count, len(view.members))
    return share + (rank < remainder)


@dataclasses.dataclass(frozen=True, slots=True)
class Moves:
    """What a daemon should do about its shards."""

    take: Set[int] = frozenset()  # begin to run these
    release: Set[int] = frozenset()  # settle these and give them up
    lost: Set[int] = frozenset()  # somebody else holds these, which we wait for


def moves(view: Holdings, me: int, *, active: Set[int], waiting: Set[int], leaving: Set[int]) -> Moves:
    """What to do, given what we run, what we wait for the lease of, and what we are giving up already."""
    others = {shard for shard, holder in view.holders.items() if holder != me}
    lost = waiting & others
    mine = active | (waiting - lost)
    surplus = len(mine) - target(view, me)
    if surplus > 0:
        # What has not begun costs nothing to give up; the lowest number, which has duties beside, moves last.
        release = sorted(mine, key=lambda shard: (shard in active, -shard))[:surplus]
        return Moves(release=frozenset(release), lost=lost)
    free = [shard for shard in shard_numbers(view.count) if shard not in others | mine | leaving]
    # Begun at a place of our own: who takes at the same moment takes others.
    start = me % len(free) if free else 0
    return Moves(take=frozenset((free[start:] + free[:start])[:-surplus]) if surplus else frozenset(), lost=lost)
