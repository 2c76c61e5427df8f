"""A real server without a host cache, its device pools linked to the storage, beside one with HiCache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flexkv_bed.server import Replica, Settings, reusable_tokens
from flexkv_bed.storage import state, wait_written

pytestmark = [pytest.mark.sglang, pytest.mark.e2e, pytest.mark.slow]

PROMPT = [(7 * number) % 500 + 3 for number in range(600)]
WHOLE = reusable_tokens(len(PROMPT), 16)


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Replica]:
    work = tmp_path_factory.mktemp("linker")
    settings = Settings(
        model=model, storage=work / "pages", log=work / "linker.log", linker=True, backend="flexkv"
    )
    with Replica(settings) as replica:
        replica.wait_ready()
        yield replica


def test_a_prompt_comes_back_after_a_flush_and_after_a_crash_in_a_hicache_replica(
    linked: Replica, model: Path, tmp_path: Path
) -> None:
    storage = linked.settings.storage
    before = state(storage)
    first = linked.generate(PROMPT)
    assert first.computed == len(PROMPT)
    wait_written(storage, before)
    linked.flush_cache()
    again = linked.generate(PROMPT)
    assert (again.output_ids, again.device, again.host) == (first.output_ids, 0, WHOLE)
    linked.kill()
    hicache = Settings(
        model=model, storage=storage, log=tmp_path / "hicache.log", layout="page_first_direct"
    )
    with Replica(hicache) as other:
        other.wait_ready()
        shared = other.generate(PROMPT)
        assert (shared.output_ids, shared.storage) == (first.output_ids, WHOLE)
    assert "Traceback" not in linked.log_text()
