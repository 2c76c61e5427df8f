"""Rules that follow from the name of a host pool: which ranks have the same bytes, which write, how dense it is.

Names are text: SGLang's list grows with every release. A name that is not known here is treated with care: as
sharded, needed for every page, with one page per KV page. Pure.
"""

from __future__ import annotations

from typing import Any

from flexkv_sglang.prefix import ALL_PAGES, TRAILING_PAGES

KV = "kv"
MAMBA = "mamba"

_REPLICATED = frozenset(
    {"kv", "indexer", "swa", "auxiliary_swa", "draft", "draft_indexer", "draft_swa"}
)
_DENSITY_MAMBA = (
    1 / 32
)  # a state has the bytes of dozens of KV pages; only the end of a node has one
_DENSITY_WINDOW = 1 / 4  # only the pages of a window before the end of a node
_PART_DTYPES = ("conv_dtype", "temporal_dtype", "indexer_dtype")


def expected_policy(name: str) -> str:
    """The hit policy to assume until SGLang has said which."""
    return TRAILING_PAGES if default_density(name) < 1 else ALL_PAGES


def default_density(name: str) -> float:
    """Pages of this pool that are stored per KV page, as a guess for dividing the disk."""
    if name == MAMBA:
        return _DENSITY_MAMBA
    return _DENSITY_WINDOW if "swa" in name or name.endswith("_state") else 1.0


def is_replicated(name: str, pool: Any, *, mla: bool) -> bool:
    """Do all tensor-parallel ranks hold the same bytes? Only in MLA-like models (``mla``), and never certain ones.

    Mamba state is sharded by head, and so is any pool with a head count of its own (MHA drafts of an MLA
    model). A wrong False costs hits; a wrong True would serve another rank's bytes.
    """
    if not mla or name == MAMBA:
        return False
    if hasattr(pool, "head_num") and not hasattr(pool, "kv_lora_rank"):
        return False
    return name in _REPLICATED or name.startswith("deepseek_v4_")


def written_by_every_rank(name: str, *, mla: bool) -> bool:
    """Which pools SGLang backs up on every rank. Of the others, the storage writer of the replicas does."""
    return not mla or name == MAMBA


def is_draft(name: str) -> bool:
    """Is it a pool of the draft model, whose pages depend on both models?"""
    return name == "draft" or name.startswith("draft_")


def pool_class(pool: Any) -> str:
    """The class of SGLang's host pool whose pages these are. A pool that stands in for one names it."""
    return str(getattr(pool, "stands_for", None) or type(pool).__name__)


def element_types(name: str, pool: Any) -> str:
    """The dtype of a pool's bytes; of pools beside KV with those of their parts, which flags may change alone."""
    parts = [
        f"{part}={getattr(pool, part)}"
        for part in _PART_DTYPES
        if name != KV and hasattr(pool, part)
    ]
    return " ".join([str(pool.dtype), *parts])
