"""Oracles for ``prefix.usable_prefixes``: the definition by brute force, and SGLang's own ``HiCacheFile``.

``compare_with_hicache_file(cases, seed)`` runs as many random cases as asked for; ``scripts/soak`` uses it too.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from flexkv_sglang.prefix import (
    ALL_PAGES,
    BLOCK_GROUPS,
    TRAILING_PAGES,
    PoolRequirement,
    RestorablePrefixes,
    usable_prefixes,
)

Case = tuple[int, set[int], list[tuple[PoolRequirement, set[int]]]]
"""(pages asked for, KV pages held, per pool its demand and the pages it holds); pages count from 0."""


def restorable(
    length: int, kv: set[int], pools: Iterable[tuple[PoolRequirement, set[int]]]
) -> bool:
    """The definition, one length at a time: is everything there that a prefix of ``length`` pages needs?"""
    if not set(range(length)) <= kv:
        return False
    for requirement, held in pools:
        if requirement.policy == ALL_PAGES:
            needed = set(range(length))
        elif requirement.policy == TRAILING_PAGES:
            needed = set(range(max(0, length - max(1, requirement.window)), length))
        elif requirement.policy == BLOCK_GROUPS:
            continue
        else:
            return False
        if not needed <= held:
            return False
    return True


def by_definition(case: Case) -> list[int]:
    """All restorable lengths."""
    pages, kv, pools = case
    return [length for length in range(1, pages + 1) if restorable(length, kv, pools)]


def folded(case: Case) -> RestorablePrefixes:
    """The answer of our fold."""
    pages, kv, pools = case
    run = next((i for i in range(pages) if i not in kv), pages)
    return usable_prefixes(
        run, ((requirement, [i in held for i in range(run)]) for requirement, held in pools)
    )


def random_case(rng: random.Random, pages_max: int = 12, pools_max: int = 4) -> Case:
    """Mostly full pools with some holes: a case without any hit teaches little."""
    pages = rng.randint(0, pages_max)
    names = rng.sample(
        ["mamba", "swa", "indexer", "draft", "deepseek_v4_c4", "new pool"], pools_max
    )
    pools = []
    for name in islice(names, rng.randint(0, pools_max)):
        policy = rng.choice([ALL_PAGES, TRAILING_PAGES])
        pools.append((PoolRequirement(name, policy, window=rng.randint(0, 5)), _some(rng, pages)))
    return pages, _some(rng, pages), pools


def _some(rng: random.Random, pages: int) -> set[int]:
    share = rng.choice([0.5, 0.8, 0.95, 1.0])
    return {page for page in range(pages) if rng.random() < share}


class FileOracle:
    """A real ``HiCacheFile`` whose pages are empty files. A context manager; one thread."""

    def __init__(self) -> None:
        from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorageConfig

        self._place = Path(tempfile.mkdtemp(prefix="flexkv-fold-", dir="/dev/shm"))
        extra = {"file_storage_path": str(self._place)}
        self._file = HiCacheFile(
            HiCacheStorageConfig(0, 1, 0, 1, 0, 1, False, False, True, "m", extra_config=extra)
        )

    def __enter__(self) -> FileOracle:
        return self

    def __exit__(self, *_exc: object) -> None:
        shutil.rmtree(self._place)

    def ask(self, case: Case) -> Any:
        """SGLang's ``PoolTransferResult`` for the same pages."""
        pages, kv, pools = case
        names = [f"page{i}" for i in range(pages)]
        held = [("kv", kv), *((requirement.pool, pages_held) for requirement, pages_held in pools)]
        made = [
            self._place / f"{self._file._get_component_key(names[page], pool)}.bin"
            for pool, pages_held in held
            for page in pages_held
        ]
        for path in made:
            path.touch()
        try:
            return self._file.batch_exists_v2(names, transfers([d for d, _ in pools]))
        finally:
            for path in made:
                path.unlink()


def transfers(requirements: Sequence[PoolRequirement]) -> list[Any]:
    """As SGLang asks: a trailing pool's window is the number of its (placeholder) keys."""
    from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolTransfer

    return [
        PoolTransfer(
            name=requirement.pool,  # type: ignore[arg-type]  # a pool SGLang does not list is text
            keys=["__placeholder__"] * requirement.window,
            hit_policy=PoolHitPolicy(requirement.policy),
        )
        for requirement in requirements
    ]


def compare_with_hicache_file(cases: int, seed: int) -> list[str]:
    """Differences, each with its case; at most ten."""
    rng = random.Random(seed)
    found: list[str] = []
    with FileOracle() as oracle:
        for _ in range(cases):
            case = random_case(rng)
            ours, theirs = folded(case), oracle.ask(case)
            same = (
                ours.pages == theirs.kv_hit_pages
                and ours.lengths == theirs.restorable_prefix_pages
                and ours.boundaries == theirs.extra_pool_hit_pages
                and ours.lengths == by_definition(case)
            )
            if not same:
                found.append(f"{case}: {ours} here, {theirs} there")
            if len(found) == 10:
                break
    return found
