"""Blocks cut for one tensor-parallel size, put together for another."""

from __future__ import annotations

import pytest
import torch

from flexkv_sglang.errors import KernelArgumentError
from flexkv_sglang.triton_kernels.heads import HeadPart, relayout_heads
from models.paged_pools import POISON, poisoned, random_bytes

PARTS = (HeadPart(12, 64), HeadPart(12, 32))
ALL_HEADS = 8


def whole_model(count: int) -> list[torch.Tensor]:
    """K and V of all heads: uint8 [count, rows, heads, bytes] each."""
    return [
        random_bytes(count, part.rows, ALL_HEADS, part.head_bytes, seed=i)
        for i, part in enumerate(PARTS)
    ]


def shards(parts: list[torch.Tensor], heads: int, device: torch.device) -> list[torch.Tensor]:
    """What each rank of ``heads`` heads stores: K part, then V part."""
    return [
        torch.cat([part[:, :, first : first + heads].flatten(1) for part in parts], 1).to(device)
        for first in range(0, ALL_HEADS, heads)
    ]


@pytest.mark.parametrize("source_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("target_heads", [1, 2, 4, 8])
def test_any_size_to_any_other(source_heads: int, target_heads: int, device: torch.device) -> None:
    parts = whole_model(3)
    want = shards(parts, target_heads, device)
    targets = [poisoned(3, block.shape[1], device, block.shape[1] + 32) for block in want]
    relayout_heads(
        shards(parts, source_heads, device),
        targets,
        PARTS,
        source_heads=source_heads,
        target_heads=target_heads,
        quota=2,
    )
    assert all(torch.equal(got, block) for got, block in zip(targets, want, strict=True))


def test_a_rank_takes_what_it_needs(device: torch.device) -> None:
    """Rank 1 of two, from ranks 2 and 3 of four; one block, whose stride means nothing."""
    parts = whole_model(1)
    source, want = shards(parts, 2, device), shards(parts, 4, device)[1]
    target = poisoned(1, want.shape[1] + 16, device)
    relayout_heads(
        source[2:],
        [target],
        PARTS,
        source_heads=2,
        target_heads=4,
        first_source_head=4,
        first_target_head=4,
    )
    assert torch.equal(target[:, : want.shape[1]], want)
    assert (target[:, want.shape[1] :] == POISON).all()


def test_heads_of_odd_size(device: torch.device) -> None:
    part = HeadPart(5, 6)
    whole = random_bytes(2, 5, 4, 6)
    source = [whole[:, :, i : i + 2].flatten(1).contiguous().to(device) for i in (0, 2)]
    target = poisoned(2, 120, device)
    relayout_heads(source, [target], [part], source_heads=2, target_heads=4)
    assert torch.equal(target.cpu(), whole.flatten(1))


def test_refusals(device: torch.device) -> None:
    parts = whole_model(2)
    source = shards(parts, 4, device)
    target = poisoned(2, source[0].shape[1], device)

    def refused(
        message: str, sources: list[torch.Tensor], targets: list[torch.Tensor], **heads: int
    ) -> None:
        sizes = {"source_heads": 4, "target_heads": 4} | heads
        with pytest.raises(KernelArgumentError, match=message):
            relayout_heads(sources, targets, PARTS, **sizes)

    refused("heads range", source[:1], [target], first_target_head=4)
    refused("heads range", source[:1], [target], first_source_head=-4, first_target_head=-4)
    refused("must not be empty", [], [target])
    refused("must not be empty", source, [target], source_heads=0)
    refused("are needed", [source[0][:, 16:]], [target])
    refused("as many blocks", source[:1], [target[:1]])
    refused("lies in another", source[:1], [source[0]])
    refused("quota is 0", source[:1], [target], quota=0)
    assert (target == POISON).all()
