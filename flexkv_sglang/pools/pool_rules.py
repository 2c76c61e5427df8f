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
    """The hit policy of a pool, as a guess until SGLang names it."""
    return TRAILING_PAGES if default_density(name) < 1 else ALL_PAGES


def default_density(name: str) -> float:
    """Pages of this pool per KV page, as a guess for dividing the disk."""
    if name == MAMBA:
        return _DENSITY_MAMBA
    return _DENSITY_WINDOW if "swa" in name or name.endswith("_state") else 1.0


def is_replicated(name: str, pool: Any, *, mla: bool) -> bool:
    """True if all tensor-parallel ranks have the same bytes: some pools of MLA-like models (``mla``).

    Mamba state is sharded by head, and so is a pool with a head count of its own (an MHA draft of an MLA model).
    A wrong False costs hits; a wrong True would serve another rank's bytes.
    """
    if not mla or name == MAMBA:
        return False
    if hasattr(pool, "head_num") and not hasattr(pool, "kv_lora_rank"):
        return False
    return name in _REPLICATED or name.startswith("deepseek_v4_")


def written_by_every_rank(name: str, *, mla: bool) -> bool:
    """True if SGLang backs the pool up on every rank; else only the storage writer does."""
    return not mla or name == MAMBA


def is_draft(name: str) -> bool:
    """True for pools of the draft model, whose pages depend on both models."""
    return name == "draft" or name.startswith("draft_")


def pool_class(pool: Any) -> str:
    """The name of SGLang's host pool class. A pool that stands in for another one names that one."""
    return str(getattr(pool, "stands_for", None) or type(pool).__name__)


def element_types(name: str, pool: Any) -> str:
    """The dtype of a pool. Beside KV also the dtypes of its parts: flags can change them alone."""
    parts = [
        f"{part}={getattr(pool, part)}"
        for part in _PART_DTYPES
        if name != KV and hasattr(pool, part)
    ]
    return " ".join([str(pool.dtype), *parts])
