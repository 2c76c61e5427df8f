"""The copies in plain torch: they serve a CPU, or a GPU without triton, and the kernels are compared with them.

``checks`` has proven the arguments; nothing is checked here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from flexkv_sglang.triton_kernels.checks import Copy
from flexkv_sglang.triton_kernels.table import PtrTable


def gather(copy: Copy) -> None:
    """``blocks[b, offset + j*chunk :][:chunk] = page ids[b] of buffer first + j``."""
    for pages, target in _sides(copy):
        target.copy_(pages[copy.ids])


def scatter(copy: Copy) -> None:
    """The inverse of ``gather``."""
    for pages, source in _sides(copy):
        pages[copy.ids] = source


def prepare(table: PtrTable) -> None:
    """There is nothing to compile."""


def _sides(copy: Copy) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Per buffer: all its pages as bytes, and the part of the blocks that belongs to it."""
    width = copy.table.chunk_bytes
    for j in range(copy.count):
        begin = copy.offset_bytes + j * width
        yield copy.table.pages(copy.first + j), copy.blocks[:, begin : begin + width]
