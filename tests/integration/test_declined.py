"""Pages that the eviction policy declines, as SGLang and the operator see them. Real files."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np

from flexkv_sglang.cache.eviction.reuse_density import ReuseDensity
from flexkv_sglang.cache.eviction.reuse_model import BUCKETS, CLASSES, bucket_of
from stores.engines import keys, open_engine, page_memory, soon

PAGE = 8192


def test_declined_pages_are_answered_true_counted_and_not_written(tmp_path: Path) -> None:
    with closing(open_engine(tmp_path, PAGE, 64 * PAGE)) as engine:
        policy = engine._pages.index._policy
        assert isinstance(policy, ReuseDensity)
        stored = 0
        for seed in range(40):  # until nothing is free: put answers True, and something is evicted
            _, buffers = page_memory(2, PAGE, seed=seed)
            assert engine.put(keys(2, seed), buffers, None, soon()) == [True, True]
            if engine.page_count() == stored:
                break
            stored = engine.page_count()
        policy._reuse.observed[bucket_of(3000)] += 500  # what is old is about to be used again
        policy._reuse.learn(np.zeros((CLASSES, BUCKETS)))
        written = engine._metrics.snapshot()["write_pages"]
        _, buffers = page_memory(3, PAGE, seed=99)
        assert engine.put(keys(3, 99), buffers, None, soon()) == [True, True, True]
        counters = engine._metrics.snapshot()
        assert counters["write_pages"] == written
        assert counters["write_declined_pages"] == 3
        assert counters.get("write_refused_pages", 0) == 0
        assert engine.prefix(keys(3, 99)) == 0
        assert engine.page_count() == stored
        engine.check()


def test_a_chain_is_used_from_its_tail_so_that_its_head_is_the_most_recent(tmp_path: Path) -> None:
    with closing(open_engine(tmp_path, PAGE, 64 * PAGE)) as engine:
        _, buffers = page_memory(5, PAGE, seed=0)
        assert engine.put(keys(5), buffers, None, soon()) == [True] * 5
        index = engine._pages.index
        ticks = [index._policy.last_use[slot] for slot in index.run(keys(5))]
        assert ticks == sorted(ticks, reverse=True)
