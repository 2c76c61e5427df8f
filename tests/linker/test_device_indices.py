"""Device indices that are no whole pages of the pool: nothing is stored, nothing is loaded, no byte is touched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flexkv_bed.controller import Geometry, boot
from flexkv_bed.tiny_model import write_config
from models.plain_pools import names
from sglang_bed.linker_bed import Side, same, side, transfer

pytestmark = [pytest.mark.sglang]

GOOD, BAD = names(2, seed=1), names(2, seed=2)


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    boot(write_config(tmp_path_factory.mktemp("model")))
    with side(Path(tmp_path_factory.mktemp("kv")), Geometry()) as made:
        assert made.store(GOOD, 1, 2)
        yield made


def wrong(replica: Side, what: str) -> torch.Tensor:
    page, right = replica.page_size, replica.tokens(3, 4)
    end = replica.linker._pools[0].tables[0].page_count * page
    if what == "of two pages":
        right[page // 2 : page] += page
        return right
    shift = {
        "before": -5 * page,
        "behind": end,
        "at the end": end - 4 * page,
        "across": 1,
        "far": 1 << 40,
    }
    return right + shift[what]


@pytest.mark.parametrize(
    "what", ["before", "behind", "at the end", "across", "far", "of two pages"]
)
def test_wrong_indices_touch_nothing(replica: Side, what: str) -> None:
    indices, before = wrong(replica, what), [buffer.clone() for buffer in replica.buffers]
    assert replica.linker.offload([transfer(BAD, indices)])
    assert replica.result() is False
    assert replica.find(BAD) == []
    assert replica.linker.load("r", [transfer(GOOD, indices)])
    index = replica.linker.start_layer_wise_loading()
    assert replica.linker.finish_layer_wise_loading(index) is False
    assert same(before, replica.buffers)
    assert replica.restore(GOOD, 3, 4), "and the next one works"
