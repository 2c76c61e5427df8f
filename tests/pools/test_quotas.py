"""How the configured size is divided among pools."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv_sglang.pools.pool import SizeClaim
from flexkv_sglang.pools.pool_rules import default_density
from flexkv_sglang.pools.quotas import TRAILING_SLOTS_MIN, claims_from, divide, part_of

claims = st.lists(
    st.builds(
        SizeClaim.of,
        st.sampled_from(["kv", "mamba", "swa", "indexer", "draft"]),
        st.integers(1, 1 << 26),
        st.integers(1, 8),
        st.sampled_from([1.0, 0.5, 0.25, 1 / 32]),
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda claim: claim.name,
)


@given(st.integers(1, 1 << 45), claims)
def test_quotas_of_all_writers_never_exceed_the_size(size: int, wanted: list[SizeClaim]) -> None:
    quotas = divide(size, wanted)
    assert quotas.keys() == {claim.name for claim in wanted}
    assert sum(quotas[claim.name] * claim.writers for claim in wanted) <= size
    assert all(quota >= 0 for quota in quotas.values())


@given(st.integers(1, 1 << 45), st.integers(1, 64))
def test_one_pool_takes_all(size: int, writers: int) -> None:
    assert divide(size, [SizeClaim.of("kv", 12345, writers, 1.0)]) == {"kv": size // writers}


def test_pools_are_full_at_the_same_time() -> None:
    wanted = [
        SizeClaim.of("kv", 1 << 20, 1, 1.0),
        SizeClaim.of("indexer", 1 << 16, 1, 1.0),
        SizeClaim.of("swa", 1 << 20, 1, 0.25),
    ]
    quotas = divide(100 << 30, wanted)
    pages = {c.name: quotas[c.name] // c.slot_bytes for c in wanted}
    assert pages["kv"] == pages["indexer"]
    assert pages["swa"] == pytest.approx(pages["kv"] / 4, abs=1)
    assert 0.99 * (100 << 30) < sum(quotas.values()) <= 100 << 30


def test_rank_sharded_state_is_counted_for_every_rank_that_writes_it() -> None:
    wanted = [SizeClaim.of("kv", 1 << 20, 1, 1.0), SizeClaim.of("mamba", 1 << 20, 4, 1.0)]
    assert divide(5 << 30, wanted) == {"kv": 1 << 30, "mamba": 1 << 30}


def test_trailing_pools_get_a_few_slots_but_never_more_than_a_quarter() -> None:
    mamba = SizeClaim.of("mamba", 1 << 20, 1, 1 / 1024)
    kv = SizeClaim.of("kv", 1 << 20, 1, 1.0)
    quotas = divide(8 << 30, [kv, mamba])
    assert quotas["mamba"] // mamba.slot_bytes == TRAILING_SLOTS_MIN
    assert quotas["kv"] == (8 << 30) - quotas["mamba"]
    assert divide(64 << 20, [kv, mamba]) == {"kv": 48 << 20, "mamba": 16 << 20}


def test_parts_add_up() -> None:
    wanted = [SizeClaim.of("kv", 4096, 1, 1.0), SizeClaim.of("swa", 4096, 1, 0.5)]
    assert part_of("kv", wanted) + part_of("swa", wanted) == pytest.approx(1.0)
    assert part_of("kv", []) == 1.0


def test_claims_survive_json_and_anything_else_is_none() -> None:
    wanted = [
        SizeClaim.of("kv", 4097, 2, 1.0),
        SizeClaim.of("mamba", 5, 1, default_density("mamba")),
    ]
    assert claims_from(json.loads(json.dumps([claim.fields() for claim in wanted]))) == wanted
    for odd in (None, {}, [{"name": "kv"}], "kv", 7):
        assert claims_from(odd) == []
