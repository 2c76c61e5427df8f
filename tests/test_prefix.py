"""The part of an answer that SGLang may use: compared with the definition, and with SGLang's own backend."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv_sglang.prefix import (
    ALL_PAGES,
    BLOCK_GROUPS,
    TRAILING_PAGES,
    PoolRequirement,
    cut_after_first_failure,
    leading_run,
    usable_prefixes,
)
from models.fold_oracle import Case, by_definition, compare_with_hicache_file, folded

flags = st.lists(st.booleans())
INDEXER, SWA, MAMBA = (
    PoolRequirement("indexer"),
    PoolRequirement("swa", TRAILING_PAGES, window=2),
    PoolRequirement("mamba", TRAILING_PAGES),
)


@given(flags)
def test_leading_run_counts_up_to_the_first_false(values: list[bool]) -> None:
    run = leading_run(values)
    assert all(values[:run])
    assert run == len(values) or not values[run]


@given(flags)
def test_no_flag_is_true_after_a_false(values: list[bool]) -> None:
    cut = cut_after_first_failure(values)
    assert len(cut) == len(values)
    assert sum(cut) == leading_run(values) == leading_run(cut)


def trailing(name: str, window: int, *pages: int) -> tuple[PoolRequirement, set[int]]:
    """Pages count from 1, as in the table of the contract."""
    return PoolRequirement(name, TRAILING_PAGES, window), {page - 1 for page in pages}


def every(name: str, *pages: int) -> tuple[PoolRequirement, set[int]]:
    return PoolRequirement(name, ALL_PAGES), {page - 1 for page in pages}


@pytest.mark.parametrize(
    ("kv", "pools", "expected"),
    [
        ((1, 2, 3), [trailing("mamba", 1, 3)], [3]),
        ((1, 2, 3), [trailing("mamba", 1, 1), trailing("swa", 1, 3)], []),
        ((1, 2, 3), [trailing("swa", 1, 1, 3), trailing("mamba", 1, 1, 2)], [1]),
        ((1, 2, 3), [every("indexer", 1, 2), trailing("mamba", 1, 1, 3)], [1]),
        ((1, 2, 3, 4, 5), [trailing("swa", 2, 1, 2, 4, 5), trailing("mamba", 1, 2, 4)], [2]),
        ((1, 2), [trailing("swa", 3, 1, 2)], [1, 2]),
        ((1, 3), [], [1]),
        ((1, 3), [trailing("mamba", 1, 3)], []),
        ((), [], []),
        ((), [trailing("mamba", 1), every("indexer")], []),
    ],
)
def test_the_acceptance_vectors(
    kv: tuple[int, ...], pools: list[tuple[PoolRequirement, set[int]]], expected: list[int]
) -> None:
    case: Case = (max(kv, default=3), {page - 1 for page in kv}, pools)
    usable = folded(case)
    assert usable.lengths == expected == by_definition(case)
    assert usable.pages == (expected[-1] if expected else 0)


@pytest.mark.parametrize("pages", range(5))
def test_every_subset_of_three_pools_as_defined(pages: int) -> None:
    """All of them: at most (2 ** 4) ** 4 combinations of pages held."""
    subsets = [{i for i in range(pages) if mask >> i & 1} for mask in range(1 << pages)]
    kv = set(range(pages))
    for indexer, swa, mamba in product(subsets, repeat=3):
        case: Case = (pages, kv, [(INDEXER, indexer), (SWA, swa), (MAMBA, mamba)])
        assert folded(case).lengths == by_definition(case)


held = st.sets(st.integers(0, 7))
requirements = st.builds(
    PoolRequirement,
    st.sampled_from(["mamba", "swa", "indexer"]),
    st.sampled_from([ALL_PAGES, TRAILING_PAGES]),
    window=st.integers(0, 9),
)


@given(st.integers(0, 8), held, st.lists(st.tuples(requirements, held), max_size=3))
def test_up_to_eight_pages_and_three_pools_as_defined(
    pages: int, kv: set[int], pools: list[tuple[PoolRequirement, set[int]]]
) -> None:
    case: Case = (pages, kv, pools)
    assert folded(case).lengths == by_definition(case)


@pytest.mark.sglang
def test_thousands_of_random_cases_as_sglangs_file_backend_answers() -> None:
    assert compare_with_hicache_file(3000, seed=1) == []


def test_pools_are_not_asked_when_no_length_is_left() -> None:
    asked = []

    def pools() -> object:
        for requirement, flags in ((INDEXER, [False]), (MAMBA, [True])):
            asked.append(requirement.pool)
            yield requirement, flags

    assert usable_prefixes(3, pools()).lengths == []  # type: ignore[arg-type]
    assert usable_prefixes(0, pools()).boundaries == {}  # type: ignore[arg-type]
    assert asked == ["indexer"]


def test_an_unknown_policy_makes_nothing_usable() -> None:
    usable = usable_prefixes(3, [(PoolRequirement("odd", "every_other_page"), [True] * 3)])
    assert (usable.lengths, usable.boundaries) == ([], {"kv": 3})


@pytest.mark.parametrize(
    ("block", "group", "missing", "expected"),
    [
        (4, 2, (), 8),  # the ninth page completes no block
        (4, 2, (0, 1, 4, 5), 8),  # only the last two of four are of the group
        (4, 2, (3,), 0),
        (4, 2, (6,), 4),
        (4, 4, (5,), 4),
        (10, 1, (), 0),
        (0, 0, (), 0),
        (2, 3, (), 0),
    ],
)
def test_block_groups_report_what_they_cover_and_gate_nothing(
    block: int, group: int, missing: tuple[int, ...], expected: int
) -> None:
    requirement = PoolRequirement("blocks", BLOCK_GROUPS, block_pages=block, group_pages=group)
    usable = usable_prefixes(9, [(requirement, [i not in missing for i in range(9)])])
    assert usable.lengths == list(range(1, 10))
    assert usable.boundaries.get("blocks", 0) == expected
