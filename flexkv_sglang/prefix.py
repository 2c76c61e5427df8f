"""Pure functions over prefixes: what SGLang may use of a partly successful answer.

A *prefix length* is a number of leading pages. With one pool every length up to the first missing page can be
restored. A hybrid model has more pools, each with its own idea of what a length needs; ``usable_prefixes``
folds them into the lengths that all of them agree to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ALL_PAGES = "all_pages"
TRAILING_PAGES = "trailing_pages"
BLOCK_GROUPS = "block_groups"
"""SGLang's hit policies, as text."""

POLICIES = (ALL_PAGES, TRAILING_PAGES, BLOCK_GROUPS)


def leading_run(flags: Sequence[bool]) -> int:
    """Number of True values before the first False."""
    for count, flag in enumerate(flags):
        if not flag:
            return count
    return len(flags)


def cut_after_first_failure(flags: Sequence[bool]) -> list[bool]:
    """The same list with everything after the first False set to False.

    SGLang uses the leading run only; a True behind a hole would claim more than it can use.
    """
    run = leading_run(flags)
    return [True] * run + [False] * (len(flags) - run)


@dataclass(frozen=True, slots=True)
class PoolRequirement:
    """What a prefix asks of one pool beside KV.

    ``all_pages``: every page of the prefix. ``trailing_pages``: its last ``window`` pages, or all of them where
    it is shorter (state that exists at the ends of nodes only). ``block_groups``: nothing; the pool says
    how many pages its leading complete groups cover, a group being the last ``group_pages`` of
    ``block_pages`` pages. Any other policy is one we do not know: no length is usable.
    """

    pool: str
    policy: str = ALL_PAGES
    window: int = 1
    block_pages: int = 0
    group_pages: int = 0


@dataclass(frozen=True, slots=True)
class RestorablePrefixes:
    """``lengths``: what can be restored, ascending, in pages. ``boundaries``: per pool, KV included, how far it goes
    by itself; a pool without an entry has no page to offer or was not looked at any more."""

    lengths: list[int]
    boundaries: dict[str, int]

    @property
    def pages(self) -> int:
        """The longest usable prefix."""
        return self.lengths[-1] if self.lengths else 0


def usable_prefixes(
    kv_pages: int, pools: Iterable[tuple[PoolRequirement, Sequence[bool]]]
) -> RestorablePrefixes:
    """Fold what each pool holds into the prefix lengths that can be restored.

    ``kv_pages``: the leading run of KV pages. ``pools``: per pool its demand and, for each of these pages,
    whether it holds it (a shorter list: it holds no more). Iterated only as long as a length is left, so that
    a generator need not look up what no longer matters.
    """
    boundaries = {"kv": kv_pages} if kv_pages else {}
    lengths = list(range(1, kv_pages + 1))
    remaining = iter(pools)
    while lengths and (item := next(remaining, None)) is not None:
        requirement, held = item
        if requirement.policy == BLOCK_GROUPS:
            boundary = _covered_by_groups(requirement, held, kv_pages)
        elif requirement.policy == ALL_PAGES:
            boundary = min(leading_run(held), kv_pages)
            lengths = [length for length in lengths if length <= boundary]
        else:
            legal = (
                _ends(requirement, held, kv_pages) if requirement.policy == TRAILING_PAGES else []
            )
            boundary = legal[-1] if legal else 0
            allowed = set(legal)
            lengths = [length for length in lengths if length in allowed]
        if boundary:
            boundaries[requirement.pool] = boundary
    return RestorablePrefixes(lengths, boundaries)


def _ends(requirement: PoolRequirement, held: Sequence[bool], kv_pages: int) -> list[int]:
    """Prefix lengths whose last ``window`` pages are all held."""
    run = 0
    legal = []
    for length, flag in enumerate(held[:kv_pages], 1):
        run = run + 1 if flag else 0
        if run >= min(max(1, requirement.window), length):
            legal.append(length)
    return legal


def _covered_by_groups(requirement: PoolRequirement, held: Sequence[bool], kv_pages: int) -> int:
    """Pages of the leading blocks whose group is complete."""
    block, group = requirement.block_pages, requirement.group_pages
    if not 1 <= group <= block:
        return 0
    covered = 0
    while covered + block <= min(kv_pages, len(held)):
        if not all(held[covered + block - group : covered + block]):
            break
        covered += block
    return covered
