"""Pure functions over prefixes: the part of an answer that SGLang may use.

A *prefix length* is a number of leading pages. With one pool each length up to the first missing page can be restored.
A hybrid model has more pools, and each needs other pages of a prefix; ``usable_prefixes`` folds them into the
lengths that can be restored from all pools.
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
    """The same flags with all after the first False set to False: SGLang uses the leading run only."""
    run = leading_run(flags)
    return [True] * run + [False] * (len(flags) - run)


@dataclass(frozen=True, slots=True)
class PoolRequirement:
    """The pages that a prefix requires of one pool beside KV.

    ``all_pages``: each page of the prefix. ``trailing_pages``: its last ``window`` pages, or all of a shorter prefix
    (state that exists at the ends of nodes only). ``block_groups``: none; the answer has the number of pages that
    its leading complete groups cover. A group is the last ``group_pages`` of ``block_pages`` pages. With any other
    policy no length is usable.
    """

    pool: str
    policy: str = ALL_PAGES
    window: int = 1
    block_pages: int = 0
    group_pages: int = 0


@dataclass(frozen=True, slots=True)
class RestorablePrefixes:
    """``lengths``: the prefix lengths that can be restored, ascending, in pages. ``boundaries``: the longest one per
    pool, KV included, if it were alone; a pool without an entry has none, or was not asked."""

    lengths: list[int]
    boundaries: dict[str, int]

    @property
    def pages(self) -> int:
        """The longest usable prefix."""
        return self.lengths[-1] if self.lengths else 0


def usable_prefixes(
    kv_pages: int, pools: Iterable[tuple[PoolRequirement, Sequence[bool]]]
) -> RestorablePrefixes:
    """Fold the pages that each pool has into the prefix lengths that can be restored.

    ``kv_pages``: the leading run of KV pages. ``pools``: per pool its requirement, and a flag per page that is stored
    (pages after the end of a list are not). The iteration ends when no length is left: a generator is not asked for
    pools that no longer matter.
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
