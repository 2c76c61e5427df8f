"""SGLang's real radix tree and linker wrapper on the CPU over our linker. A script: prints one JSON object per case.

    python linked_tree.py STORAGE_DIR MODEL_DIR

Uses SGLang's own test kit, as ``unified_tree`` does. One tree inserts a prompt, which offloads it; a second one with
empty pools matches it, loads it into a request's own slots, layer by layer, and inserts it.
"""

from __future__ import annotations

import json
import sys
import time
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

import torch  # noqa: E402
from sglang.srt.mem_cache.base_prefix_cache import (  # noqa: E402
    InitLoadBackParams,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.radix_cache import RadixKey  # noqa: E402
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402
from sglang.test.kits.unified_radix_cache import fixtures, mixins  # noqa: E402
from sglang.test.kits.unified_radix_cache.config import CacheConfig  # noqa: E402

from flexkv_sglang.linker.linker import FlexKVLinker  # noqa: E402

PAGES = 6
FULL, SWA, MAMBA = ComponentType.FULL, ComponentType.SWA, ComponentType.MAMBA
_HYBRID: dict[str, Any] = {"num_layers": 4, "full_attention_layer_ids": (1, 3)}
CASES = {
    "full": CacheConfig(page_size=16, components=(FULL,), num_layers=4),
    "swa": CacheConfig(page_size=16, components=(FULL, SWA), sliding_window_size=32, **_HYBRID),
    "mamba": CacheConfig(page_size=1, components=(FULL, MAMBA), **_HYBRID),
}
fixtures.get_device = lambda *_args, **_more: "cpu"


class Replica(mixins.UnifiedRadixCacheFixtures):  # type: ignore[misc]
    """A tree with a linker on ``place``; its device pools hold random bytes of ``seed``."""

    def __init__(self, name: str, place: str, seed: int) -> None:
        self.cfg = CASES[name]
        self.tree, self.slots, self.requests = fixtures.build_fixture(self.cfg)
        if name == "full":
            self.slots.alloc(self.cfg.page_size - 1)  # the kit's allocator knows no pages
        kvcache = self.slots.get_kvcache()
        self.full = getattr(kvcache, "full_kv_pool", kvcache)
        self.swa = getattr(kvcache, "swa_kv_pool", None)
        self.linker = FlexKVLinker(
            None,
            self.tree.cache_init_params,
            components=set(self.tree.components),
            extra_config={"path": f"{place}/{name}", "size": "8MB", "model_id": "m"},
        )
        self.tree.init_cache_linker(self.linker)
        kvcache.register_layer_transfer_counter(self.linker.layer_done_counter)
        generator = torch.Generator().manual_seed(seed)
        for buffer in self._buffers():
            buffer.copy_(torch.randint(0, 256, buffer.shape, generator=generator))

    def _buffers(self) -> list[torch.Tensor]:
        pools = [self.full] if self.swa is None else [self.full, self.swa]
        tensors = [tensor for pool in pools for tensor in (*pool.k_buffer, *pool.v_buffer)]
        if self.cfg.has_mamba:
            cache = self.requests.mamba_pool.mamba_cache
            tensors += [layer for state in (cache.temporal, *cache.conv) for layer in state]
        return [tensor.view(torch.uint8) for tensor in tensors]

    def bytes_of(self, full: torch.Tensor, state: torch.Tensor | None) -> list[torch.Tensor]:
        """The content of these slots: full attention, the window's end, the Mamba state."""
        found = [t.view(torch.uint8)[full] for t in (*self.full.k_buffer, *self.full.v_buffer)]
        if self.swa is not None:
            end = self.slots.full_to_swa_index_mapping[full[-self.cfg.sliding_window_size :]]
            found += [t.view(torch.uint8)[end] for t in (*self.swa.k_buffer, *self.swa.v_buffer)]
        if state is not None:
            cache = self.requests.mamba_pool.mamba_cache
            found += [
                s[:, int(state)].clone().view(torch.uint8) for s in (cache.temporal, *cache.conv)
            ]
        return [tensor.clone() for tensor in found]

    def write(self, tokens: list[int]) -> list[torch.Tensor]:
        """Insert a prompt and wait until it is offloaded; its bytes."""
        full, state = self._alloc(self.slots, len(tokens)), None
        params = mixins.InsertParams(key=RadixKey(array("q", tokens)), value=full)
        if self.cfg.has_mamba:
            state = self._make_req(self.requests).kv.mamba_pool_idx
            params.mamba_value = state.unsqueeze(0)
        wanted = self.bytes_of(full, state)
        self.tree.insert(params)
        self.drain()
        return wanted

    def drain(self) -> None:
        """As the scheduler does every step, until no offload is pending."""
        end = time.monotonic() + 20
        while self.tree.linker.pending_offloads and time.monotonic() < end:
            self.tree.check_hicache_events()
            time.sleep(0.005)

    def match(self, tokens: list[int], req: Any) -> Any:
        """The pages of a prompt that the tree and the linker have."""
        found = self.tree.match_prefix(MatchPrefixParams(key=RadixKey(array("q", tokens)), req=req))
        self._apply_match_to_req(req, found)
        return found

    def read(self, tokens: list[int]) -> dict[str, Any]:
        """Match, load back, wait for all layers, finish. Returns a report."""
        req = self._make_req(self.requests)
        found = self.match(tokens, req)
        seen: dict[str, Any] = {"hit": found.host_hit_length}
        if not found.host_hit_length:
            return seen
        params = InitLoadBackParams(
            best_match_node=found.best_match_node, host_hit_length=found.host_hit_length, req=req
        )
        seen["loaded"] = self.tree.init_load_back(params)[0]
        full = self.tree.linker.private_load_indices[req.rid]
        index = self.tree.ready_to_load_host_cache()
        counter = self.linker.layer_done_counter
        counter.set_consumer(index)
        for layer in range(counter.num_layers):
            counter.wait_until(layer)
        seen["failed"] = len(self.tree.finish_external_linker_loads([req]))
        seen["bytes"] = self.bytes_of(full, req.kv.mamba_pool_idx if self.cfg.has_mamba else None)
        return seen


def run(name: str, place: str) -> dict[str, Any]:
    """One case: write, read elsewhere, read a missing page, reset, lose a page."""
    first = Replica(name, place, seed=1)
    tokens = first._make_seq(1, PAGES)
    wanted = first.write(tokens)
    pending = len(first.tree.linker.pending_offloads)
    first.tree.reset()
    again = first.read(tokens)
    first.linker.close()
    second = Replica(name, place, seed=2)
    nothing = second.read(second._make_seq(9000, PAGES))
    seen = second.read([*tokens, *second._make_seq(5000, 1)])
    same = [bool(torch.equal(a, b)) for a, b in zip(wanted, seen.pop("bytes"), strict=True)]
    third = Replica(name, place, seed=3)
    req = third._make_req(third.requests)
    hit = third.match(tokens, req).host_hit_length
    third.linker.close()
    second.linker._stores.get("kv").store.clear()
    lost = second.read(tokens)
    second.linker.close()
    return {
        "pending": pending,
        "after_reset": again["hit"],
        "nothing": nothing,
        "seen": seen,
        "same": same,
        "neighbour": hit,
        "lost": lost["hit"],
    }


def main(place: str, model: str) -> None:
    """Run all cases and print their reports."""
    boot(Path(model))

    def arguments(**given: Any) -> ServerArgs:
        given |= {"model_path": model, "device": "cpu", "skip_tokenizer_init": True}
        args = ServerArgs(**given)
        args.resolve_once()
        return args

    fixtures.ServerArgs = arguments
    print(json.dumps({name: run(name, place) for name in CASES}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
