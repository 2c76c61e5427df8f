"""Stock SGLang servers under one served model name: other weights, dtype or layout never meet a page of ours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flexkv_bed.server import Answer, Replica, ServerFailedError, Settings
from flexkv_bed.storage import state, wait_written
from flexkv_bed.tiny_model import make_tiny_model
from sglang_bed.prompts import REUSABLE, assert_from_storage, assert_recomputed, prompt
from stores.command import flexkv

pytestmark = [pytest.mark.sglang, pytest.mark.e2e]

NAME = ("--served-model-name", "one-name", "--admin-api-key", "bed")


def computed(replica: Replica, seed: int) -> Answer:
    """Nothing came from storage; what was computed is there when this returns."""
    before = state(replica.settings.storage)
    answer = replica.generate(prompt(seed))
    assert (answer.device, answer.host, answer.storage) == (0, 0, 0)
    wait_written(replica.settings.storage, before)
    return answer


def again_from_storage(replica: Replica, seed: int, expected: Answer) -> None:
    replica.flush_cache()
    assert_from_storage(replica, seed, expected)


def test_one_served_name_and_several_models(tmp_path: Path, model: Path) -> None:
    other = make_tiny_model(tmp_path / "other", seed=1)
    settings = Settings(
        model=model, storage=tmp_path / "pages", log=tmp_path / "server.log", arguments=NAME
    )
    with Replica(settings) as replica:
        replica.wait_ready()
        first = computed(replica, 1)
        _refused_update(replica, tmp_path / "nowhere", first)
        _updates(replica, model, other, first)
        replica.terminate()

    for mutated in (
        replace(settings, model=other),
        replace(settings, arguments=(*NAME, "--dtype", "float16")),
        replace(settings, layout="page_first_direct"),
    ):
        with Replica(mutated) as replica:
            replica.wait_ready()
            computed(replica, 1)
            replica.terminate()

    found = flexkv("stats", settings.storage, "--json").json["namespaces"]
    assert len(found) == 4, "each in a namespace of its own"
    assert all(owner["pages"] for item in found for owner in item["owners"])
    assert len({item["identity"]["model"] for item in found}) == 2


def _refused_update(replica: Replica, nowhere: Path, first: Answer) -> None:
    with pytest.raises(ServerFailedError, match="Failed to get"):
        replica.update_weights(nowhere)
    again_from_storage(replica, 1, first)


def _updates(replica: Replica, model: Path, other: Path, first: Answer) -> None:
    """To another checkpoint and back; then one that was flushed before, and one that is not flushed at all."""
    replica.update_weights(other)
    second = computed(replica, 1)
    assert second.output_ids != first.output_ids
    again_from_storage(replica, 1, second)

    replica.update_weights(model)
    assert_recomputed(replica, 1, first)

    replica.flush_cache()
    replica.update_weights(other, flush=False)
    third = computed(replica, 2)
    again_from_storage(replica, 2, third)

    replica.update_weights(model, flush=False)
    stale = replica.generate(prompt(2))
    assert stale.device + stale.host >= REUSABLE, "SGLang serves KV cache of the other weights"
    at_rest = state(replica.settings.storage)
    replica.generate(prompt(3))
    assert state(replica.settings.storage) == at_rest
    replica.flush_cache()
    fresh = computed(replica, 2)
    assert fresh.output_ids != third.output_ids
    computed(replica, 1)
