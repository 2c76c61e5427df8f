"""Rules that follow from the names of host pools."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from flexkv_sglang.integration.compat import as_text
from flexkv_sglang.pools.pool_rules import (
    element_types,
    expected_policy,
    is_replicated,
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

    names = {as_text(name) for name in PoolName}
    assert len(names) == 23
    assert {name for name in names if expected_policy(name) == TRAILING_PAGES} == TRAILING
    assert expected_policy("a pool of tomorrow") == ALL_PAGES


@pytest.mark.sglang
def test_only_mamba_is_sharded_by_its_name_alone_in_models_that_replicate() -> None:
    from sglang.srt.mem_cache.hicache_storage import PoolName

    names = {as_text(name) for name in PoolName}
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


def test_the_ranks_that_write() -> None:
    assert written_by_every_rank("kv", mla=False)
    assert written_by_every_rank("mamba", mla=True)
    assert not written_by_every_rank("indexer", mla=True)
