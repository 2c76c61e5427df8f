"""Wrong arguments of tables and copies: an error that names them, and not one byte moved."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flexkv_sglang.errors import FlexKVError, KernelArgumentError
from flexkv_sglang.triton_kernels import dispatch, reference
from flexkv_sglang.triton_kernels.ops import PtrTable, gather_pages, scatter_pages
from models.paged_pools import POISON, Shape, poisoned, random_buffers, same_bytes

SHAPE = Shape(4, 6, 8, (2, 64))
CPU = torch.device("cpu")


def buffer(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("buffers", "page_size", "message"),
    [
        ([], 1, "1 to 65535 buffers, not 0"),
        ([buffer(8, 16), buffer(9, 16)], 1, "buffer 1 has shape"),
        (
            [buffer(8, 16), buffer(8, 16, dtype=torch.float16)],
            1,
            "buffer 1 has dtype torch.float16",
        ),
        ([buffer(8, 16), buffer(16, 16)[::2]], 1, r"buffer 1 has strides \(32, 1\)"),
        ([buffer(16)], 1, r"a buffer is \(rows, ...\)"),
        ([buffer(16, 8).t()], 1, "elements of a row must be packed"),
        ([buffer(8, 32)[:, ::2]], 1, "elements of a row must be packed"),
        (
            [buffer(16, 16)[::2]],
            2,
            "rows of a page must follow each other: 64 bytes apart, 32 long",
        ),
        ([buffer(1, 16).expand(8, 16)], 1, "rows overlap"),
        ([buffer(8, 16)], 0, "page_size is 0"),
        ([buffer(8, 16)], 9, "no whole page of 9 rows"),
        ([buffer(8, 0)], 1, "no whole page"),
        ([buffer(9, 17).flatten()[1:145].view(8, 18)], 1, "begin at multiples of 16"),
        ([torch.zeros(8, 16, device="meta")], 1, "no kernels for device meta"),
    ],
)
def test_buffers_a_table_cannot_have(
    buffers: list[torch.Tensor], page_size: int, message: str
) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        PtrTable(buffers, page_size)


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def blocks(count: int = 2, width: int = SHAPE.block_bytes) -> torch.Tensor:
    return poisoned(count, width, CPU)


PAGE_CASES: list[tuple[torch.Tensor, torch.Tensor, dict[str, Any], str]] = [
    (ids(1, 6), blocks(), {}, "ids from 1 to 6 are not in [0, 6)"),
    (ids(-1, 2), blocks(), {}, "ids from -1 to 2 are not in [0, 6)"),
    (ids(1, 2, 3), blocks(), {}, "ids must be int32 or int64 (2,)"),
    (ids(1, 2)[None], blocks(), {}, "ids must be int32 or int64 (2,)"),
    (ids(1, 2).to(torch.int16), blocks(), {}, "not torch.int16"),
    (ids(1, 2).float(), blocks(), {}, "not torch.float32"),
    (ids(1, 2), blocks().view(torch.int8), {}, "blocks must be uint8"),
    (ids(1, 2), blocks()[0], {}, "blocks must be uint8 (n, bytes)"),
    (ids(1, 2), blocks(width=SHAPE.block_bytes - 16), {}, "8192 are needed"),
    (ids(1, 2), blocks(), {"offset_bytes": 16}, "8208 are needed"),
    (
        ids(1, 2),
        blocks(width=8208),
        {"offset_bytes": 8},
        "offset_bytes is 8, must be a multiple of 16",
    ),
    (ids(1, 2), blocks(width=8208), {"offset_bytes": -16}, "offset_bytes is -16"),
    (ids(1, 2), blocks(), {"first": 4}, "buffers [4, 4) are not in [0, 4)"),
    (ids(1, 2), blocks(), {"first": -1}, "buffers [-1, 4)"),
    (ids(1, 2), blocks(), {"first": 2, "count": 3}, "buffers [2, 5)"),
    (ids(1, 2), blocks(), {"count": 0}, "buffers [0, 0)"),
    (ids(1, 2), blocks(), {"quota": 0}, "quota is 0"),
    (ids(1, 2), blocks(width=2 * 8192)[:, ::2], {}, "packed and apart"),
    (ids(1, 2), blocks(1).expand(2, 8192), {}, "packed and apart"),
    (ids(1, 2), blocks(width=8200)[:, 8:], {}, "begin at a multiple of 16"),
    (ids(1, 2), blocks(width=8200)[:, :8192], {}, "multiples of 16 bytes apart"),
    (ids(1, 2), torch.zeros(2, 8192, dtype=torch.uint8, device="meta"), {}, "blocks are on meta"),
    (torch.zeros(2, dtype=torch.int64, device="meta"), blocks(), {}, "ids are on meta"),
]


@pytest.mark.parametrize("function", [gather_pages, scatter_pages])
@pytest.mark.parametrize(
    ("page_ids", "target", "options", "message"),
    PAGE_CASES,
    ids=[f"{i}: {case[3]}" for i, case in enumerate(PAGE_CASES)],
)
def test_copies_that_are_refused(
    function: Callable[..., None],
    page_ids: torch.Tensor,
    target: torch.Tensor,
    options: dict[str, Any],
    message: str,
) -> None:
    buffers = random_buffers(SHAPE, CPU)
    before = [buffer.clone() for buffer in buffers]
    with pytest.raises(KernelArgumentError, match=re.escape(message)):
        function(PtrTable(buffers, SHAPE.page_size), page_ids, target, **options)
    assert same_bytes(buffers, before)
    if target.device.type == "cpu":
        assert (target.view(torch.uint8) == POISON).all()


def test_equal_ids_are_for_gathers_alone() -> None:
    buffers = random_buffers(SHAPE, CPU)
    before = [buffer.clone() for buffer in buffers]
    table = PtrTable(buffers, SHAPE.page_size)
    gather_pages(table, ids(3, 3), blocks())
    with pytest.raises(KernelArgumentError, match="distinct"):
        scatter_pages(table, ids(3, 3), blocks())
    assert same_bytes(buffers, before)


@pytest.mark.parametrize("function", [gather_pages, scatter_pages])
def test_blocks_inside_the_pool_are_refused(function: Callable[..., None]) -> None:
    whole = torch.zeros(4 * 48 + 64, 256, dtype=torch.uint8)
    buffers = [whole[i * 48 : i * 48 + 48] for i in range(4)]
    table = PtrTable(buffers, SHAPE.page_size)
    inside = whole.view(-1)[4 * 48 * 256 - 16 :][: SHAPE.block_bytes].view(1, -1)
    with pytest.raises(KernelArgumentError, match="lie in one of the buffers"):
        function(table, ids(0), inside)
    outside = whole.view(-1)[4 * 48 * 256 :][: SHAPE.block_bytes].view(1, -1)
    function(table, ids(0), outside)


def test_the_error_is_one_of_ours_and_a_value_error() -> None:
    assert issubclass(KernelArgumentError, FlexKVError)
    assert issubclass(KernelArgumentError, ValueError)


def test_cpu_tensors_need_no_triton() -> None:
    """Neither the import nor the use of the public module imports it; without it torch serves a GPU."""
    code = """
import sys
class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError("no triton here")
sys.meta_path.insert(0, NoTriton())
import torch
from flexkv_sglang.triton_kernels import ops
pool = torch.arange(64, dtype=torch.int16).view(4, 16)
out = torch.zeros(2, 32, dtype=torch.uint8)
ops.gather_pages(ops.PtrTable([pool], 1), torch.tensor([3, 1]), out)
assert out.view(torch.int16).tolist() == pool[[3, 1]].tolist()
ops.warmup(ops.PtrTable([pool], 1))
assert not [m for m in sys.modules if m.split(".")[0] == "triton"]
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=120)


def test_a_gpu_is_served_by_kernels_only_where_triton_is(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    assert dispatch.has_triton()
    assert dispatch.runs_kernels(gpu)
    assert not dispatch.runs_kernels(CPU)
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert dispatch.copies(gpu) is reference
