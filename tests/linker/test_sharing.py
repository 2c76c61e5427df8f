"""A linker replica and a HiCache replica on one directory: each reads what the other wrote, byte for byte.

SGLang's own host pool (``page_first_direct``), controller and copy routines are on the HiCache side.
"""

from __future__ import annotations

from pathlib import Path

import pytest

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
from models.plain_pools import names
from sglang_bed.linker_bed import SIZE, Side, same, side
from stores.engines import wait_until

pytestmark = [pytest.mark.sglang]

PAGES = 4
GEOMETRIES = [
    Geometry(layout="page_first_direct"),
    Geometry(layout="page_first_direct", page_size=64, size_tokens=2048, layers=5),
    Geometry(layout="page_first_direct", heads=1, head_dim=24),
    Geometry(kind="mha_asymmetric", layout="page_first_direct"),
    Geometry(kind="mla", layout="page_first_direct"),
    Geometry(kind="mla", layout="page_first_direct", page_size=64, size_tokens=2048),
]
NAMES = [f"{g.kind}-{g.page_size}-{g.head_dim}" for g in GEOMETRIES]


@pytest.fixture(scope="module", autouse=True)
def _booted(tmp_path_factory: pytest.TempPathFactory) -> None:
    boot(write_config(tmp_path_factory.mktemp("model")))


def rig(geometry: Geometry, place: Path) -> Rig:
    return Rig(geometry, extra={"path": str(place), "size": SIZE})


def prompt(geometry: Geometry) -> list[int]:
    return token_ids(PAGES * geometry.page_size)


def namespace(replica: Rig | Side) -> str:
    owner = replica.backend if isinstance(replica, Rig) else replica.linker
    return str(owner._stores.get("kv").spec.identity.fields())


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=NAMES)
def test_a_linker_reads_what_hicache_wrote(tmp_path: Path, geometry: Geometry) -> None:
    tokens = prompt(geometry)
    with rig(geometry, tmp_path) as hicache:
        assert write_pages(hicache, tokens, seed=5).completed_tokens == len(tokens)
        told = namespace(hicache)
    with side(tmp_path, geometry) as linker:
        assert namespace(linker) == told
        linker.poison()
        keys = page_hashes(tokens, geometry.page_size)
        assert linker.find(keys) == list(range(1, PAGES + 1))
        assert linker.restore(keys, 3, 1, 7, 2)
        assert same(
            linker.rows(3, 1, 7, 2), expected_rows(_shape(geometry, linker), len(tokens), 5)
        )


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=NAMES)
def test_hicache_reads_what_a_linker_wrote(tmp_path: Path, geometry: Geometry) -> None:
    tokens = prompt(geometry)
    with side(tmp_path, geometry) as linker:
        wanted = linker.rows(3, 1, 7, 2)
        assert linker.store(page_hashes(tokens, geometry.page_size), 3, 1, 7, 2)
    with rig(geometry, tmp_path) as hicache:
        fetched = prefetch_pages(hicache, tokens)
        assert fetched.hit_tokens == fetched.completed_tokens == len(tokens)
        assert fetched.same_bytes(wanted)


def test_other_layouts_are_other_pages(tmp_path: Path) -> None:
    tokens = prompt(Geometry())
    with rig(Geometry(layout="page_first"), tmp_path) as hicache:
        write_pages(hicache, tokens, seed=5)
    with side(tmp_path, Geometry()) as linker:
        assert linker.find(page_hashes(tokens, 16)) == []


def test_a_neighbours_pages_are_fetched_in_the_background_and_found_by_a_later_lookup(
    tmp_path: Path,
) -> None:
    geometry = Geometry(layout="page_first_direct")
    tokens = prompt(geometry)
    keys = page_hashes(tokens, geometry.page_size)
    with rig(geometry, tmp_path) as hicache, side(tmp_path, geometry) as linker:
        write_pages(hicache, tokens, seed=5)
        assert linker.find(keys) == []  # not ours: it could be gone when it is loaded
        assert wait_until(lambda: len(linker.find(keys)) == PAGES, 20.0)
        hicache.backend.clear()  # the neighbour may forget its pages now
        assert linker.restore(keys, 3, 1, 7, 2)
        assert same(linker.rows(3, 1, 7, 2), expected_rows(hicache, len(tokens), 5))
        assert linker.linker.metrics.snapshot()["linker_promoted_pages"] == PAGES
        assert linker.find(names(2)) == []


def _shape(geometry: Geometry, linker: Side) -> Rig:
    """Enough of a ``Rig`` for ``expected_rows``."""
    shape = object.__new__(Rig)
    shape.geometry, shape.device = geometry, linker.device
    return shape
