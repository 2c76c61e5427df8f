"""A ``FlexKVLinker`` over SGLang's real device pools on the CPU, driven as SGLang's tree and scheduler drive it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexkv_bed.controller import POISON, Geometry, allocator, device_pool

import torch  # isort: skip  # after flexkv_bed, which silences warnings of SGLang's imports
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from flexkv_sglang.linker.linker import FlexKVLinker
from stores.engines import wait_until

SIZE = "8MB"
WAIT_S = 20.0


@dataclass(slots=True)
class Side:
    """A replica: its device pool, slots and linker."""

    device: Any
    slots: Any
    linker: FlexKVLinker
    page_size: int

    @property
    def buffers(self) -> list[torch.Tensor]:
        """Bytes of each device buffer, a row per token: K of each layer, then V; or the one of each MLA layer."""
        kept = getattr(self.device, "kv_buffer", None) or [
            *self.device.k_buffer,
            *self.device.v_buffer,
        ]
        return [buffer.view(buffer.shape[0], -1).view(torch.uint8) for buffer in kept]

    def fill(self, seed: int) -> None:
        """Random bytes, NaN patterns included, everywhere."""
        generator = torch.Generator().manual_seed(seed)
        for rows in self.buffers:
            rows.copy_(torch.randint(0, 256, rows.shape, dtype=torch.uint8, generator=generator))

    def poison(self) -> None:
        """Fill all device pages with bytes that are stored nowhere."""
        for rows in self.buffers:
            rows.fill_(POISON)

    def tokens(self, *pages: int) -> torch.Tensor:
        """Slots of these device pages, int64."""
        size = self.page_size
        return torch.cat([torch.arange(page * size, (page + 1) * size) for page in pages])

    def rows(self, *pages: int) -> list[torch.Tensor]:
        """The content of these device pages, per buffer."""
        return [buffer[self.tokens(*pages)].clone() for buffer in self.buffers]

    def store(self, keys: Sequence[str], *pages: int) -> bool:
        """Offload pages and wait for the result."""
        assert self.linker.offload([transfer(keys, self.tokens(*pages))])
        return self.result()

    def result(self) -> bool:
        """The oldest offload's result, when it is there."""
        assert wait_until(lambda: self.linker.num_completed_offloads() > 0, WAIT_S)
        return self.linker.pop_completed_offload()

    def find(self, keys: Sequence[str], rid: str = "r") -> list[int]:
        """Restorable lengths."""
        return self.linker.lookup(rid, [transfer(keys)])

    def begin(self, keys: Sequence[str], *pages: int, rid: str = "r") -> int:
        """Queue a load and start it."""
        assert self.linker.load(rid, [transfer(keys, self.tokens(*pages))])
        return self.linker.start_layer_wise_loading()

    def restore(self, keys: Sequence[str], *pages: int, rid: str = "r") -> bool:
        """Load pages as a forward pass does, waiting layer by layer; did they land?"""
        index = self.begin(keys, *pages, rid=rid)
        counter = self.linker.layer_done_counter
        counter.set_consumer(index)
        for layer in range(counter.num_layers):
            counter.wait_until(layer)
            counter.wait_until(layer)  # SGLang asks several times
        return self.linker.finish_layer_wise_loading(index)


def transfer(keys: Sequence[str], slots: torch.Tensor | None = None, name: str = "kv") -> Any:
    """As SGLang's components build them."""
    return PoolTransfer(name=PoolName(name), device_indices=slots, keys=list(keys))


def init_params(slots: Any, page_size: int, **more: Any) -> CacheInitParams:
    """The parameters that SGLang gives a linker."""
    return CacheInitParams(
        disable=False,
        req_to_token_pool=more.pop("req_to_token_pool", None),
        token_to_kv_pool_allocator=slots,
        page_size=page_size,
        **more,
    )


@contextmanager
def side(
    place: Path, geometry: Geometry, kind: type[FlexKVLinker] = FlexKVLinker, **extra: Any
) -> Iterator[Side]:
    """A replica on a storage directory; ``extra``: settings."""
    pool = device_pool(geometry)
    slots = allocator(pool, geometry)
    given = {"path": str(place), "size": SIZE} | extra
    linker = kind(
        None,
        init_params(slots, geometry.page_size),
        components={ComponentType.FULL},
        extra_config=given,
    )
    made = Side(pool, slots, linker, geometry.page_size)
    made.fill(1)
    try:
        yield made
    finally:
        linker.close()


def same(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    """Byte for byte, per buffer."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
