"""Stock SGLang servers that are stopped and killed: their pages come back, damaged ones never do."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexkv_bed.server import Replica, Settings, flexkv_extra
from flexkv_bed.storage import files, flip_bytes, state, wait_written
from sglang_bed.prompts import PAGE, REUSABLE, assert_from_storage, assert_recomputed, cold

pytestmark = [pytest.mark.sglang, pytest.mark.e2e]


def test_pages_survive_sigterm_and_sigkill_and_damaged_ones_are_recomputed(
    tmp_path: Path, model: Path
) -> None:
    pages = tmp_path / "pages"
    replica = Replica(Settings(model=model, storage=pages, log=tmp_path / "server.log"))
    with replica:
        replica.wait_ready()
        first = cold(replica, 1)
        replica.terminate()

        replica.start()
        replica.wait_ready()
        assert_from_storage(replica, 1, first)
        second = cold(replica, 2)
        replica.kill()

        replica.start()
        replica.wait_ready()
        assert_from_storage(replica, 1, first)
        assert_from_storage(replica, 2, second)
        replica.kill()

        damaged = sum(flip_bytes(path) for path in files(pages) if path.suffix == ".slots")
        assert damaged >= 2 * REUSABLE // PAGE
        replica.start()
        replica.wait_ready()
        before = state(pages)
        assert_recomputed(replica, 1, first)
        assert "failed their checksum" in replica.log_text()
        wait_written(pages, before)  # what was dropped is stored anew
        replica.flush_cache()
        assert_from_storage(replica, 1, first)


def test_tensor_parallel_ranks_keep_their_shards_apart(tmp_path: Path, model: Path) -> None:
    settings = Settings(
        model=model,
        storage=tmp_path / "pages",
        log=tmp_path / "server.log",
        extra={**flexkv_extra(tmp_path / "pages"), "prefetch_timeout_base": 2.5},
        arguments=("--tp-size", "2"),
        environment={"SGLANG_CPU_OMP_THREADS_BIND": "0|0"},
    )
    with Replica(settings) as replica:
        replica.wait_ready()
        first = cold(replica, 1)
        assert len(list(settings.storage.glob("*/NAMESPACE.json"))) == 2
        assert replica.log_text().count("SGLang waits 2.5 s and 0.25 s per 1024 tokens") == 2
        replica.kill()
        replica.start()
        replica.wait_ready()
        assert_from_storage(replica, 1, first)
