"""SGLang's real controller and real host pools: written by one process, read by another, byte for byte.

Also: where alignment allows, no page is copied between the host pool and the disk. Allowed means that the
page is a multiple of 4096 bytes and each of its buffers of 512; the exception is written out by hand.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from flexkv_bed.controller import (
    Geometry,
    Rig,
    boot,
    expected_rows,
    page_hashes,
    prefetch_pages,
    token_ids,
    write_pages,
)
from flexkv_bed.tiny_model import write_config
from flexkv_sglang import FlexKVStorage
from flexkv_sglang.backends.io.mover import direct_pages
from models import pool_matrix
from models.plain_pools import stored

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

CASES = pool_matrix.combinations()
COPIED_THOUGH_ALIGNED = {
    "aligned-mla-layer_first-1"
}  # 160 bytes per layer: no buffer starts on a sector


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[str]:
    """A storage directory filled by another process that is gone."""
    storage = str(tmp_path_factory.mktemp("storage"))
    script = pool_matrix.__file__
    run = subprocess.run(
        [sys.executable, script, storage, str(model)],
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == [name for name, _ in CASES]
    boot(model)
    return storage


@pytest.mark.parametrize(("name", "geometry"), CASES, ids=[name for name, _ in CASES])
def test_pages_of_another_process_are_byte_equal_and_copied_only_if_unaligned(
    written: str, name: str, geometry: Geometry
) -> None:
    tokens = pool_matrix.prompt(geometry)
    with pool_matrix.rig(geometry, written) as rig:
        backend = rig.backend
        assert isinstance(backend, FlexKVStorage)
        assert rig.controller.page_get_func == rig.controller._page_get_zero_copy
        fetched = prefetch_pages(rig, tokens)
        assert fetched.hit_tokens == fetched.completed_tokens == len(tokens)
        assert fetched.same_bytes(expected_rows(rig, len(tokens), seed=7))
        expect_direct = name.startswith("aligned") and name not in COPIED_THOUGH_ALIGNED
        assert backend.metrics.snapshot().get("copied_pages", 0) == (
            0 if expect_direct else pool_matrix.PAGES
        )
        assert _planned_direct(rig) is expect_direct
        assert _all_announced(rig)


def _planned_direct(rig: Rig) -> bool:
    """The ways that the mover plans for the pages of the host pool."""
    backend = rig.backend
    pages = rig.host.size // rig.geometry.page_size
    buffers = stored(backend).pages.buffers(torch.arange(pages * rig.geometry.page_size), pages)
    mode = next(iter(backend._stores.prepared[0].values()))
    assert mode.o_direct
    direct = direct_pages(buffers, [mode] * pages)
    assert direct.all() or not direct.any()
    return bool(direct.all())


def _all_announced(rig: Rig) -> bool:
    """Every buffer of every page lies in the memory that I/O engines may pin."""
    pages = rig.host.size // rig.geometry.page_size
    buffers = stored(rig.backend).pages.buffers(torch.arange(pages * rig.geometry.page_size), pages)
    inside = [
        (buffers.addresses >= start) & (buffers.addresses + buffers.lengths <= start + size)
        for start, size in stored(rig.backend).pages.memory()
    ]
    return bool(inside) and bool(np.logical_or.reduce(inside).all())


@pytest.mark.parametrize("io_engine", ["threads", "buffered"])
@pytest.mark.parametrize(
    ("kind", "layout"), [("mha", "page_first"), ("mha", "layer_first"), ("mla", "page_first")]
)
def test_the_fallbacks_carry_the_same_bytes(
    tmp_path: Path, model: Path, kind: str, layout: str, io_engine: str
) -> None:
    boot(model)
    geometry = pool_matrix.aligned(kind, layout, 16)
    tokens = pool_matrix.prompt(geometry)
    extra = {"path": str(tmp_path), "size": "8MB", "io_engine": io_engine}
    with Rig(geometry, extra=extra) as rig:
        write_pages(rig, tokens, seed=3)
        assert prefetch_pages(rig, tokens).same_bytes(expected_rows(rig, len(tokens), seed=3))
    with Rig(
        geometry, extra={"path": str(tmp_path), "size": "8MB"}
    ) as rig:  # written by threads, read by the ring
        assert prefetch_pages(rig, tokens).same_bytes(expected_rows(rig, len(tokens), seed=3))


@pytest.mark.parametrize(
    ("kind", "layout"), [("mha", "layer_first"), ("mha", "page_head"), ("mla", "page_first")]
)
def test_pages_written_without_zero_copy_are_read_with_it(
    tmp_path: Path, model: Path, kind: str, layout: str
) -> None:
    boot(model)
    geometry = pool_matrix.aligned(kind, layout, 16)
    tokens = pool_matrix.prompt(geometry)
    extra = {"path": str(tmp_path), "size": "8MB"}
    generic = extra | {
        "backend_name": "flexkv",
        "module_path": "flexkv_sglang",
        "class_name": "FlexKVStorage",
    }
    with Rig(geometry, backend="dynamic", extra=generic) as rig:
        assert rig.controller.page_set_func == rig.controller._generic_page_set
        assert write_pages(rig, tokens, seed=3).completed_tokens == len(tokens)
    with Rig(geometry, extra=extra) as rig:
        assert rig.controller.page_set_func == rig.controller._page_set_zero_copy
        assert prefetch_pages(rig, tokens).same_bytes(expected_rows(rig, len(tokens), seed=3))
    with Rig(geometry, backend="dynamic", extra=generic) as rig:
        assert prefetch_pages(rig, tokens).same_bytes(expected_rows(rig, len(tokens), seed=3))


def test_a_flipped_byte_ends_the_hit_there(tmp_path: Path, model: Path) -> None:
    boot(model)
    geometry = pool_matrix.aligned("mha", "page_first", 16)
    tokens = pool_matrix.prompt(geometry)
    with pool_matrix.rig(geometry, str(tmp_path)) as rig:
        write_pages(rig, tokens, seed=3)
    path = next(tmp_path.rglob("*.slots"))
    page_bytes = 16 * 4 * 2 * 8 * 128 * 2
    data = bytearray(path.read_bytes())
    data[3 * page_bytes + 12345] ^= 1
    path.write_bytes(data)
    with pool_matrix.rig(geometry, str(tmp_path)) as rig:
        fetched = prefetch_pages(rig, tokens)
        assert (fetched.hit_tokens, fetched.completed_tokens) == (len(tokens), 3 * 16)
        assert fetched.same_bytes(expected_rows(rig, len(tokens), seed=3))
        assert prefetch_pages(rig, tokens).hit_tokens == 3 * 16  # not protected again


def test_a_batch_beyond_sglangs_128_pages_is_one_chain(tmp_path: Path, model: Path) -> None:
    boot(model)
    geometry = Geometry(page_size=1, layers=2, size_tokens=1024)
    tokens = token_ids(500)
    with Rig(geometry, extra={"path": str(tmp_path), "size": "8MB"}) as rig:
        write_pages(rig, tokens, seed=1)
        fetched = prefetch_pages(rig, tokens)
        assert fetched.completed_tokens == 500
        assert fetched.same_bytes(expected_rows(rig, 500, seed=1))
        hashes = page_hashes(tokens, 1)
        assert rig.backend.batch_exists(hashes) == 500
        assert rig.backend.batch_exists(["0" * 64, *hashes]) == 0


def test_attach_after_detach_in_one_process_finds_the_pages(tmp_path: Path, model: Path) -> None:
    boot(model)
    geometry = pool_matrix.aligned("mha", "page_first", 16)
    tokens = pool_matrix.prompt(geometry)
    extra = {"path": str(tmp_path), "size": "8MB"}
    with Rig(geometry, extra=extra) as rig:
        write_pages(rig, tokens, seed=3)
        rig.controller.detach_storage_backend()
        rig.controller.attach_storage_backend("flexkv", 16, "tiny", dict(extra))
        assert rig.controller.storage_backend_type == "flexkv"
        assert prefetch_pages(rig, tokens).same_bytes(expected_rows(rig, len(tokens), seed=3))


def test_a_wrong_setting_fails_the_attach_with_our_message(tmp_path: Path, model: Path) -> None:
    boot(model)
    geometry = pool_matrix.aligned("mha", "page_first", 16)
    with pytest.raises(ValueError, match=r"sise: unknown key, value '8MB'. Did you mean 'size'"):
        Rig(geometry, extra={"path": str(tmp_path), "sise": "8MB"})
