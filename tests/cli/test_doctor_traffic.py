"""``flexkv doctor``: each cause in the traffic, made for real with stores on files, is named first or alone."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from doctor.diagnosis import causes, doctor, facts_of, plain, read, told, write
from doctor.diagnosis import names as page_names
from doctor.recorded_sglang import answers
from flexkv_sglang import FlexKVStorage
from flexkv_sglang.cli.doctor.command import diagnose
from models.plain_pools import Pool, ask, attach, config, hybrid, names, pool_of, put, store_of
from stores.engines import wait_until
from stores.faulty_io import Fault, Faults, FaultyIo

pytestmark = pytest.mark.sglang

CACHED = "sglang:cached_tokens_total"
PROMPTS = "sglang:prompt_tokens_total"
REQUESTS = "sglang:num_requests_total"


@pytest.fixture(autouse=True)
def prompt_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stats files follow at once."""
    monkeypatch.setattr("flexkv_sglang.cache.stats_file.INTERVAL_S", 0.05)


@contextmanager
def asked(path: Path, **extra: Any) -> Iterator[FlexKVStorage]:
    """A store that wrote 6 pages and was asked for 6 others."""
    with closing(plain(path, **extra)) as storage:
        write(storage, 6)
        assert storage.batch_exists(page_names(6, seed=1)) == 0
        assert told(path, asked_pages=6, write_pages=6)
        yield storage


def test_a_good_hit_rate_is_healthy(tmp_path: Path) -> None:
    with closing(plain(tmp_path)) as storage:
        write(storage, 6)
        assert storage.batch_exists(page_names(6)) == 6
        assert all(read(storage, 6))
        assert told(tmp_path, asked_pages=6, read_pages=6)
        assert doctor(tmp_path) == {}
        assert facts_of(tmp_path).hit_rate == 1.0
        assert doctor(tmp_path, answers(tmp_path, key=True)) == {}


def test_nothing_written_names_the_policy_of_the_server(tmp_path: Path) -> None:
    with closing(plain(tmp_path)):
        found = doctor(tmp_path)
        assert causes(found) == ["nothing_written"]
        assert "write_back" in found["nothing_written"].remedy
        for policy, word in (
            ("write_back", "only when host memory evicts it"),
            ("write_through_selective", "from its second use on"),
            ("write_through", "see the server's log"),
        ):
            found = doctor(tmp_path, answers(tmp_path, {"hicache_write_policy": policy}))
            assert causes(found) == ["nothing_written"]
            assert word in found["nothing_written"].remedy
            assert f"hicache_write_policy is {policy}" in found["nothing_written"].evidence


def test_nothing_asked_is_told_from_sglangs_metrics(tmp_path: Path) -> None:
    with closing(plain(tmp_path)) as storage:
        write(storage, 6)
        assert told(tmp_path, write_pages=6)
        found = doctor(tmp_path)
        assert causes(found) == ["nothing_asked"]
        assert "prefetch_threshold, 256 unless configured" in found["nothing_asked"].remedy
        # As recorded: device memory served 688 of 1327 prompt tokens.
        found = doctor(tmp_path, answers(tmp_path))
        assert causes(found) == ["served_above"]
        assert "device memory served 688" in found["served_above"].evidence
        none = {CACHED: 0}
        short = answers(tmp_path, extra={"prefetch_threshold": 512}, metrics={**none, PROMPTS: 400})
        found = doctor(tmp_path, short)
        assert causes(found) == ["nothing_asked"]
        assert found["nothing_asked"].title == "Prompts are shorter than prefetch_threshold"
        assert "512 tokens or more" in found["nothing_asked"].remedy
        idle = answers(tmp_path, metrics={**none, REQUESTS: 1, PROMPTS: 4})
        assert doctor(tmp_path, idle)["nothing_asked"].title.startswith("There was no request yet")


def test_the_request_that_sglang_warms_up_with_is_no_traffic(tmp_path: Path) -> None:
    """It asks for a page or two that no server has stored."""
    warm = answers(tmp_path, metrics={CACHED: 0, REQUESTS: 1, PROMPTS: 27})
    with asked(tmp_path):
        assert causes(doctor(tmp_path, warm)) == ["nothing_asked"]


def test_prompts_that_differ_and_what_device_memory_still_serves(tmp_path: Path) -> None:
    with asked(tmp_path):
        found = doctor(tmp_path)
        assert causes(found) == ["prompts_differ"]
        assert "found 0 of 6 pages asked for; 6 are stored" in found["prompts_differ"].evidence
        assert "--enable-metrics" in found["prompts_differ"].remedy
        assert causes(doctor(tmp_path, answers(tmp_path))) == ["served_above"]
        found = doctor(tmp_path, answers(tmp_path, metrics={CACHED: 3}))
        assert causes(found) == ["prompts_differ"]
        assert "--enable-metrics" not in found["prompts_differ"].remedy


def test_pages_that_were_cleared(tmp_path: Path) -> None:
    with closing(plain(tmp_path)) as storage:
        write(storage, 6)
        storage.clear()
        assert storage.batch_exists(page_names(6)) == 0
        assert told(tmp_path, asked_pages=6, clears=1)
        found = doctor(tmp_path)
    assert causes(found) == ["prompts_differ"]
    assert "0 are stored, cleared 1 time" in found["prompts_differ"].evidence


class OtherType(Pool):
    dtype = "torch.float8_e4m3fn"


def test_two_namespaces_name_the_fields_the_closest_pair_first(tmp_path: Path) -> None:
    with closing(plain(tmp_path)) as first, asked(tmp_path, model_id="other"):
        write(first, 3)
        with closing(attach(config(tmp_path, model_id="third"), OtherType(page_size=8), {})) as far:
            write(far, 2)
            found = doctor(tmp_path)
    assert causes(found) == ["other_namespace", "prompts_differ"]
    assert "3 namespaces" in found["other_namespace"].title
    evidence = found["other_namespace"].evidence.split("; ")
    assert re.search(
        r" differ in model \(id:(m|other) and id:(other|m): other weights", evidence[0]
    )
    for text in ("page_size (", "--page-size", "dtype ("):
        assert text in found["other_namespace"].evidence
        assert text not in evidence[0]


def test_ranks_of_one_server_are_not_two_namespaces(tmp_path: Path) -> None:
    stores = [attach(config(tmp_path, rank, 2), Pool(seed=1), {}) for rank in (0, 1)]
    for storage in stores:
        write(storage, 3)
    assert len({path.parent for path in tmp_path.rglob("*.lock")}) == 2
    assert "other_namespace" not in doctor(tmp_path)
    for storage in stores:
        storage.close()


def test_pages_with_less_verification_than_a_replica_asks_for(tmp_path: Path) -> None:
    with closing(plain(tmp_path, verify="off")) as lax, closing(plain(tmp_path)) as strict:
        write(lax, 6)
        write(strict, 1, seed=5)
        assert strict.batch_exists(page_names(6)) == 0
        assert told(tmp_path, asked_pages=6)
        found = doctor(tmp_path)
        assert causes(found) == ["verify_level"]
        assert "6 with verify=off, 1 with verify=full; 6 do not" in found["verify_level"].evidence
        config_says = answers(tmp_path, extra={"verify": "off"}, metrics={CACHED: 3})
        assert causes(doctor(tmp_path, config_says)) == ["prompts_differ"]


def test_a_hybrid_model_that_lacks_the_pages_of_one_pool(tmp_path: Path) -> None:
    with closing(hybrid(tmp_path)) as storage:
        put(storage, names(3), but="mamba")
        assert ask(storage, names(3)).kv_hit_pages == 0
        assert wait_until(lambda: causes(doctor(tmp_path)) == ["hybrid_pool"])  # each pool reports
        found = doctor(tmp_path)
        assert "'mamba'" in found["hybrid_pool"].title
        assert "pool mamba has 0 pages" in found["hybrid_pool"].evidence
        assert "KV has 3 pages, found 0 of 3" in found["hybrid_pool"].evidence


def test_a_hybrid_model_with_a_pool_that_could_not_be_opened(tmp_path: Path) -> None:
    with closing(hybrid(tmp_path, size=3 * 4096)) as storage:
        assert ask(storage, names(2)).kv_hit_pages == 0
        assert wait_until(lambda: "hybrid_pool" in causes(doctor(tmp_path)))
        found = doctor(tmp_path)
    assert "'mamba'" in found["hybrid_pool"].title
    assert "it is not stored: size: " in found["hybrid_pool"].evidence
    assert "has no files" in found["hybrid_pool"].evidence


def test_a_hybrid_model_with_a_pool_that_cannot_be_stored(tmp_path: Path) -> None:
    """The log said it once, at the start; NAMESPACE.json of the KV pages says it on."""
    with closing(attach(config(tmp_path), Pool(seed=1), {"mamba": object()})) as storage:
        assert storage.batch_exists(names(2)) == 0
        assert wait_until(lambda: "hybrid_pool" in causes(doctor(tmp_path)))
        found = doctor(tmp_path)
    assert "'mamba'" in found["hybrid_pool"].title
    assert found["hybrid_pool"].evidence.startswith("it is not stored: object: AttributeError")


def test_a_healthy_hybrid_model(tmp_path: Path) -> None:
    with closing(hybrid(tmp_path)) as storage:
        put(storage, names(3))
        assert ask(storage, names(3)).kv_hit_pages == 3
        assert told(tmp_path, asked_pages=3, found_pages=3)
        assert wait_until(lambda: doctor(tmp_path) == {})


def test_a_disk_that_changes_bytes(tmp_path: Path) -> None:
    with closing(plain(tmp_path)) as storage:
        write(storage, 4)
        assert storage.batch_exists(page_names(4)) == 4
        (slots,) = tmp_path.rglob("*.slots")
        with slots.open("r+b") as file:
            os.pwrite(file.fileno(), b"\0" * 64, 4096)
            os.fsync(file.fileno())
        assert read(storage, 4) != [True] * 4
        assert told(tmp_path, corrupt_pages=1)
        found = doctor(tmp_path)
    assert causes(found) == ["corrupt"]
    assert found["corrupt"].evidence.startswith("1 page failed the checksum and was dropped")


def test_reads_that_come_too_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexkv_sglang.integration.storage.READ_SECONDS_MIN", 0.0)
    with closing(plain(tmp_path)) as storage:
        storage.set_prefetch_timeout(0.0, 0.0)
        write(storage, 4)
        assert storage.batch_exists(page_names(4)) == 4
        assert read(storage, 4) == [False] * 4
        assert told(tmp_path, read_late_pages=4)
        found = doctor(tmp_path)
    assert causes(found) == ["late"]
    assert found["late"].evidence.startswith("4 pages of 4 found came too late")


def _spoil(storage: FlexKVStorage, direction: str, fault: Fault) -> None:
    """The next transfer of a real store fails so."""
    side = store_of(storage, "kv").tiers[0]._mover._directions[direction]
    faults = Faults(random.Random(3), next=fault)
    kind = store_of(storage, "kv").tiers[0]._tier.stores[0].slots.mode.engine
    side._engines[kind] = FaultyIo(side.engine(kind), faults)


def test_a_disk_that_fails_now_and_then(tmp_path: Path) -> None:
    with closing(plain(tmp_path)) as storage:
        write(storage, 4)
        assert storage.batch_exists(page_names(4)) == 4
        _spoil(storage, "write", Fault.EIO)
        indices = pool_of(storage, "kv").indices(*range(4))
        assert not all(storage.batch_set_v1(page_names(4, seed=1), indices))
        assert wait_until(lambda: causes(doctor(tmp_path)) == ["failures"])
        assert "write_failed_pages" in doctor(tmp_path)["failures"].evidence


def test_a_tier_that_is_too_small(tmp_path: Path) -> None:
    with closing(plain(tmp_path, size=64 * 4096)) as storage:
        for seed in range(20):
            write(storage, 16, seed)
        for seed in range(8):
            storage.batch_exists(page_names(16, seed))
        assert told(tmp_path, asked_pages=128)
        facts = facts_of(tmp_path)
        found = {finding.what: finding for finding in diagnose(facts)}
        assert facts.hit_rate is not None
        assert facts.hit_rate < 0.5
    assert causes(found) == ["too_small"]
    evidence = found["too_small"].evidence
    assert f"evicted {facts.count('evicted_pages')}" in evidence
    assert "64 slots, 256.0 KiB" in evidence
    assert "unused for at most 1.0 s" in evidence or facts.count("evicted_pages") == 0


def test_what_sglang_found_and_did_not_use(tmp_path: Path) -> None:
    with closing(plain(tmp_path)) as storage:
        write(storage, 6)
        assert storage.batch_exists(page_names(6)) == 6
        assert told(tmp_path, asked_pages=6)
        series = (
            'sglang:storage_prefetch_unfulfilled_tokens_total{attn_cp_rank="0",attn_cp_size="1",'
        )
        series += 'dp_rank="0",pp_rank="0",pp_size="1",reason="below_threshold"'
        found = doctor(tmp_path, answers(tmp_path, metrics={series: 96}))
    assert causes(found) == ["hits_not_used"]
    assert "below_threshold 96" in found["hits_not_used"].evidence
