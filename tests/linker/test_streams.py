"""On a GPU: a forward pass reads the loaded bytes, however late the streams are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PAGE, LAYERS, HEADS, DIM, PAGES = 64, 8, 8, 128, 64


def _pool() -> Any:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    return MHATokenToKVPool(
        size=PAGES * PAGE,
        page_size=PAGE,
        dtype=torch.bfloat16,
        head_num=HEADS,
        head_dim=DIM,
        layer_num=LAYERS,
        device="cuda",
        enable_memory_saver=False,
    )


def _linker(place: Path, pool: Any, forward: Any) -> Any:
    from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

    from flexkv_sglang.linker.linker import FlexKVLinker

    slots = PagedTokenToKVPoolAllocator(
        pool.size, PAGE, torch.bfloat16, "cuda", pool, need_sort=False
    )
    params = CacheInitParams(
        disable=False, req_to_token_pool=None, token_to_kv_pool_allocator=slots, page_size=PAGE
    )
    return FlexKVLinker(
        None,
        params,
        components={ComponentType.FULL},
        extra_config={"path": str(place), "size": "1GB", "model_id": "m"},
        forward_stream=forward,
    )


def _busy() -> None:
    """Keeps the current stream occupied for some milliseconds."""
    torch.cuda._sleep(20_000_000)


def test_consumers_do_not_overtake_copies_nor_copies_their_pages(tmp_path: Path) -> None:
    from models.plain_pools import names
    from sglang_bed.linker_bed import transfer

    pool, forward = _pool(), torch.cuda.Stream()
    linker = _linker(tmp_path, pool, forward)
    keys = names(12)
    source = torch.arange(PAGE, 13 * PAGE, device="cuda")
    target = torch.arange(20 * PAGE, 32 * PAGE, device="cuda")
    buffers = [*pool.k_buffer, *pool.v_buffer]
    try:
        with torch.cuda.stream(forward):
            _busy()  # the forward pass that computes the pages is late
            for number, buffer in enumerate(buffers):
                buffer[source] = float(number + 1)
        assert linker.offload([transfer(keys, source)])
        while not linker.num_completed_offloads():
            pass
        assert linker.pop_completed_offload() is True
        assert linker.lookup("r", [transfer(keys)])[-1] == len(keys)
        assert linker.load("r", [transfer(keys, target)])
        _busy()  # what freed the slots is still running on the scheduler's stream
        for buffer in buffers:
            buffer[target] = -1.0
        index = linker.start_layer_wise_loading()
        counter = linker.layer_done_counter
        counter.set_consumer(index)
        seen = []
        with torch.cuda.stream(forward):
            for layer in range(LAYERS):
                counter.wait_until(layer)
                seen += [pool.k_buffer[layer][target].clone(), pool.v_buffer[layer][target].clone()]
        assert linker.finish_layer_wise_loading(index) is True
        for buffer in buffers:
            buffer[target] = -2.0  # the slots are others' now
        torch.cuda.synchronize()
        for layer in range(LAYERS):
            assert bool((seen[2 * layer] == float(layer + 1)).all())
            assert bool((seen[2 * layer + 1] == float(LAYERS + layer + 1)).all())
        assert all(bool((buffer[target] == -2.0).all()) for buffer in buffers)
    finally:
        linker.close()
