"""KeyTable beside a dict: keys that crowd one place, that begin alike, and that run past the table's end."""

from __future__ import annotations

import random

import numpy as np
import pytest

from flexkv_sglang import key_table
from flexkv_sglang.key_table import KEY, KeyTable
from flexkv_sglang.types import NO_SLOT, PageKey

SLOTS = 48
TAGS = {
    "spread": lambda rng: rng.getrandbits(31),
    "one tag": lambda rng: 12345,
    "tag 0": lambda rng: 0,
    "one place": lambda rng: (1 << 30) + rng.randrange(1000),
    "the last places": lambda rng: (1 << 31) - 1 - rng.randrange(1 << 26),
    "both ends": lambda rng: (rng.randrange(1 << 25) - (1 << 24)) % (1 << 31),
}


def key_of(tag: int, rng: random.Random) -> PageKey:
    """A key with this tag."""
    inverse = pow(key_table._FACTOR, -1, 1 << 64)
    low = rng.getrandbits(3)
    word = ((tag << 33) + low) * inverse % (1 << 64)
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


@pytest.mark.parametrize("kind", TAGS)
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
            key = gone.pop() if gone and rng.random() < 0.3 else key_of(TAGS[kind](rng), rng)
            slot = rng.choice([s for s in range(SLOTS) if s not in expected.values()])
            table.put(key, slot)
            expected[key] = slot
        if step % 20 == 0:
            new = [key_of(TAGS[kind](rng), rng) for _ in range(20)]
            check(table, expected, [*gone[-20:], *new])
    table.clear()
    check(table, {}, list(expected))


@pytest.mark.parametrize("kind", TAGS)
@pytest.mark.parametrize("count", [0, 1, 30, SLOTS])
def test_load_gives_what_puts_give_and_drops_repeated_keys(kind: str, count: int) -> None:
    rng = random.Random(kind)
    keys = [key_of(TAGS[kind](rng), rng) for _ in range(count)]
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
    check(table, expected, [key_of(TAGS[kind](rng), rng) for _ in range(20)])
    for key in list(expected)[::2]:  # places are such that removing works
        table.remove(expected.pop(key))
        check(table, expected, [key])


def test_a_key_of_another_page_with_the_same_tag_is_not_found() -> None:
    """Candidates come from 31 bits; what is given out is decided by all 32 bytes."""
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
    keys = [key_of(rng.getrandbits(31), rng) for _ in range(20)]
    table = KeyTable(SLOTS)
    for slot, key in enumerate(keys):
        table.put(key, slot)
    table.remove(0)
    assert table.get_all(keys).tolist() == [NO_SLOT, *range(1, 20)]
