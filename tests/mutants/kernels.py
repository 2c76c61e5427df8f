"""Seeded bugs in the kernels and the tests that find them, for ``run.py``: (name, file, old line, new line, tests)."""

from __future__ import annotations

KERNELS = "tests/kernels/test_other_ways.py"
"""Triton's interpreter, in a process of its own."""
COMPILED = "tests/kernels/test_ahead_of_time.py"
REFUSALS = "tests/kernels/test_refusals.py"

MUTANTS = (
    (
        "kernels: a page's offset has 32 bits",
        "triton_kernels/copy.py",
        "+ page[:, None] * (stride_v * VEC)",
        "+ (page[:, None] * (stride_v * VEC)).to(tl.int32)",
        KERNELS,
    ),
    (
        "kernels: an unchecked page id reaches foreign memory",
        "triton_kernels/copy.py",
        "there = there & (page >= 0) & (page < limit)",
        "page = tl.minimum(tl.maximum(page, 0), limit - 1)",
        KERNELS,
    ),
    (
        "kernels: the last tile is written whole",
        "triton_kernels/copy.py",
        "(word < chunk_v * VEC)[None, :]",
        "(word < tiles * BLOCK)[None, :]",
        KERNELS,
    ),
    (
        "kernels: a quota leaves work undone",
        "triton_kernels/copy.py",
        "for step in range(tl.program_id(0), work, tl.num_programs(0)):",
        "for step in range(tl.program_id(0), tl.minimum(work, tl.num_programs(0)), tl.num_programs(0)):",
        KERNELS,
    ),
    (
        "kernels: a range of layers begins at the first",
        "triton_kernels/copy.py",
        "tl.load(table + first + j)",
        "tl.load(table + j)",
        KERNELS,
    ),
    (
        "kernels: no hint of alignment",
        "triton_kernels/copy.py",
        "return tl.multiple_of(pointer.to(tl.pointer_type(WORD)), ALIGN)",
        "return pointer.to(tl.pointer_type(WORD))",
        COMPILED,
    ),
    (
        "kernels: a stride is compiled in",
        "triton_kernels/copy.py",
        '    "block_stride_v",\n    "offset_v",',
        '    "offset_v",',
        COMPILED,
    ),
    (
        "kernels: V before K",
        "triton_kernels/layout.py",
        "first = first_layer + (number * part.layers if shared else 0)",
        "first = first_layer + ((len(self.parts) - 1 - number) * part.layers if shared else 0)",
        "tests/kernels/test_host_bytes.py tests/kernels/test_layout.py",
    ),
    (
        "kernels: page ids are not looked at",
        "triton_kernels/checks.py",
        "if low < 0 or high >= limit:",
        "if False:",
        REFUSALS,
    ),
    (
        "kernels: equal ids are scattered",
        "triton_kernels/checks.py",
        "if distinct and len(torch.unique(ids)) != count:",
        "if False:",
        REFUSALS,
    ),
    (
        "kernels: blocks may lie in the pool",
        "triton_kernels/table.py",
        "return any(start < last and first < end for first, last in self._extents)",
        "return False",
        REFUSALS,
    ),
    (
        "kernels: misaligned buffers are trusted",
        "triton_kernels/table.py",
        "if any(address % VECTOR_BYTES for address in addresses):",
        "if False:",
        REFUSALS,
    ),
    (
        "kernels: rows with gaps make pages",
        "triton_kernels/table.py",
        "if self.page_size > 1 and self.row_stride_bytes != self.row_bytes:",
        "if False:",
        REFUSALS,
    ),
    (
        "kernels: triton is imported on a CPU",
        "triton_kernels/dispatch.py",
        "from flexkv_sglang.triton_kernels import reference",
        "from flexkv_sglang.triton_kernels import launch, reference  # noqa: F401",
        REFUSALS,
    ),
)
