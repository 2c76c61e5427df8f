"""Lossy storage of pages with 8 bits per value: e4m3 or int8, one scale per group of values. Opt-in.

What comes back is not what was stored, so such pages need a namespace of their own; nothing in this package uses
them unless asked. A quantised block (little-endian) holds the codes of all buffers of the table, in its order, one byte
per value; then one float32 scale per group, in the same order (``QuantLayout``).

``scale = max(largest finite |value| / largest code, 2**-100)``, ``code = round to even(value / scale)``; largest codes:
448 and 127. Infinities become the largest code. NaN stays NaN in e4m3 and becomes 0 in int8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flexkv_sglang.errors import KernelArgumentError
from flexkv_sglang.triton_kernels import checks, dispatch
from flexkv_sglang.triton_kernels.checks import Copy
from flexkv_sglang.triton_kernels.table import PtrTable

LARGEST = {"e4m3": 448.0, "int8": 127.0}
SCALE_MIN = 2.0**-100
VALUE_DTYPES = (torch.bfloat16, torch.float16)
GROUP_MIN, GROUP_MAX = 16, 1024


@dataclass(frozen=True, slots=True)
class QuantLayout:
    """Where codes and scales lie. ``chunk_values``: values of a page in one buffer; ``group``: values per scale."""

    buffer_count: int
    chunk_values: int
    group: int

    @property
    def scales_at(self) -> int:
        """Offset of the first scale in bytes."""
        return self.buffer_count * self.chunk_values

    @property
    def chunk_groups(self) -> int:
        """Scales of a page in one buffer."""
        return self.chunk_values // self.group

    @property
    def block_bytes(self) -> int:
        """Bytes of a quantised block."""
        return self.scales_at + 4 * self.buffer_count * self.chunk_groups


def quant_layout(table: PtrTable, group: int = 64) -> QuantLayout:
    """The layout for pages of ``table`` (bf16 or fp16); ``group``: a power of two that divides a chunk's values."""
    if table.dtype not in VALUE_DTYPES:
        raise KernelArgumentError(f"values are {table.dtype}, must be one of {VALUE_DTYPES}")
    if not GROUP_MIN <= group <= GROUP_MAX or group & (group - 1):
        raise KernelArgumentError(
            f"group is {group}, must be a power of two from {GROUP_MIN} to {GROUP_MAX}"
        )
    values = table.chunk_bytes // 2
    if values % group:
        raise KernelArgumentError(f"group {group} does not divide the {values} values of a chunk")
    return QuantLayout(table.buffer_count, values, group)


def gather_quant(
    table: PtrTable,
    page_ids: torch.Tensor,
    blocks: torch.Tensor,
    *,
    code: str,
    group: int = 64,
    first: int = 0,
    count: int | None = None,
    quota: int | None = None,
    trusted_ids: bool = False,
) -> None:
    """Quantise pages into blocks. ``code``: ``"e4m3"`` or ``"int8"``; ``blocks``: uint8 ``(n, >= block_bytes)``.

    Blocks begin at multiples of 16 bytes, each of them. ``count`` buffers from ``first`` on; the places of the others
    in the blocks stay as they are. All else as ``ops.gather_pages``.
    """
    layout = _check_code(table, code, group)
    copy = _copy(table, page_ids, blocks, layout, (first, count, 0, quota), False, trusted_ids)
    if len(blocks):
        (dispatch.kernels(table.device, "quant_kernel") or _Reference).encode(copy, layout, code)


def dequant_scatter(
    table: PtrTable,
    page_ids: torch.Tensor,
    blocks: torch.Tensor,
    *,
    code: str,
    group: int = 64,
    first: int = 0,
    count: int | None = None,
    quota: int | None = None,
    trusted_ids: bool = False,
) -> None:
    """Blocks of ``gather_quant`` into pages, values rounded to the table's dtype. Page ids must be distinct."""
    layout = _check_code(table, code, group)
    copy = _copy(table, page_ids, blocks, layout, (first, count, 0, quota), True, trusted_ids)
    if len(blocks):
        (dispatch.kernels(table.device, "quant_kernel") or _Reference).decode(copy, layout, code)


class _Reference:
    """The same in torch: stands where the module of kernels would."""

    @staticmethod
    def encode(copy: Copy, layout: QuantLayout, code: str) -> None:
        for j in range(copy.first, copy.first + copy.count):
            bits = copy.table.pages(j)[copy.ids].view(copy.table.dtype)
            values = bits.to(torch.float32).view(len(copy.ids), layout.chunk_groups, layout.group)
            size = torch.where(values.isfinite(), values.abs(), torch.zeros_like(values))
            scale = (size.amax(2) / LARGEST[code]).clamp_min(SCALE_MIN)
            codes = _encoded(values / scale[:, :, None], code)
            at, scales_at = j * layout.chunk_values, layout.scales_at + 4 * j * layout.chunk_groups
            copy.blocks[:, at : at + layout.chunk_values] = codes.reshape(len(copy.ids), -1)
            copy.blocks[:, scales_at : scales_at + 4 * layout.chunk_groups] = scale.view(
                torch.uint8
            )

    @staticmethod
    def decode(copy: Copy, layout: QuantLayout, code: str) -> None:
        for j in range(copy.first, copy.first + copy.count):
            at, scales_at = j * layout.chunk_values, layout.scales_at + 4 * j * layout.chunk_groups
            codes = copy.blocks[:, at : at + layout.chunk_values].contiguous()
            scale = copy.blocks[:, scales_at : scales_at + 4 * layout.chunk_groups].contiguous()
            values = codes.view(torch.float8_e4m3fn if code == "e4m3" else torch.int8).float()
            values = values.view(len(codes), layout.chunk_groups, layout.group)
            values = values * scale.view(torch.float32)[:, :, None]
            whole = values.to(copy.table.dtype).view(len(codes), -1).view(torch.uint8)
            copy.table.pages(j)[copy.ids] = whole


def _encoded(values: torch.Tensor, code: str) -> torch.Tensor:
    """uint8 codes."""
    if code == "e4m3":
        clamped = values.clamp(-448.0, 448.0)
        codes = clamped.to(torch.float8_e4m3fn).view(torch.uint8)
        return codes.masked_fill(values.isnan(), 0x7F)
    return values.nan_to_num(nan=0.0).clamp(-127.0, 127.0).round().to(torch.int8).view(torch.uint8)


def _check_code(table: PtrTable, code: str, group: int) -> QuantLayout:
    if code not in LARGEST:
        raise KernelArgumentError(f"code is {code!r}, must be one of {tuple(LARGEST)}")
    return quant_layout(table, group)


def _copy(
    table: PtrTable,
    page_ids: torch.Tensor,
    blocks: torch.Tensor,
    layout: QuantLayout,
    span: checks.Span,
    distinct: bool,
    trusted: bool,
) -> Copy:
    checks.check_blocks(blocks, layout.block_bytes, 16)
    first, count, _, quota = span
    wanted = checks.check_range(table, first, count)
    checks.check_quota(quota)
    checks.check_place(table, blocks)
    ids = checks.check_ids(
        page_ids, len(blocks), table.page_count, table.device, distinct=distinct, trusted=trusted
    )
    unit = (1, table.chunk_bytes, table.page_stride_bytes, table.page_count)
    return Copy(table, ids, blocks, first, wanted, 0, *unit, quota)
