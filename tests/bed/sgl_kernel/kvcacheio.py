"""The copies between device pages (L1) and host pages (L2), in torch, for pools that both lie in host memory.

Names and parameters are those of SGLang's CUDA kernels; ``lf``, ``pf`` and ``ph`` are the layouts layer_first,
page_first and page_head. Sizes in bytes that SGLang passes along are not needed where torch knows the
shape; they are accepted and dropped. Indices count tokens. Pointer tables are tensors with the address
of each layer's buffer: these are read as rows of ``item_size`` bytes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def _rows_at(address: int, row_count: int, row_bytes: int) -> Tensor:
    """View foreign memory as rows; the pool that owns it outlives the call."""
    buffer = (ctypes.c_uint8 * (row_count * row_bytes)).from_address(address)
    return torch.frombuffer(buffer, dtype=torch.uint8).view(row_count, row_bytes)


def _row_count(indices: Tensor) -> int:
    return int(indices.max()) + 1 if indices.numel() else 0


def _gather_layers(layers: Tensor, indices: Tensor, item_size: int) -> Iterator[tuple[int, Tensor]]:
    """For each layer of a pointer table, the rows at ``indices`` as bytes."""
    if indices.numel() == 0:
        return
    for layer, address in enumerate(layers.tolist()):
        yield layer, _rows_at(address, _row_count(indices), item_size)[indices]


# One layer at a time, host to device.


def transfer_kv_per_layer_mla(
    src: Tensor, dst: Tensor, src_indices: Tensor, dst_indices: Tensor, **_: Any
) -> None:
    dst[dst_indices] = src[src_indices]


def transfer_kv_per_layer(
    src_k: Tensor,
    dst_k: Tensor,
    src_v: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    **_: Any,
) -> None:
    dst_k[dst_indices] = src_k[src_indices]
    dst_v[dst_indices] = src_v[src_indices]


def transfer_kv_per_layer_mla_pf_lf(
    src: Tensor, dst: Tensor, src_indices: Tensor, dst_indices: Tensor, layer_id: int, **_: Any
) -> None:
    dst[dst_indices] = src[src_indices, layer_id]


def transfer_kv_per_layer_pf_lf(
    src_k: Tensor,
    dst_k: Tensor,
    src_v: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    layer_id: int,
    **_: Any,
) -> None:
    dst_k[dst_indices] = src_k[src_indices, layer_id]
    dst_v[dst_indices] = src_v[src_indices, layer_id]


def transfer_kv_per_layer_ph_lf(
    src_k: Tensor,
    dst_k: Tensor,
    src_v: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    layer_id: int,
    page_size: int,
    **_: Any,
) -> None:
    page, offset = src_indices // page_size, src_indices % page_size
    dst_k[dst_indices] = src_k[page, :, offset, layer_id]
    dst_v[dst_indices] = src_v[page, :, offset, layer_id]


# All layers at once, device to host, through pointer tables.


def transfer_kv_all_layer_mla(
    src_layers: Tensor,
    dst_layers: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    **_: Any,
) -> None:
    targets = dst_layers.tolist()
    for layer, rows in _gather_layers(src_layers, src_indices, item_size):
        _rows_at(targets[layer], _row_count(dst_indices), item_size)[dst_indices] = rows


def transfer_kv_all_layer(
    src_k_layers: Tensor,
    dst_k_layers: Tensor,
    src_v_layers: Tensor,
    dst_v_layers: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    **_: Any,
) -> None:
    transfer_kv_all_layer_mla(src_k_layers, dst_k_layers, src_indices, dst_indices, item_size)
    transfer_kv_all_layer_mla(src_v_layers, dst_v_layers, src_indices, dst_indices, item_size)


def transfer_kv_all_layer_mla_lf_pf(
    src_layers: Tensor,
    dst: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    **_: Any,
) -> None:
    for layer, rows in _gather_layers(src_layers, src_indices, item_size):
        dst[dst_indices, layer] = rows.view(dst.dtype).view(len(dst_indices), *dst.shape[2:])


def transfer_kv_all_layer_lf_pf(
    src_k_layers: Tensor,
    dst_k: Tensor,
    src_v_layers: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    **_: Any,
) -> None:
    transfer_kv_all_layer_mla_lf_pf(src_k_layers, dst_k, src_indices, dst_indices, item_size)
    transfer_kv_all_layer_mla_lf_pf(src_v_layers, dst_v, src_indices, dst_indices, item_size)


def transfer_kv_all_layer_lf_ph(
    src_k_layers: Tensor,
    dst_k: Tensor,
    src_v_layers: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    page_size: int,
    head_num: int,
    **_: Any,
) -> None:
    page, offset = dst_indices // page_size, dst_indices % page_size
    for layers, target in ((src_k_layers, dst_k), (src_v_layers, dst_v)):
        for layer, rows in _gather_layers(layers, src_indices, item_size):
            heads = rows.view(target.dtype).view(len(dst_indices), head_num, target.shape[-1])
            target[page, :, offset, layer] = heads


# The "direct" backend: lists of tensors in place of pointer tables.


def transfer_kv_direct(
    src_layers: Sequence[Tensor],
    dst_layers: Sequence[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    **_: Any,
) -> None:
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]


def transfer_kv_per_layer_direct_pf_lf(
    src_ptrs: Sequence[Tensor],
    dst_ptrs: Sequence[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    layer_id: int,
    page_size: int,
    **_: Any,
) -> None:
    page, offset = src_indices // page_size, src_indices % page_size
    for source, target in zip(src_ptrs, dst_ptrs, strict=True):
        target[dst_indices] = source[page, layer_id, offset]


def transfer_kv_all_layer_direct_lf_pf(
    src_ptrs: Sequence[Tensor],
    dst_ptrs: Sequence[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    page_size: int,
    **_: Any,
) -> None:
    """``src_ptrs`` holds all layers of the first target, then all of the second (K, then V)."""
    page, offset = dst_indices // page_size, dst_indices % page_size
    layer_count = len(src_ptrs) // len(dst_ptrs)
    for number, source in enumerate(src_ptrs):
        target = dst_ptrs[number // layer_count]
        target[page, number % layer_count, offset] = source[src_indices]


ALL = tuple(name for name in dir() if name.startswith("transfer_kv_"))
