"""Device pools as SGLang shapes them, with random bytes; and the block of a page by plain slicing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flexkv_sglang.triton_kernels.layout import BlockLayout, Part

POISON = 0xA5


@dataclass(frozen=True, slots=True)
class Shape:
    """``buffers`` of ``(pages * page_size, *row)``; ``stack``: views of one tensor; ``gap``: rows left out."""

    buffers: int
    pages: int
    page_size: int
    row: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    stack: bool = False
    gap: int = 0

    @property
    def chunk_bytes(self) -> int:
        return self.page_size * torch.Size(self.row).numel() * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        return self.buffers * self.chunk_bytes


def random_bytes(*shape: int, seed: int = 0, device: torch.device | None = None) -> torch.Tensor:
    """Random uint8: equal for equal seeds, on any device."""
    maker = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=maker).to(device or "cpu")


def random_buffers(shape: Shape, device: torch.device, seed: int = 0) -> list[torch.Tensor]:
    """Buffers with any bits, NaN patterns included: compare bytes."""
    rows, width = shape.pages * shape.page_size, shape.row[-1] * shape.dtype.itemsize
    inner = shape.row[:-1]
    if shape.stack:
        whole = random_bytes(shape.buffers, rows, *inner, width, seed=seed, device=device)
        return list(whole.view(shape.dtype).unbind(0))
    apart = rows * (1 + shape.gap)
    return [
        random_bytes(apart, *inner, width, seed=seed + 1 + i, device=device).view(shape.dtype)[
            :: 1 + shape.gap
        ]
        for i in range(shape.buffers)
    ]


def layout_of(layers: int, page_size: int, *row_bytes: int) -> BlockLayout:
    """One part per number of bytes that a token has in one layer: K and V, or one latent vector (MLA)."""
    return BlockLayout(tuple(Part(layers, page_size * row) for row in row_bytes))


def block_of(buffers: list[torch.Tensor], page_size: int, page: int) -> torch.Tensor:
    """The bytes of a page: buffer after buffer."""
    rows = slice(page * page_size, (page + 1) * page_size)
    return torch.cat([buffer[rows].contiguous().view(torch.uint8).flatten() for buffer in buffers])


def poisoned(
    count: int, width: int, device: torch.device, pitch: int | None = None
) -> torch.Tensor:
    """Blocks full of ``POISON``; ``pitch``: bytes from one to the next."""
    whole = torch.full((count, pitch or width), POISON, dtype=torch.uint8, device=device)
    return whole[:, :width]


def same_bytes(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """True when they are equal, bit for bit."""
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(some, others, strict=True)
    )
