"""Decode-side offload: SGLang's real manager stores the pages of a decode instance, a few at a time.

It attaches through the base controller: no pools by name, no prefix keys; its pages continue the chain that the
prefill instance stored, so a later prefill finds prompt and answer as one prefix.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flexkv_bed.controller import (
    Geometry,
    Rig,
    allocator,
    boot,
    device_pool,
    dist,
    expected_rows,
    page_hashes,
    prefetch_pages,
    token_ids,
    write_pages,
)
from flexkv_bed.tiny_model import write_config
from flexkv_sglang import FlexKVStorage
from stores.engines import wait_until

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

PAGE, PROMPT, DECODED = 16, 40, 105  # 2 whole pages of prompt; 145 tokens are 9 pages


class Request:
    """The part of SGLang's ``Req`` that the manager reads while it runs."""

    rid, extra_key, cache_salt = "r", None, None
    kv = SimpleNamespace(req_pool_idx=1)

    def __init__(self, prompt: list[int]) -> None:
        self.origin_input_ids, self.output_ids = prompt, list[int]()

    def finished(self) -> bool:
        return False  # SGLang then decides about its rows


@pytest.mark.parametrize("stride", [PAGE, 48])
def test_pages_of_decode_continue_the_prompt(
    tmp_path: Path, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.disaggregation.decode_kvcache_offload_manager import (
        DecodeKVCacheOffloadManager,
    )
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

    monkeypatch.setenv("SGLANG_HICACHE_DECODE_OFFLOAD_STRIDE", str(stride))
    extra = {"path": str(tmp_path / "pages"), "size": "8MB", "prefetch_threshold": PAGE}
    model = write_config(tmp_path / "model")
    boot(
        model,
        page_size=PAGE,
        hicache_mem_layout="page_first",
        hicache_storage_backend="flexkv",
        hicache_storage_backend_extra_config=json.dumps(extra),
    )
    geometry = Geometry(page_size=PAGE)
    tokens = token_ids(PROMPT + DECODED)
    whole = len(tokens) // PAGE * PAGE
    with Rig(geometry, extra={"path": extra["path"], "size": "8MB"}) as prefill:
        write_pages(prefill, tokens[: PROMPT // PAGE * PAGE], seed=5)
        rows = expected_rows(prefill, len(tokens), seed=5)
        pool = device_pool(geometry)
        slots = allocator(pool, geometry).alloc(whole + PAGE)
        for buffer, row in zip([*pool.k_buffer, *pool.v_buffer], rows, strict=True):
            buffer.view(buffer.shape[0], -1).view(torch.uint8)[slots[: len(tokens)]] = row
        requests = ReqToTokenPool(2, 1024, "cpu", False)
        requests.req_to_token[1, : len(slots)] = slots.to(torch.int32)
        manager = DecodeKVCacheOffloadManager(
            requests, allocator(pool, geometry), dist.group.WORLD, None
        )
        backend = manager.cache_controller.storage_backend
        assert isinstance(backend, FlexKVStorage)
        request = Request(tokens[:PROMPT])
        for token in [*tokens[PROMPT:], 7]:  # the last one's KV cache is never computed
            request.output_ids.append(token)
            manager.offload_kv_cache(request)
            manager.check_offload_progress()

        def idle() -> bool:
            manager.check_offload_progress()
            return not manager.ongoing_offload and not manager.ongoing_backup

        assert wait_until(idle)
        stored = PROMPT // PAGE * PAGE + (len(tokens) - PROMPT // PAGE * PAGE) // stride * stride
        keys = page_hashes(tokens[:whole], PAGE)
        assert wait_until(lambda: prefill.backend.batch_exists(keys) == stored // PAGE)
        fetched = prefetch_pages(prefill, tokens[:whole])
        assert fetched.completed_tokens == stored
        assert fetched.same_bytes(rows)
        manager.cache_controller.detach_storage_backend()
        manager.release_host_resources()
