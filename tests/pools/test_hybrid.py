"""Hybrid models: SGLang's real host pools under its real hybrid controller, with real files.

One process writes, another reads every byte back. A page whose sidecar is missing, evicted or damaged is a miss.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flexkv_bed.controller import boot, page_hashes
from flexkv_bed.tiny_model import write_config
from flexkv_sglang.identity.epochs import WEIGHTS, Epoch
from models import hybrid_models
from models.hybrid_models import CASES, MODELS, PAGE, PAGES, HybridRig, prompt
from sglang_bed.weight_updater import forget_updates

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

COPIED = {
    ("indexer", "indexer", "layer_first"),
    ("k_only", "indexer", "layer_first"),
    *(("mamba_side_state", "mamba", layout) for _, layout in CASES),
}
"""(model, pool, layout) whose buffers SGLang does not name."""

SIDECARS = [
    ("mamba", "mamba"),
    ("mamba_side_state", "mamba"),
    ("swa", "swa"),
    ("draft", "draft"),
    ("indexer", "indexer"),
    ("k_only", "indexer"),
    ("deepseek_v4", "swa"),
    ("deepseek_v4", "deepseek_v4_c4"),
    ("deepseek_v4", "deepseek_v4_c4_indexer"),
    ("deepseek_v4", "deepseek_v4_c4_state"),
]
LAYOUT = "page_first"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[str]:
    """A storage directory filled by another process that is gone."""
    storage = str(tmp_path_factory.mktemp("storage"))
    run = subprocess.run(
        [sys.executable, hybrid_models.__file__, storage, str(model)],
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == [f"{name}-{layout}" for name, layout in CASES]
    boot(model)
    return storage


@pytest.fixture
def booted(model: Path) -> None:
    boot(model)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_every_byte_of_every_pool_comes_back_in_another_process(
    written: str, name: str, layout: str
) -> None:
    with HybridRig(name, layout, written) as rig:
        fetched = rig.prefetch(prompt(), seed=5)
        assert (fetched.hit_pages, fetched.kv_pages, fetched.wrong) == (PAGES, PAGES, [])
        windows = {n: side.window for n, side in rig.model.sidecars.items() if side.window}
        assert fetched.pool_hits | windows == fetched.pool_hits
        assert fetched.compared >= PAGES
        assert rig.prefetch(prompt(1), seed=5).hit_pages == 0
        for pool_name in rig.model.sidecars:
            how = rig.backend._stores.get(pool_name).pages.how
            assert how == ("flat pages" if (name, pool_name, layout) in COPIED else "zero-copy")


@pytest.mark.parametrize(("name", "pool"), SIDECARS)
@pytest.mark.usefixtures("booted")
def test_a_page_without_its_sidecar_is_a_miss(tmp_path: Path, name: str, pool: str) -> None:
    with HybridRig(name, LAYOUT, str(tmp_path)) as rig:
        assert rig.write(prompt(), seed=5, skip=pool) == PAGES * PAGE  # KV is there
        assert rig.prefetch(prompt(), seed=5).hit_pages == 0
        hashes = page_hashes(prompt(), PAGE)
        assert rig.backend.batch_exists(hashes) == 0  # nor does the call that asks for KV only
        rig.write(prompt(), seed=5)
        fetched = rig.prefetch(prompt(), seed=5)
        assert (fetched.hit_pages, fetched.kv_pages, fetched.wrong) == (PAGES, PAGES, [])
        assert rig.backend.batch_exists(hashes) == PAGES


@pytest.mark.parametrize(("name", "pool"), SIDECARS)
@pytest.mark.usefixtures("booted")
def test_a_sidecar_that_is_evicted_alone_takes_its_pages_along(
    tmp_path: Path, name: str, pool: str
) -> None:
    with HybridRig(name, LAYOUT, str(tmp_path)) as rig:
        rig.write(prompt(), seed=5)
        rig.backend._stores.get(pool).store.clear()
        assert rig.backend._stores.get("kv").store.page_count() == PAGES
        assert rig.prefetch(prompt(), seed=5).hit_pages == 0


@pytest.mark.parametrize(("name", "pool"), SIDECARS)
@pytest.mark.usefixtures("booted")
def test_a_flipped_byte_in_a_sidecar_is_never_delivered(
    tmp_path: Path, name: str, pool: str
) -> None:
    with HybridRig(name, LAYOUT, str(tmp_path)) as rig:
        rig.write(prompt(), seed=5)
        namespace = rig.backend._stores.get(pool).spec.identity.namespace
    for slots in tmp_path.glob(f"{namespace}/*.slots"):
        data = bytearray(slots.read_bytes())
        for offset in range(5, len(data), 4096):
            data[offset] ^= 0x10
        slots.write_bytes(data)
    with HybridRig(name, LAYOUT, str(tmp_path)) as rig:
        fetched = rig.prefetch(prompt(), seed=5)
        assert fetched.wrong == []
        if rig.model.sidecars[pool].window:
            assert fetched.pool_hits[pool] == 0
        else:
            assert fetched.kv_pages == 0


@pytest.mark.usefixtures("booted")
def test_the_hit_ends_where_the_state_of_a_node_was_stored(tmp_path: Path) -> None:
    with HybridRig("mamba", LAYOUT, str(tmp_path)) as rig:
        rig.write(prompt(pages=3), seed=5)
        rig.write(prompt(pages=5), seed=5, skip="mamba")
        assert rig.prefetch(prompt(pages=6), seed=5).hit_pages == 3
        assert rig.prefetch(prompt(pages=2), seed=5).hit_pages == 0
        rig.write(prompt(pages=6), seed=5)
        fetched = rig.prefetch(prompt(pages=6), seed=5)
        assert (fetched.hit_pages, fetched.pool_hits, fetched.wrong) == (6, {"mamba": 1}, [])


@pytest.mark.usefixtures("booted")
def test_states_that_are_pushed_out_by_others_are_misses_and_the_latest_stay(
    tmp_path: Path,
) -> None:
    """Nine prompts, room for some of their states and for all of their KV pages."""
    with HybridRig("mamba", LAYOUT, str(tmp_path), size="8MB", pool_density={"mamba": 0.01}) as rig:
        state = rig.backend._stores.get("mamba").store
        rounds = state.tiers[0].slot_count + 2
        for number in range(rounds):
            rig.write(prompt(number, pages=1), seed=5)
        hits = [rig.prefetch(prompt(number, pages=1), seed=5) for number in range(rounds)]
        assert [fetched.wrong for fetched in hits] == [[]] * rounds
        assert sum(fetched.hit_pages for fetched in hits) == rounds - 2
        assert hits[-1].hit_pages == 1
        assert rig.backend._stores.get("kv").store.page_count() == rounds


@pytest.mark.usefixtures("booted")
def test_the_division_is_remembered_and_the_next_start_opens_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def opened() -> list[str]:
        lines = [r.getMessage() for r in caplog.records if "tier ready" in r.getMessage()]
        caplog.clear()
        return [line.split("pool=")[1].split()[0] for line in lines]

    def slots(rig: HybridRig) -> dict[str, int]:
        names = ("kv", *rig.model.sidecars)
        return {n: rig.backend._stores.get(n).store.tiers[0].slot_count for n in names}

    with caplog.at_level(logging.INFO, logger="flexkv_sglang"):
        with HybridRig("swa", LAYOUT, str(tmp_path)) as rig:
            first = slots(rig)
            assert opened() == ["kv", "kv", "swa"]
            rig.write(prompt(), seed=5)
        with HybridRig("swa", LAYOUT, str(tmp_path)) as rig:
            assert opened() == ["kv", "swa"]
            assert slots(rig) == first
            assert rig.prefetch(prompt(), seed=5).wrong == []
    on_disk = sum(path.stat().st_size for path in tmp_path.rglob("*.slots"))
    assert 0.9 * 16e6 < on_disk <= 16e6
    spaces = {s["pool"]: s for s in map(_fields, tmp_path.rglob("NAMESPACE.json"))}
    assert {claim["name"] for claim in spaces["kv"]["pools"]} == {"kv", "swa"}
    assert "pools" not in spaces["swa"]


@pytest.mark.usefixtures("booted")
def test_without_a_size_the_pools_share_what_one_would_have_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexkv_sglang.backends.slots.space.room.AUTO_SIZE_MAX", 32 << 20)
    taken = []
    for _ in range(3):
        with HybridRig("swa", LAYOUT, str(tmp_path), size=None) as rig:
            names = ("kv", "swa")
            taken.append([rig.backend._stores.get(n).store.tiers[0].slot_count for n in names])
            if len(taken) == 1:
                rig.write(prompt(), seed=5)
            assert rig.prefetch(prompt(), seed=5).hit_pages == PAGES
    assert taken[0] == taken[1] == taken[2]
    on_disk = sum(path.stat().st_size for path in tmp_path.rglob("*.slots"))
    assert 0.7 * (32 << 20) < on_disk <= 32 << 20


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("booted")
def test_attach_after_detach_in_one_process(tmp_path: Path, name: str) -> None:
    with HybridRig(name, LAYOUT, str(tmp_path)) as rig:
        rig.write(prompt(), seed=5)
        extra = dict(rig.controller.storage_config.extra_config)
        rig.controller.detach_storage_backend()
        rig.controller.attach_storage_backend(
            "flexkv", PAGE, "tiny", extra, host_pools=rig.group.entries
        )
        fetched = rig.prefetch(prompt(), seed=5)
        assert (fetched.hit_pages, fetched.kv_pages, fetched.wrong) == (PAGES, PAGES, [])


def test_sglangs_radix_tree_restores_a_window_and_misses_without_it(
    tmp_path: Path, model: Path
) -> None:
    script = Path(hybrid_models.__file__).parents[1] / "sglang_bed" / "unified_tree.py"
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(model)],
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    seen = json.loads(run.stdout.splitlines()[-1])
    assert seen == {
        "backend": "FlexKVStorage",
        "found": [96, 32],  # tokens of six pages, and of the two of the window
        "same": True,
        "lost": [0, 0],
    }


def _fields(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", ["mamba", "draft", "deepseek_v4"])
@pytest.mark.usefixtures("booted")
def test_a_weight_update_moves_every_pool_behind_the_controllers_flush(
    tmp_path: Path, name: str
) -> None:
    """The flush is SGLang's own ``HybridCacheController.reset``, hooked."""
    forget_updates()
    try:
        with HybridRig(name, LAYOUT, str(tmp_path)) as rig:
            assert rig.write(prompt(), seed=5) == PAGES * PAGE
            WEIGHTS.begin()
            WEIGHTS.finish(Epoch("", "n"), clean=False)
            assert rig.prefetch(prompt(), seed=5).hit_pages == 0
            assert rig.write(prompt(), seed=5) == 0
            rig.controller.reset()
            pools = [rig.backend._stores.get(n) for n in ("kv", *rig.model.sidecars)]
            assert [pool.opened_as.epoch for pool in pools] == ["n"] * len(pools)
            assert [pool.store.page_count() for pool in pools] == [0] * len(pools)
            assert rig.prefetch(prompt(), seed=5).hit_pages == 0
            assert rig.write(prompt(), seed=6) == PAGES * PAGE
            fetched = rig.prefetch(prompt(), seed=6)
            assert (fetched.hit_pages, fetched.kv_pages, fetched.wrong) == (PAGES, PAGES, [])
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.slots")) <= 16e6
    finally:
        forget_updates()
