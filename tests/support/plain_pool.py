"""A page_first MHA host pool in plain memory, with what SGLang's controller and FlexKVStorage ask of one."""

from __future__ import annotations

import torch

from engines import keys, page_memory

PAGE_SIZE = 4
PAGES = 300
HALF = 8192


class Pool:
    """K of all pages, then V; ``HALF`` bytes of each per page. ``seed``: random bytes, else 0xA5 poison."""

    layout, dtype, page_size = "page_first", torch.bfloat16, PAGE_SIZE
    start_layer, layer_num = 0, 2
    size = logical_size = PAGES * PAGE_SIZE

    def __init__(self, seed: int | None = None) -> None:
        self.pages, buffers = page_memory(2 * PAGES, HALF, seed=seed)
        self._base = int(buffers.addresses[0, 0])

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        """SGLang's zero-copy question: addresses and lengths, one index per token."""
        assert len(indices) % PAGE_SIZE == 0
        starts = [self._base + token // PAGE_SIZE * HALF for token in indices.tolist()[::PAGE_SIZE]]
        return [a for k in starts for a in (k, k + PAGES * HALF)], [HALF] * 2 * len(starts)

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        """A copy of one page, bfloat16 ``[HALF]``; ``index`` is its first token."""
        page = int(index) // PAGE_SIZE
        both = torch.from_numpy(self.pages[[page, PAGES + page]].reshape(-1))
        return both.view(torch.bfloat16)

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        """Memory for one page."""
        return torch.zeros(HALF, dtype=torch.bfloat16)

    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        """Put one page where its first token is ``index``."""
        page = int(index) // PAGE_SIZE
        self.pages[[page, PAGES + page]] = data_page.view(torch.uint8).numpy().reshape(2, HALF)


def names(count: int, seed: int = 0) -> list[str]:
    """Page hashes as SGLang writes them."""
    return [key.hex() for key in keys(count, seed)]


def tokens(*pages: int) -> torch.Tensor:
    """Token indices of these pages, int64."""
    return torch.cat([torch.arange(p * PAGE_SIZE, (p + 1) * PAGE_SIZE) for p in pages])
