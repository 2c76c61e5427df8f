"""SGLang's real weight updater and controller, hooked by the plug-in: old pages miss, new ones do not mix.

The model is none; that real weights end up behind it is shown by ``tests/e2e/test_identity.py``.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flexkv_bed.controller import (
    Geometry,
    Rig,
    boot,
    expected_rows,
    prefetch_pages,
    token_ids,
    write_pages,
)
from flexkv_sglang.identity.epochs import WEIGHTS, Epoch
from flexkv_sglang.identity.fingerprint import checkpoint
from flexkv_sglang.integration import weight_updates
from models.checkpoints import write_checkpoint
from models.plain_pools import stored
from sglang_bed.weight_updater import Runner, Updates, forget_updates
from stores.engines import wait_until

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

TOKENS = token_ids(4 * 16)
SIZE = 4 << 20


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[Path, Path]:
    return write_checkpoint(tmp_path / "a", fill=1), write_checkpoint(tmp_path / "b", fill=2)


@pytest.fixture
def updates(tmp_path: Path, checkpoints: tuple[Path, Path]) -> Iterator[Updates]:
    forget_updates()
    boot(checkpoints[0], load_format="auto")
    rig = make_rig(tmp_path)
    with rig:
        yield Updates(rig)
    forget_updates()


@pytest.fixture(autouse=True)
def barriers(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's own barriers go to no group here: there is one rank."""
    monkeypatch.setattr(dist, "barrier", lambda *_args, **_kwargs: None)


def make_rig(place: Path) -> Rig:
    return Rig(Geometry(), extra={"path": str(place / "pages"), "size": str(SIZE)})


def hit(rig: Rig, seed: int) -> bool:
    """All of ``TOKENS`` with the bytes of ``seed``; False: nothing. Anything between is wrong."""
    fetched = prefetch_pages(rig, TOKENS)
    assert fetched.hit_tokens in (0, len(TOKENS))
    if not fetched.hit_tokens:
        return False
    assert fetched.same_bytes(expected_rows(rig, len(TOKENS), seed))
    return True


def slot_bytes(place: Path) -> int:
    return sum(path.stat().st_size for path in (place / "pages").rglob("*.slots"))


def folders(place: Path) -> list[dict[str, Any]]:
    found = sorted((place / "pages").glob("*/NAMESPACE.json"))
    return [json.loads(path.read_text()) for path in found]


def test_another_checkpoint_from_disk_is_another_namespace_and_the_space_is_reclaimed(
    updates: Updates, tmp_path: Path, checkpoints: tuple[Path, Path]
) -> None:
    rig, (a, b) = updates.rig, checkpoints
    write_pages(rig, TOKENS, seed=1)
    assert hit(rig, 1)
    assert updates.disk(b).success
    assert not hit(rig, 1)
    write_pages(rig, TOKENS, seed=2)
    assert hit(rig, 2)
    assert slot_bytes(tmp_path) <= SIZE
    assert updates.disk(a).success
    assert not hit(rig, 1), "this process's pages of the first weights are deleted"
    assert slot_bytes(tmp_path) <= SIZE


def test_replicas_that_load_the_same_checkpoint_share_with_those_started_on_it(
    updates: Updates, tmp_path: Path, checkpoints: tuple[Path, Path]
) -> None:
    _, b = checkpoints
    updates.disk(b)
    write_pages(updates.rig, TOKENS, seed=2)
    boot(b, load_format="auto")
    forget_updates()
    with make_rig(tmp_path) as other:
        assert hit(other, 2)


def test_weights_of_one_checkpoint_run_with_the_configuration_of_the_other(
    updates: Updates, tmp_path: Path, checkpoints: tuple[Path, Path]
) -> None:
    """An update loads weights only. A server started on ``b`` would have its configuration as well."""
    _, b = checkpoints
    (b / "config.json").write_text((b / "config.json").read_text().replace("4096", "8192"))
    updates.disk(b)
    write_pages(updates.rig, TOKENS, seed=2)
    boot(b, load_format="auto")
    forget_updates()
    with make_rig(tmp_path) as other:
        assert not hit(other, 2)


def test_the_same_checkpoint_again_keeps_its_pages(
    updates: Updates, checkpoints: tuple[Path, Path]
) -> None:
    write_pages(updates.rig, TOKENS, seed=1)
    updates.disk(checkpoints[0])
    assert hit(updates.rig, 1)


def test_a_refused_update_keeps_everything(
    updates: Updates, checkpoints: tuple[Path, Path]
) -> None:
    write_pages(updates.rig, TOKENS, seed=1)
    updates.runner.answer = False, "Failed to get weights iterator: no such directory."
    assert not updates.disk(checkpoints[1]).success
    assert hit(updates.rig, 1)


def test_a_draft_model_without_files_does_not_undo_the_update_of_the_target(
    updates: Updates, checkpoints: tuple[Path, Path]
) -> None:
    draft = Runner()
    draft.answer = False, "Failed to get weights iterator: no such directory."
    write_pages(updates.rig, TOKENS, seed=1)
    assert not Updates(updates.rig, draft).disk(checkpoints[1]).success
    assert not hit(updates.rig, 1)
    write_pages(updates.rig, TOKENS, seed=2)
    assert hit(updates.rig, 2)
    assert WEIGHTS.epoch.nonce


def test_a_message_inside_a_message_is_no_refusal(
    updates: Updates, checkpoints: tuple[Path, Path]
) -> None:
    updates.runner.answer = False, "Failed to update weights: Failed to get a tensor."
    updates.disk(checkpoints[1])
    assert WEIGHTS.epoch.nonce


def test_requests_outside_of_a_session_are_refused_and_keep_everything(updates: Updates) -> None:
    write_pages(updates.rig, TOKENS, seed=1)
    assert not updates.tensor().success
    assert not updates.end().success
    assert hit(updates.rig, 1)
    assert updates.begin().success
    assert not updates.begin().success
    assert not hit(updates.rig, 1)


def test_an_update_that_failed_half_way_is_not_shared(
    updates: Updates, tmp_path: Path, checkpoints: tuple[Path, Path]
) -> None:
    write_pages(updates.rig, TOKENS, seed=1)
    updates.runner.answer = False, "Failed to update weights: out of memory."
    updates.disk(checkpoints[1])
    assert not hit(updates.rig, 1)
    updates.flush()
    write_pages(updates.rig, TOKENS, seed=9)
    assert hit(updates.rig, 9)
    for started_on in checkpoints:
        boot(started_on, load_format="auto")
        forget_updates()
        with make_rig(tmp_path) as other:
            assert not hit(other, 9)


def test_a_checkpoint_rewritten_while_it_is_loaded_is_not_shared(
    updates: Updates, checkpoints: tuple[Path, Path]
) -> None:
    updates.runner.meanwhile = lambda: _rewrite(checkpoints[1])
    updates.disk(checkpoints[1])
    assert WEIGHTS.epoch.content == ""
    assert WEIGHTS.epoch.nonce


def test_without_a_flush_old_kv_cache_is_never_stored_under_the_new_name(
    updates: Updates, checkpoints: tuple[Path, Path]
) -> None:
    rig = updates.rig
    kept = rig.slots.alloc(64)  # KV cache of the old weights, in device memory
    updates.disk(checkpoints[1], flush=False)
    assert not WEIGHTS.settled
    assert write_pages(rig, TOKENS, seed=1).completed_tokens == 0
    rig.slots.free(kept)
    updates.flush()
    assert not hit(rig, 1)
    write_pages(rig, TOKENS, seed=2)
    assert hit(rig, 2)


def test_a_flush_refused_by_running_requests_leaves_storage_off_and_the_name_of_the_weights(
    updates: Updates, checkpoints: tuple[Path, Path]
) -> None:
    """SGLang calls that a failed update, but the weights are those of the checkpoint."""
    updates.busy = True
    assert not updates.disk(checkpoints[1]).success
    assert write_pages(updates.rig, TOKENS, seed=1).completed_tokens == 0
    updates.busy = False
    updates.flush()
    assert write_pages(updates.rig, TOKENS, seed=2).completed_tokens == len(TOKENS)
    assert WEIGHTS.epoch == Epoch(checkpoint(checkpoints[1]).weights or "")


def test_trainers_that_flush_before_they_send_the_weights_need_no_second_flush(
    updates: Updates,
) -> None:
    updates.flush()
    updates.begin()
    updates.tensor(flush=False)
    updates.end()
    assert write_pages(updates.rig, TOKENS, seed=1).completed_tokens == len(TOKENS)


@pytest.mark.parametrize("kind", ["tensor", "ipc", "release"])
def test_weights_without_a_name_are_never_found_again(
    updates: Updates, tmp_path: Path, kind: str
) -> None:
    rig, seen = updates.rig, set()
    if kind == "release":
        boot(tmp_path / "a", load_format="auto", enable_memory_saver=True)
    write_pages(rig, TOKENS, seed=1)
    for round_ in (2, 3):
        if kind == "ipc":
            updates.ipc()
        elif kind == "tensor":
            assert updates.begin().success
            assert updates.tensor().success
            assert write_pages(rig, TOKENS, seed=8).completed_tokens == 0, "half of the weights"
            assert updates.end().success
        else:
            updates.release("weights", "kv_cache")
        updates.flush()
        assert not hit(rig, round_ - 1)
        write_pages(rig, TOKENS, seed=round_)
        assert hit(rig, round_)
        seen.add(stored(rig.backend).spec.identity.namespace)
        assert slot_bytes(tmp_path) <= SIZE
    assert len(seen) == 2
    assert len(folders(tmp_path)) <= 2, "empty folders of weights that are gone do not pile up"


def test_files_of_weights_that_died_with_their_process_are_removed_at_the_next_start(
    updates: Updates, tmp_path: Path
) -> None:
    updates.ipc()
    write_pages(updates.rig, TOKENS, seed=2)
    updates.rig.close()  # as a killed process would: its files stay
    left = slot_bytes(tmp_path)
    assert left
    forget_updates()
    with make_rig(tmp_path) as rig:
        assert not hit(rig, 2)
        assert slot_bytes(tmp_path) == left


def test_attaching_after_an_update_does_not_open_the_old_namespace(
    updates: Updates, tmp_path: Path
) -> None:
    write_pages(updates.rig, TOKENS, seed=1)
    updates.rig.close()
    updates.ipc()
    with make_rig(tmp_path) as late:
        assert not hit(late, 1)
        write_pages(late, TOKENS, seed=2)
        assert hit(late, 2)
        assert stored(late.backend).spec.identity.epoch


def test_attaching_before_the_flush_that_an_update_needs_stores_nothing(
    updates: Updates, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    updates.rig.close()
    updates.busy = True
    updates.ipc()
    with caplog.at_level(logging.WARNING), make_rig(tmp_path) as late:
        assert write_pages(late, TOKENS, seed=1).completed_tokens == 0
        assert "until the cache is flushed" in caplog.text
        late.controller.reset()
        assert write_pages(late, TOKENS, seed=2).completed_tokens == len(TOKENS)


def test_a_neighbour_on_the_old_weights_keeps_its_pages(
    updates: Updates, tmp_path: Path, checkpoints: tuple[Path, Path]
) -> None:
    with make_rig(tmp_path) as neighbour:
        write_pages(neighbour, TOKENS, seed=1)
        assert wait_until(lambda: hit(updates.rig, 1))
        WEIGHTS.detach(neighbour.backend)  # it stands for another process
        updates.disk(checkpoints[1])
        assert not hit(updates.rig, 1)
        write_pages(updates.rig, TOKENS, seed=2)
        assert hit(neighbour, 1)


def test_calls_in_flight_during_updates_give_right_pages_or_none(
    updates: Updates, checkpoints: tuple[Path, Path]
) -> None:
    """Readers and writers of the real interface run on while namespaces change; contents name their weights."""
    backend, rig = updates.rig.backend, updates.rig
    hashes = [f"{i:064x}" for i in range(8)]
    page = rig.geometry.page_size
    rows = torch.arange(8 * page)
    generation, stop, wrong = [0], threading.Event(), []
    target = torch.arange(8 * page, 16 * page)

    def work() -> None:
        while not stop.is_set():
            if all(backend.batch_get_v1(hashes, target)):
                got = set(rig.host.kv_buffer[:, target].view(torch.uint8).flatten().tolist())
                if len(got) != 1 or not got <= {generation[0], max(0, generation[0] - 1)}:
                    wrong.append((got, generation[0]))
            backend.batch_exists(hashes)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for number in range(1, 7):
            WEIGHTS.begin()
            generation[0] = number
            rig.host.kv_buffer[:, rows] = 0
            rig.host.kv_buffer.view(torch.uint8)[:, rows] = number
            WEIGHTS.finish(Epoch(f"weights {number}"), clean=True)
            assert all(backend.batch_set_v1(hashes, rows))
            assert backend.batch_exists(hashes) == len(hashes)
    finally:
        stop.set()
        thread.join()
    assert not wrong
    exceptions = {k: v for k, v in backend.metrics.snapshot().items() if "exceptions" in k}
    assert not exceptions


def test_a_hook_that_fails_lets_the_update_through_and_storage_stays_off(
    updates: Updates, monkeypatch: pytest.MonkeyPatch, checkpoints: tuple[Path, Path]
) -> None:
    def broken(*_args: Any) -> None:
        raise RuntimeError("planted")

    write_pages(updates.rig, TOKENS, seed=1)
    monkeypatch.setattr(weight_updates, "agree", broken)
    assert updates.disk(checkpoints[1]).success
    assert not hit(updates.rig, 1)
    updates.flush()
    assert write_pages(updates.rig, TOKENS, seed=2).completed_tokens == 0
    monkeypatch.undo()
    monkeypatch.setattr(dist, "barrier", lambda *_args, **_kwargs: None)
    assert updates.disk(checkpoints[1]).success
    assert write_pages(updates.rig, TOKENS, seed=3).completed_tokens == len(TOKENS)


def test_an_update_that_raises_is_raised_and_leaves_storage_off(
    updates: Updates, checkpoints: tuple[Path, Path]
) -> None:
    def broken() -> None:
        raise RuntimeError("planted")

    updates.runner.meanwhile = broken
    with pytest.raises(RuntimeError, match="planted"):
        updates.disk(checkpoints[1])
    assert not WEIGHTS.settled


def test_memory_that_keeps_its_weights_may_be_released(updates: Updates) -> None:
    write_pages(updates.rig, TOKENS, seed=1)
    updates.release("kv_cache")
    assert hit(updates.rig, 1)


def _rewrite(directory: Path) -> None:
    write_checkpoint(directory, fill=7)
