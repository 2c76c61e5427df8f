"""The copies in plain torch: what runs on a CPU or without triton, and what the kernels are compared with.

Arguments were checked (``checks``); nothing is checked here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from flexkv_sglang.triton_kernels.checks import Copy
from flexkv_sglang.triton_kernels.table import PtrTable


def gather(copy: Copy) -> None:
    """``blocks[b, offset + j*chunk + t*piece :][:piece] = buffer[first + j][ids[b*pieces + t]]``."""
    for places, target in _sides(copy):
        target.copy_(places[copy.ids].reshape(target.shape))


def scatter(copy: Copy) -> None:
    """The inverse of ``gather``."""
    for places, source in _sides(copy):
        places[copy.ids] = source.reshape(len(copy.ids), copy.piece_bytes)


def prepare(table: PtrTable) -> None:
    """Nothing to compile."""


def _sides(copy: Copy) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Per buffer: all its pieces as bytes, and the part of the blocks that belongs to it."""
    width = copy.pieces * copy.piece_bytes
    whole_pages = copy.piece_bytes == copy.table.chunk_bytes and copy.limit == copy.table.page_count
    for j in range(copy.count):
        buffer = copy.first + j
        places = copy.table.pages(buffer) if whole_pages else copy.table.rows(buffer)
        begin = copy.offset_bytes + j * width
        yield places, copy.blocks[:, begin : begin + width]
