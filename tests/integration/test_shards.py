"""Which ranks share pages and which do not: the namespace has a shard exactly where page bytes differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexkv_sglang import FlexKVStorage
from models.plain_pools import Pool, attach, config

pytestmark = pytest.mark.sglang


class Heads(Pool):
    """As SGLang's MHA pools: each rank holds heads of its own."""

    head_num = 4


class Latent(Pool):
    """As SGLang's MLA pools."""

    kv_lora_rank = 512


def namespaces(place: Path, mla: bool, **rank: int) -> dict[str, str]:
    """Namespace of each pool of a rank. MLA: with an MHA draft, and Mamba state, which is always sharded."""
    settings = config(place, mla=mla)
    for name, value in rank.items():
        assert hasattr(settings, name)
        setattr(settings, name, value)
    sidecars: dict[str, Any] = {"mamba": Pool(page_size=1), "draft": Heads()}
    storage: FlexKVStorage = attach(settings, Latent() if mla else Heads(), sidecars)
    pools = {name: storage._stores.get(name) for name in ("kv", *sidecars)}
    storage.close()
    return {name: pool.spec.identity.namespace for name, pool in pools.items() if pool is not None}


@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
@pytest.mark.parametrize(
    ("field", "size"),
    [
        ("tp_rank", "tp_size"),
        ("pp_rank", "pp_size"),
        ("attn_cp_rank", "attn_cp_size"),
        ("dcp_rank", "dcp_size"),
    ],
)
def test_ranks_of_one_server(tmp_path: Path, field: str, size: str, mla: bool) -> None:
    """Tensor-parallel ranks share replicated pools. With any other split a rank has another part of a page."""
    first, second = (namespaces(tmp_path, mla, **{size: 2, field: rank}) for rank in (0, 1))
    assert len(first) == 3
    same = {name for name, space in first.items() if second[name] == space}
    assert same == ({"kv"} if mla and field == "tp_rank" else set())


@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
def test_another_tensor_parallel_size(tmp_path: Path, mla: bool) -> None:
    one, two = namespaces(tmp_path, mla), namespaces(tmp_path, mla, tp_size=2)
    assert {name for name in one if one[name] == two[name]} == ({"kv"} if mla else set())


@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
def test_data_parallel_replicas_share_everything(tmp_path: Path, mla: bool) -> None:
    assert namespaces(tmp_path, mla, dp_rank=3) == namespaces(tmp_path, mla)
