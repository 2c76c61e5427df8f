"""LookupPins: announced pages are there when they are read, and no client can own the cache that way."""

from __future__ import annotations

from pathlib import Path

import pytest

import flexkv_sglang.cache.index.lookup_pins as lookup_pins_module
from flexkv_sglang.cache.engine import CacheEngine
from flexkv_sglang.cache.index.lookup_pins import LOOKUP_PIN_S, LookupPins
from flexkv_sglang.types import NO_SLOT, SlotId
from stores.engines import keys, open_engine, page_memory, soon

PAGE = 4096


def run(*slots: int) -> list[SlotId]:
    return [SlotId(slot) for slot in slots]


chained = range(-1, 799)
alone = [NO_SLOT] * 800


def test_a_chain_needs_one_pin_and_pages_without_links_one_each() -> None:
    assert LookupPins(800).add(run(3, 4, 5), chained, 0.0) == [5]
    assert sorted(LookupPins(800).add(run(3, 4, 5), alone, 0.0)) == [3, 4, 5]


def test_asking_again_neither_prolongs_nor_renews_a_pin() -> None:
    pins = LookupPins(800)
    assert pins.add(run(7), alone, 0.0) == [7]
    assert pins.add(run(7), alone, LOOKUP_PIN_S - 1) == []
    assert pins.expire(LOOKUP_PIN_S - 0.1) == []
    assert pins.expire(LOOKUP_PIN_S) == [7]
    assert pins.add(run(7), alone, LOOKUP_PIN_S + 1) == [], "it was not read since"
    pins.release(run(7))
    assert pins.add(run(7), alone, LOOKUP_PIN_S + 2) == [7]


def test_reading_ends_a_pin_and_their_number_is_bounded() -> None:
    pins = LookupPins(80)
    assert len(pins.add(run(*range(80)), alone, 0.0)) == 10
    assert len(pins) == 10
    assert len(pins.release(run(*range(80)))) == 10
    assert len(pins) == 0


def put(engine: CacheEngine, count: int, seed: int) -> list[bool]:
    _, buffers = page_memory(count, PAGE, seed=seed)
    return engine.put(keys(count, seed), buffers, None, soon())


def test_an_announced_prefix_survives_a_flood_of_writes_until_it_is_read(tmp_path: Path) -> None:
    engine = open_engine(tmp_path, PAGE, 64 * PAGE)
    put(engine, 8, seed=1)
    assert engine.prefix(keys(8, 1)) == 8
    for seed in range(10, 40):
        assert all(put(engine, 8, seed))
    target, buffers = page_memory(8, PAGE)
    assert all(engine.get(keys(8, 1), buffers, soon()))
    assert len(target)
    for seed in range(50, 80):
        put(engine, 8, seed)
    assert engine.prefix(keys(8, 1)) == 0, "read and unpinned, it ages like all others"
    engine.check()
    engine.close()


def test_pins_of_pages_that_are_not_read_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup_pins_module, "LOOKUP_PIN_S", 0.0)
    engine = open_engine(tmp_path, PAGE, 64 * PAGE)
    put(engine, 8, seed=1)
    assert engine.prefix(keys(8, 1)) == 8
    for seed in range(10, 40):
        put(engine, 8, seed)
    assert engine.prefix(keys(8, 1)) == 0
    engine.close()


def test_lookup_pins_never_stop_a_write(tmp_path: Path) -> None:
    engine = open_engine(tmp_path, PAGE, 8 * PAGE)
    put(engine, 8, seed=1)
    assert engine.prefix(keys(8, 1)) == 8  # its tail protects the whole tier
    assert all(put(engine, 8, seed=2))
    assert engine.prefix(keys(8, 2)) == 8
    engine.check()
    engine.close()
