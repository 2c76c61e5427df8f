"""Pages out of device slots and back, with SGLang's device pools: byte for byte, and nothing beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexkv_bed.controller import Geometry, boot
from flexkv_bed.tiny_model import write_config
from models.plain_pools import names
from sglang_bed.linker_bed import same, side

pytestmark = [pytest.mark.sglang]

GEOMETRIES = {
    "mha": Geometry(),
    "mha-page-1": Geometry(page_size=1),
    "mha-asymmetric": Geometry(kind="mha_asymmetric"),
    "mha-odd": Geometry(heads=1, head_dim=24),
    "mha-fp8": Geometry(dtype=torch.float8_e4m3fn),
    "mla": Geometry(kind="mla"),
    "mla-page-1": Geometry(kind="mla", page_size=1),
    "mla-64": Geometry(kind="mla", page_size=64, size_tokens=2048),
}


@pytest.fixture(scope="module", autouse=True)
def _booted(tmp_path_factory: pytest.TempPathFactory) -> None:
    boot(write_config(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_pages_come_back_byte_for_byte_in_another_process_and_other_slots(
    tmp_path: Path, name: str
) -> None:
    keys = names(3)
    with side(tmp_path, GEOMETRIES[name]) as writer:
        wanted = writer.rows(7, 3, 11)
        assert writer.store(keys, 7, 3, 11)
    with side(tmp_path, GEOMETRIES[name]) as reader:
        reader.fill(2)
        before = [buffer.clone() for buffer in reader.buffers]
        assert reader.find([*keys, *names(1, seed=9)]) == [1, 2, 3]
        assert reader.restore(keys, 1, 13, 2)
        assert same(reader.rows(1, 13, 2), wanted)
        others = torch.ones(len(before[0]), dtype=torch.bool)
        others[reader.tokens(1, 13, 2)] = False
        assert same([b[others] for b in reader.buffers], [b[others] for b in before])
