"""What the names of SGLang's host pools stand for: who holds the same bytes, who writes, how the disk is divided.

Names are text: SGLang's list grows with every release. A name that is not known here is treated with care:
sharded, needed for every page, one of its pages per KV page. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flexkv_sglang.prefix import ALL_PAGES, TRAILING_PAGES
from flexkv_sglang.types import SECTOR, round_up

KV = "kv"
MAMBA = "mamba"

TRAILING_SLOTS_MIN = 64
"""Slots a pool of trailing state gets at least, as long as all of them take no more than a quarter of ``size``."""

_REPLICATED = frozenset(
    {"kv", "indexer", "swa", "auxiliary_swa", "draft", "draft_indexer", "draft_swa"}
)
_DENSITY_MAMBA = (
    1 / 32
)  # a state is worth dozens of KV pages in bytes, and lies at the end of a node
_DENSITY_WINDOW = 1 / 4  # a sliding window's pages before the end of a node
_PART_DTYPES = ("conv_dtype", "temporal_dtype", "indexer_dtype")
_FINE = 1 << 16  # densities are kept as integers of this fraction


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


@dataclass(frozen=True, slots=True)
class SizeClaim:
    """What one pool needs of the disk. ``writers``: rank processes of the server that write it.

    ``density``: its pages per KV page, in units of 1 / 65536.
    """

    name: str
    slot_bytes: int
    writers: int
    density: int

    @classmethod
    def of(cls, name: str, payload_bytes: int, writers: int, density: float) -> SizeClaim:
        """``payload_bytes``: of one page; ``density``: pages per KV page."""
        return cls(name, round_up(payload_bytes, SECTOR), writers, max(1, round(density * _FINE)))

    def fields(self) -> dict[str, object]:
        """For NAMESPACE.json."""
        return asdict(self)

    @property
    def sparse(self) -> bool:
        """Stored less often than KV pages."""
        return self.density < _FINE

    @property
    def units(self) -> int:
        """Bytes that one writer needs per KV page, times 65536."""
        return self.slot_bytes * self.density


def divide(size: int, claims: Sequence[SizeClaim]) -> dict[str, int]:
    """Bytes of each pool for one writing process, out of ``size`` bytes for the whole server.

    In proportion to what a KV page brings along, so that all pools are full at the same time; trailing pools
    get a few slots at least.
    """
    sparse = [claim for claim in claims if claim.sparse]
    floors: dict[str, int] = {}
    even = _proportional(size, claims)
    for claim in sparse if len(sparse) < len(claims) else []:
        most = size // 4 // len(sparse) // claim.writers
        floor = min(TRAILING_SLOTS_MIN * claim.slot_bytes, most)
        if even[claim.name] < floor:
            floors[claim.name] = floor
    if not floors:
        return even
    rest = size - sum(
        floors[claim.name] * claim.writers for claim in claims if claim.name in floors
    )
    return floors | _proportional(rest, [claim for claim in claims if claim.name not in floors])


def _proportional(size: int, claims: Sequence[SizeClaim]) -> dict[str, int]:
    total = sum(claim.units * claim.writers for claim in claims)
    return {claim.name: size * claim.units // total for claim in claims}


def part_of(name: str, claims: Sequence[SizeClaim]) -> float:
    """The fraction of one process's bytes that goes to a pool; ``claims``: what this process writes."""
    total = sum(claim.units for claim in claims)
    return next((claim.units / total for claim in claims if claim.name == name), 1.0)


def claims_from(fields: object) -> list[SizeClaim]:
    """Claims as they were written to NAMESPACE.json; [] if they are none."""
    if not isinstance(fields, list):
        return []
    try:
        return [SizeClaim(**item) for item in fields if isinstance(item, Mapping)]
    except TypeError:
        return []
