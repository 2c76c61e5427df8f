"""KeyTable beside a dict: keys that share a bucket, that begin alike, that come back."""

from __future__ import annotations

import random

import numpy as np
import pytest

from flexkv_sglang.cache.index import key_table
from flexkv_sglang.cache.index.key_table import KEY, KeyTable
from flexkv_sglang.types import NO_SLOT, PageKey

SLOTS = 48
HASHES = {
    "spread": lambda rng: rng.getrandbits(64),
    "one hash": lambda _: 12345,
    "hash 0": lambda _: 0,
    "one bucket": lambda rng: (1 << 63) + rng.getrandbits(56),
    "two buckets": lambda rng: (rng.getrandbits(57) - (1 << 56)) % (1 << 64),
    "the last bucket": lambda rng: (1 << 64) - 1 - rng.getrandbits(56),
}


def key_of(hashed: int, rng: random.Random) -> PageKey:
    """A key with this hash."""
    word = hashed * pow(key_table._FACTOR, -1, 1 << 64) % (1 << 64)
    return PageKey(word.to_bytes(8, "little") + rng.randbytes(24))


def check(table: KeyTable, expected: dict[PageKey, int], absent: list[PageKey]) -> None:
    """Every way to ask agrees with ``expected``."""
    assert len(table) == len(expected)
    assert sorted(table.slots().tolist()) == sorted(expected.values())
    asked = [*expected, *absent]
    random.Random(len(asked)).shuffle(asked)
    answers = [expected.get(key, NO_SLOT) for key in asked]
    assert [table.get(key) for key in asked] == answers
    assert table.get_all(asked).tolist() == answers
    assert table.get_all(asked[:3]).tolist() == answers[:3]
    for key, slot in expected.items():
        assert key in table
        assert table[slot] == key
        assert table.column()[slot].tobytes() == key


@pytest.mark.parametrize("kind", HASHES)
def test_any_order_of_calls_gives_what_a_dict_gives(kind: str) -> None:
    rng = random.Random(kind)
    table, expected = KeyTable(SLOTS), dict[PageKey, int]()
    gone: list[PageKey] = []
    for step in range(1500):
        full = rng.random() < len(expected) / SLOTS
        if full:
            key = rng.choice(list(expected))
            assert table.remove(expected.pop(key)) == key
            gone.append(key)
        else:
            key = gone.pop() if gone and rng.random() < 0.3 else key_of(HASHES[kind](rng), rng)
            slot = rng.choice([s for s in range(SLOTS) if s not in expected.values()])
            table.put(key, slot)
            expected[key] = slot
        if step % 20 == 0:
            new = [key_of(HASHES[kind](rng), rng) for _ in range(20)]
            check(table, expected, [*gone[-20:], *new])
    table.clear()
    check(table, {}, list(expected))
    keys, slots = list(expected)[:20], rng.sample(range(SLOTS), 20)
    table.load(np.frombuffer(b"".join(keys), KEY), np.array(slots))  # the old links are no trouble
    check(table, dict(zip(keys, slots, strict=True)), list(expected)[20:])


@pytest.mark.parametrize("kind", HASHES)
@pytest.mark.parametrize("count", [0, 1, 30, SLOTS])
def test_load_gives_what_puts_give_and_drops_repeated_keys(kind: str, count: int) -> None:
    rng = random.Random(kind)
    keys = [key_of(HASHES[kind](rng), rng) for _ in range(count)]
    for _ in range(count // 4):
        keys[rng.randrange(count)] = rng.choice(keys)
    slots = rng.sample(range(SLOTS), count)
    expected, dropped = dict[PageKey, int](), []
    for row, (key, slot) in enumerate(zip(keys, slots, strict=True)):
        if expected.setdefault(key, slot) != slot:
            dropped.append(row)
    table = KeyTable(SLOTS)
    column = np.frombuffer(b"".join(keys), KEY) if keys else np.zeros(0, KEY)
    assert table.load(column, np.array(slots, np.int64)) == dropped
    check(table, expected, [key_of(HASHES[kind](rng), rng) for _ in range(20)])
    for key in list(expected)[::2]:  # what was loaded can be removed
        table.remove(expected.pop(key))
        check(table, expected, [key])


def test_a_key_that_begins_like_another_ones_is_not_found() -> None:
    """Candidates come from the first eight bytes; all 32 decide the answer."""
    rng = random.Random(1)
    here, other = key_of(77, rng), key_of(77, rng)
    twin = PageKey(here[:31] + bytes([here[31] ^ 1]))
    table = KeyTable(SLOTS)
    table.put(here, 3)
    for asked in (other, twin):
        assert table.get(asked) == NO_SLOT
        assert table.get_all([here, *[asked] * 10]).tolist() == [3] + [NO_SLOT] * 10


def test_a_key_that_left_is_not_found_by_its_bytes_that_are_still_there() -> None:
    rng = random.Random(2)
    keys = [key_of(rng.getrandbits(64), rng) for _ in range(20)]
    table = KeyTable(SLOTS)
    for slot, key in enumerate(keys):
        table.put(key, slot)
    table.remove(0)
    assert table.get_all(keys).tolist() == [NO_SLOT, *range(1, 20)]
