"""Where the bytes of a page lie inside one block. Pure arithmetic: imports neither torch nor triton.

A *block* is a page as contiguous bytes. Its order is SGLang's host layout ``page_first_direct``, so that pages
stored from device memory and pages stored by HiCache are the same bytes: one *part* after the other (K, then V;
MLA has one; Mamba has one per state tensor), in a part one *chunk* per layer, in a chunk the tokens of the page
as the device pool keeps them. No padding anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from flexkv_sglang.errors import KernelArgumentError


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a block: ``layers`` chunks of ``chunk_bytes`` each."""

    layers: int
    chunk_bytes: int

    def __post_init__(self) -> None:
        if self.layers < 1 or self.chunk_bytes < 1:
            raise KernelArgumentError(f"a part needs layers and bytes: {self}")

    @property
    def part_bytes(self) -> int:
        """Bytes of the part in a block."""
        return self.layers * self.chunk_bytes


@dataclass(frozen=True, slots=True)
class Run:
    """Chunks that are adjacent in a block and come from adjacent buffers of one table.

    ``gather_pages(tables[run.table], ids, blocks, first=run.first, count=run.count, offset_bytes=run.offset_bytes)``.
    """

    table: int
    first: int
    count: int
    offset_bytes: int


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """The parts of a block, in their order. All parts have the same layers.

    Parts with equal chunks share one pointer table, whose buffers are those of the first part, then those of
    the second (``[k_0 .. k_n, v_0 .. v_n]``); otherwise each part has its own (``table_count``).
    """

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if not self.parts or len({part.layers for part in self.parts}) != 1:
            raise KernelArgumentError(f"all parts of a block have the same layers: {self.parts}")

    @property
    def layers(self) -> int:
        """Layers of this rank."""
        return self.parts[0].layers

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, and of the page it holds."""
        return sum(part.part_bytes for part in self.parts)

    @property
    def table_count(self) -> int:
        """Pointer tables that a block needs: 1 when all chunks have one size."""
        return 1 if len({part.chunk_bytes for part in self.parts}) == 1 else len(self.parts)

    def runs(self, first_layer: int = 0, last_layer: int | None = None) -> tuple[Run, ...]:
        """What to copy for the layers ``first_layer <= layer < last_layer`` (all by default).

        Adjacent runs of one table are joined, so all layers of an MHA page are one run.
        """
        end = self.layers if last_layer is None else last_layer
        if not 0 <= first_layer < end <= self.layers:
            raise KernelArgumentError(
                f"layers [{first_layer}, {end}) are not in [0, {self.layers})"
            )
        shared = self.table_count == 1
        runs: list[Run] = []
        offset = 0
        for number, part in enumerate(self.parts):
            first = first_layer + (number * part.layers if shared else 0)
            start = offset + first_layer * part.chunk_bytes
            before = runs[-1] if runs else None
            if shared and before is not None and before.first + before.count == first:
                runs[-1] = Run(
                    0, before.first, before.count + end - first_layer, before.offset_bytes
                )
            else:
                runs.append(Run(0 if shared else number, first, end - first_layer, start))
            offset += part.part_bytes
        return tuple(runs)
