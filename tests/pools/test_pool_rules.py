"""What pool names stand for, and how the disk is divided among them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv_sglang.integration.compat import pool_name
from flexkv_sglang.pools.pool_rules import (
    TRAILING_SLOTS_MIN,
    SizeClaim,
    claims_from,
    default_density,
    divide,
    element_types,
    expected_policy,
    is_replicated,
    part_of,
    written_by_every_rank,
)
from flexkv_sglang.prefix import ALL_PAGES, TRAILING_PAGES

PLAIN = SimpleNamespace()
HEADS = SimpleNamespace(head_num=4)
LATENT = SimpleNamespace(head_num=1, kv_lora_rank=512)

TRAILING = {
    *("mamba", "swa", "auxiliary_swa", "draft_swa", "deepseek_v4_c4_state"),
    *("deepseek_v4_c4_indexer_state", "deepseek_v4_c128_state"),
}


@pytest.mark.sglang
def test_every_pool_name_of_sglang_has_a_policy_and_only_state_is_trailing() -> None:
    from sglang.srt.mem_cache.hicache_storage import PoolName

    names = {pool_name(name) for name in PoolName}
    assert len(names) == 23
    assert {name for name in names if expected_policy(name) == TRAILING_PAGES} == TRAILING
    assert expected_policy("a pool of tomorrow") == ALL_PAGES


@pytest.mark.sglang
def test_only_mamba_is_sharded_by_its_name_alone_in_models_that_replicate() -> None:
    from sglang.srt.mem_cache.hicache_storage import PoolName

    names = {pool_name(name) for name in PoolName}
    assert {name for name in names if not is_replicated(name, PLAIN, mla=True)} == {"mamba"}
    assert not any(is_replicated(name, PLAIN, mla=False) for name in names)


def test_heads_of_a_rank_and_unknown_names_are_not_taken_for_replicated() -> None:
    assert not is_replicated("draft", HEADS, mla=True)
    assert not is_replicated("draft_swa", HEADS, mla=True)
    assert is_replicated("draft", LATENT, mla=True)
    assert is_replicated("kv", LATENT, mla=True)
    assert not is_replicated("a pool of tomorrow", PLAIN, mla=True)


def test_a_dtype_that_a_flag_changes_alone_is_part_of_the_identity() -> None:
    state = SimpleNamespace(dtype="bf16", conv_dtype="bf16", temporal_dtype="float32")
    assert element_types("mamba", state) == "bf16 conv_dtype=bf16 temporal_dtype=float32"
    assert element_types("mamba", SimpleNamespace(dtype="bf16")) == "bf16"
    assert element_types("kv", state) == "bf16"  # plain models keep their namespace


def test_who_writes() -> None:
    assert written_by_every_rank("kv", mla=False)
    assert written_by_every_rank("mamba", mla=True)
    assert not written_by_every_rank("indexer", mla=True)


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
def test_shares_of_all_writers_never_exceed_the_size(size: int, wanted: list[SizeClaim]) -> None:
    shares = divide(size, wanted)
    assert shares.keys() == {claim.name for claim in wanted}
    assert sum(shares[claim.name] * claim.writers for claim in wanted) <= size
    assert all(share >= 0 for share in shares.values())


@given(st.integers(1, 1 << 45), st.integers(1, 64))
def test_one_pool_takes_all(size: int, writers: int) -> None:
    assert divide(size, [SizeClaim.of("kv", 12345, writers, 1.0)]) == {"kv": size // writers}


def test_pools_are_full_at_the_same_time() -> None:
    wanted = [
        SizeClaim.of("kv", 1 << 20, 1, 1.0),
        SizeClaim.of("indexer", 1 << 16, 1, 1.0),
        SizeClaim.of("swa", 1 << 20, 1, 0.25),
    ]
    shares = divide(100 << 30, wanted)
    pages = {c.name: shares[c.name] // c.slot_bytes for c in wanted}
    assert pages["kv"] == pages["indexer"]
    assert pages["swa"] == pytest.approx(pages["kv"] / 4, abs=1)
    assert 0.99 * (100 << 30) < sum(shares.values()) <= 100 << 30


def test_rank_sharded_state_is_counted_for_every_rank_that_writes_it() -> None:
    wanted = [SizeClaim.of("kv", 1 << 20, 1, 1.0), SizeClaim.of("mamba", 1 << 20, 4, 1.0)]
    assert divide(5 << 30, wanted) == {"kv": 1 << 30, "mamba": 1 << 30}


def test_trailing_pools_get_a_few_slots_but_never_more_than_a_quarter() -> None:
    mamba = SizeClaim.of("mamba", 1 << 20, 1, 1 / 1024)
    kv = SizeClaim.of("kv", 1 << 20, 1, 1.0)
    shares = divide(8 << 30, [kv, mamba])
    assert shares["mamba"] // mamba.slot_bytes == TRAILING_SLOTS_MIN
    assert shares["kv"] == (8 << 30) - shares["mamba"]
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
