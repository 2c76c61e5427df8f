"""Compiles every kernel for GPUs that this machine lacks and prints the results as a JSON list.

    python tests/support/models/ahead_of_time.py sm_90 gfx942

A process of its own: kernels that were defined for the interpreter cannot be compiled. ptxas and the disassembler
come with triton.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flexkv_sglang.triton_kernels import copy
from flexkv_sglang.triton_kernels.launch import OPTIONS, WORD_BYTES, WORDS

TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {"table": "*u64", "ids": "*i64", "blocks": "*u8"}
"""Types of the pointers; integers have theirs in the kernel."""
UNALIGNED = ("table", "ids")
"""Pointers whose alignment is not known: views."""

# How the code looks: (loads, stores) of 16 bytes, narrow data accesses of 4 bytes, spilled registers.
PTX = (r"ld\.global[.\w:]*\.v(?:4\.b32|2\.b64)", r"st\.global[.\w:]*\.v(?:4\.b32|2\.b64)",
       r"(?:ld|st)\.global[.\w:]*?(?<!v4)(?<!v2)\.b32\b")  # fmt: skip
GCN = (r"global_load_dwordx4", r"global_store_dwordx4", r"global_(?:load|store)_dword\b")


def tile(align: int, rows: int, block: int) -> dict[str, Any]:
    word = WORD_BYTES[align]
    return {
        "WORD": WORDS[align],
        "VEC": align // word,
        "ALIGN": align,
        "ROWS": rows,
        "BLOCK": block,
    }


def variants() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(name, kernel, constants)"""
    for rows, block in ((1, 4096), (128, 32)):
        for scatter in (False, True):
            for strided in (False, True) if rows == 1 else (False,):
                name = f"copy {rows}x{block} scatter={scatter} strided={strided}"
                constants = tile(16, rows, block) | {"SCATTER": scatter, "STRIDED": strided}
                yield name, copy.copy_pages, constants
    odd = tile(4, 8, 512) | {"SCATTER": False, "STRIDED": False}
    yield "odd rows of 4", copy.copy_pages, odd


def compiled(kernel: Any, constants: dict[str, Any], target: GPUTarget) -> Any:
    names = kernel.arg_names
    integers = {p.name: p.annotation_type for p in kernel.params if p.annotation_type}
    types = dict.fromkeys(constants, "constexpr") | POINTERS | integers
    aligned = [n for n in names if n in POINTERS and n not in UNALIGNED]
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=target, options=OPTIONS)


def stack_bytes(cubin: bytes) -> int:
    """Stack and local memory of a binary: where spilled registers would be."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    sizes = re.findall(r"\b(?:STACK|LOCAL):(\d+)", text)
    return sum(map(int, sizes)) if sizes else -1


def report(name: str, kernel: Any, constants: dict[str, Any], target: str) -> dict[str, Any]:
    """One line of the list."""
    asm = compiled(kernel, constants, TARGETS[target]).asm
    cuda = target.startswith("sm_")
    text = asm["ptx" if cuda else "amdgcn"]
    loads, stores, narrow = (len(re.findall(p, text)) for p in (PTX if cuda else GCN))
    if cuda:
        spilled = len(re.findall(r"\.local\b", text)) + stack_bytes(asm["cubin"])
    else:
        sizes = re.findall(r"\.(?:[sv]gpr_spill_count|private_segment_fixed_size):\s+(\d+)", text)
        spilled = sum(map(int, sizes)) if sizes else -1
    specialized = [p.name for p in kernel.params if not (p.is_constexpr or p.do_not_specialize)]
    return {
        "name": name,
        "target": target,
        "wide_loads": loads,
        "wide_stores": stores,
        "narrow": narrow,
        "spilled": spilled,
        "binary_bytes": len(asm["cubin" if cuda else "hsaco"]),
        "specialized": specialized,
    }


if __name__ == "__main__":
    print(json.dumps([report(*v, target) for v in variants() for target in sys.argv[1:]]))
