"""SGLang's real radix tree with a sliding-window model, on the CPU, over flexkv. A script: prints one JSON object.

    python unified_tree.py STORAGE_DIR MODEL_DIR

Uses SGLang's own test kit, which asks for a GPU and for packages of its benchmarks: those are replaced here, in a
process of its own. One tree writes a prompt; a second one, without it in any cache, prefetches and loads it; a third
one tries after the window's pages were lost.
"""

from __future__ import annotations

import json
import sys
import types
import unittest
import warnings
from array import array
from pathlib import Path
from typing import Any

from flexkv_bed.controller import boot

warnings.simplefilter("ignore")
_benchmarks: Any = types.ModuleType("sglang.test.test_utils")
_benchmarks.CustomTestCase = unittest.TestCase
sys.modules["sglang.test.test_utils"] = _benchmarks

from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle  # noqa: E402
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402
from sglang.test.kits.unified_radix_cache import fixtures, mixins, storage  # noqa: E402
from sglang.test.kits.unified_radix_cache.config import CacheConfig  # noqa: E402

PAGE, PAGES = 16, 6
fixtures.get_device = lambda *_args, **_more: "cpu"


class Trees(storage.UnifiedRadixCacheStorageFixtures, unittest.TestCase):  # type: ignore[misc]
    """Builds trees on ``place``."""

    cfg = CacheConfig(
        page_size=PAGE,
        components=(ComponentType.FULL, ComponentType.SWA),
        sliding_window_size=2 * PAGE,
        num_layers=4,
        full_attention_layer_ids=(1, 3),
    )
    ps = PAGE

    def runTest(self) -> None:  # noqa: N802 - unittest's name
        """Nothing: only the helpers are wanted."""

    def tree(self, place: str) -> Any:
        """(tree, allocator, request pool) with HiCache."""
        made = fixtures.build_fixture(self.cfg)
        self._init_hicache(made[0], storage_backend="file", storage_dir=place, prefetch_threshold=1)
        return made

    def write(self, made: Any, tokens: list[int]) -> Any:
        """Insert a prompt, back it up to host and to storage; its KV bytes."""
        tree, slots, requests = made
        self._insert(tree, slots, requests, tokens)
        leaf = storage.match_prefix(tree, tokens).last_device_node
        indices = tree.path_device_indices(leaf)
        self._fill_full_kv(slots, indices, marker=7)
        self._backup_node(tree, leaf)
        self._write_path_to_l3(tree, leaf)
        self._flush_l3_backups(tree)
        return self._snapshot_full_kv(slots, indices)

    def fetch(self, made: Any, tokens: list[int], name: str) -> Any:
        """Prefetch from storage; returns the match of the tree after it."""
        tree = made[0]
        handle = CacheRequestHandle(name, 0)
        tree.prefetch_from_storage(handle, tree.root_node_handle(), array("q", tokens), None, None)
        self._run_prefetch_to_completion(tree, handle)
        return storage.match_prefix(tree, tokens)


def patched(model: str, place: str) -> Any:
    """``ServerArgs`` with our backend where the kit asks for ``file``, and without a GPU."""

    def make(**given: Any) -> ServerArgs:
        given |= {
            "model_path": model,
            "device": "cpu",
            "mem_fraction_static": 0.1,
            "skip_tokenizer_init": True,
            "enable_hierarchical_cache": True,
            "hicache_mem_layout": "page_first",
        }
        if given.get("hicache_storage_backend") == "file":
            extra = json.loads(given["hicache_storage_backend_extra_config"])
            extra |= {"path": place, "size": "32MB", "model_id": "m"}
            given["hicache_storage_backend"] = "flexkv"
            given["hicache_storage_backend_extra_config"] = json.dumps(extra)
        args = ServerArgs(**given)
        args.resolve_once()
        return args

    return make


def main(place: str, model: str) -> None:
    """Run the three trees and print their reports."""
    boot(Path(model))
    mixins.ServerArgs = fixtures.ServerArgs = storage.ServerArgs = patched(model, place)
    trees = Trees()
    tokens = trees._make_seq(1, PAGES)
    try:
        first = trees.tree(place)
        written = trees.write(first, tokens)
        second = trees.tree(place)
        found = trees.fetch(second, tokens, "second")
        trees._load_back_node(second[0], found.best_match_node)
        loaded = trees._snapshot_full_kv(
            second[1], second[0].path_device_indices(found.best_match_node)
        )
        backend = first[0].cache_controller.storage_backend
        backend._stores.get("swa").store.clear()
        third = trees.tree(place)
        lost = trees.fetch(third, tokens, "third")
    finally:
        trees.doCleanups()
    same = all(bool((a == b).all()) for a, b in zip(written, loaded, strict=True))
    print(
        json.dumps(
            {
                "backend": type(backend).__name__,
                "found": [found.host_hit_length, found.swa_host_hit_length],
                "same": same,
                "lost": [lost.host_hit_length, lost.swa_host_hit_length],
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
