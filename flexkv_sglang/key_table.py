"""KeyTable: which slot holds which key. Pure: no I/O, no lock, no clock.

Open addressing with linear probing (Knuth, TAOCP 3, 6.4) in two flat columns: the keys by slot, and a
table of entries ``tag << 32 | slot + 1``; 0 is an empty place. The tag is a hash of the key and says where
the entry belongs (``tag * places >> 31``), so entries move without a look at their keys. The tag only
finds candidates: whole keys are compared before one is given out. Half of the places are empty.

Why not a dict: an entry with its key and slot as Python objects takes 162 B, here it is 48 B. Many keys are
looked up by a few array operations, whose cache misses overlap, and a journal is loaded by a few more.

Keys are SHA-256 already; the tag multiplies eight of their bytes with an odd number that is random per
process (Dietzfelbinger et al., J. Algorithms 1997), so nobody can choose tokens whose pages crowd one place.
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Sequence
from struct import Struct

import numpy as np

from flexkv_sglang.types import I64, NO_SLOT, U64, KeyArray, PageKey

KEY_BYTES = 32
KEY = np.dtype(f"V{KEY_BYTES}")
_PLACES_PER_SLOT = 2
_TAG_BITS = 31
_TAG_MASK = (1 << _TAG_BITS) - 1
_SLOT_MASK = (1 << 32) - 1
_FACTOR = secrets.randbits(64) | 1
_TAG_SHIFT = 64 - _TAG_BITS
_WINDOW = np.arange(6)  # places that are looked at in one go: of 400 keys, one lies further on
_FEW = 8  # keys that are looked up faster one by one

_word_of = Struct("=Q").unpack_from  # of a key
_U_FACTOR, _U_TAG_SHIFT = np.uint64(_FACTOR), np.uint64(_TAG_SHIFT)
_U_TAG_BITS, _U_32, _U_SLOT_MASK = np.uint64(_TAG_BITS), np.uint64(32), np.uint64(_SLOT_MASK)


class KeyTable:
    """Keys of at most ``slot_count`` slots, each 32 bytes, each in one slot."""

    def __init__(self, slot_count: int) -> None:
        self._slot_count = slot_count
        self._keys = bytearray(KEY_BYTES * max(1, slot_count))
        self._places = _PLACES_PER_SLOT * slot_count + 1
        self._table = array("Q", [0]) * self._places
        self._count = 0
        # The same memory for array work; neither is ever resized.
        self._words = np.frombuffer(self._keys, np.uint64).reshape(-1, KEY_BYTES // 8)
        self._entries = np.frombuffer(self._table, np.uint64)
        self._u_places = np.uint64(self._places)

    def __len__(self) -> int:
        """Keys that can be found."""
        return self._count

    def __contains__(self, key: PageKey) -> bool:
        return self.get(key) != NO_SLOT

    def __getitem__(self, slot: int) -> PageKey:
        """What was put into ``slot`` last."""
        return PageKey(bytes(self._keys[slot * KEY_BYTES : (slot + 1) * KEY_BYTES]))

    def get(self, key: PageKey) -> int:
        """Slot of a key, or -1."""
        word: int = _word_of(key)[0]
        tag = word * _FACTOR >> _TAG_SHIFT & _TAG_MASK
        place = tag * self._places >> _TAG_BITS
        table = self._table
        while entry := table[place]:
            if entry >> 32 == tag:
                slot = (entry & _SLOT_MASK) - 1
                if self._keys.startswith(key, slot * KEY_BYTES):
                    return slot
            place += 1
            if place == self._places:
                place = 0
        return NO_SLOT

    def get_all(self, keys: Sequence[PageKey]) -> I64:
        """``get`` of each, int64 ``[n]``."""
        if len(keys) <= _FEW:
            return np.fromiter(map(self.get, keys), np.int64, len(keys))
        joined = b"".join(keys)
        tags = _tags(np.frombuffer(joined, np.uint64)[:: KEY_BYTES // 8])
        places = self._homes(tags)[:, None] + _WINDOW
        seen = self._entries.take(places, mode="wrap")
        near = (seen ^ (tags << _U_32)[:, None]) <= _U_SLOT_MASK
        first = near.argmax(1) + np.arange(0, seen.size, len(_WINDOW))
        slots: I64 = (seen.ravel().take(first) & _U_SLOT_MASK).view(np.int64) - 1
        stored = self._words.take(slots, 0, mode="clip")
        if stored.tobytes() != joined:
            asked = np.frombuffer(joined, np.uint64).reshape(stored.shape)
            rows = np.flatnonzero((stored != asked).any(1) & (slots >= 0))
            if len(rows) > _FEW:  # past an empty place there is nothing
                slots[rows] = NO_SLOT
                rows = rows[near[rows].any(1) | (seen[rows] != 0).all(1)]
            for row in rows.tolist():  # further on, or another key with that tag is in the way
                slots[row] = self.get(keys[row])
        return slots

    def _homes(self, tags: U64) -> I64:
        """The place where each belongs."""
        return (tags * self._u_places >> _U_TAG_BITS).view(np.int64)

    def put(self, key: PageKey, slot: int) -> None:
        """``key``, which is not here, is in ``slot`` now."""
        assert len(key) == KEY_BYTES, key
        self._keys[slot * KEY_BYTES : (slot + 1) * KEY_BYTES] = key
        self._insert(_tag(key), slot)
        self._count += 1

    def _insert(self, tag: int, slot: int) -> None:
        table = self._table
        place = tag * self._places >> _TAG_BITS
        while table[place]:
            place = (place + 1) % self._places
        table[place] = tag << 32 | slot + 1

    def remove(self, slot: int) -> PageKey:
        """The key of ``slot``, which is here, is not any more. Returns it."""
        key = self[slot]
        table, places = self._table, self._places
        tag = _tag(key)
        hole = tag * places >> _TAG_BITS
        entry = tag << 32 | slot + 1
        while table[hole] != entry:
            assert table[hole], f"slot {slot} is not in the table"
            hole = (hole + 1) % places
        place = hole
        while entry := table[place := (place + 1) % places]:
            home = (entry >> 32) * places >> _TAG_BITS
            if (place - home) % places >= (place - hole) % places:  # its home is not past the hole
                table[hole] = entry
                hole = place
        table[hole] = 0
        self._count -= 1
        return key

    def clear(self) -> None:
        """Nothing is left."""
        self._entries[:] = 0
        self._count = 0

    def load(self, keys: KeyArray, slots: I64) -> list[int]:
        """Fill an empty table; ``keys``: V32 ``[n]``. Of equal keys the first stays.

        Returns the positions of the others.
        """
        assert not self._count, "load() is for an empty table"
        packed = np.ascontiguousarray(keys)
        tags = _tags(packed.view(np.uint64)[:: KEY_BYTES // 8])
        order = np.sort(tags << _U_32 | np.arange(len(keys), dtype=np.uint64))
        dropped = _repeated(keys, order)
        if dropped:
            order = order[~np.isin(order & _U_SLOT_MASK, dropped)]
        rows = (order & _U_SLOT_MASK).view(np.int64)
        tags = order >> _U_32
        self._fill(tags, slots[rows])
        kept = np.sort(rows) if dropped else slice(None)
        self._words.view(KEY)[slots[kept], 0] = packed[kept]
        return dropped

    def _fill(self, tags: U64, slots: I64) -> None:
        """Entries of an empty table, by ascending tags."""
        entries = tags << _U_32 | slots.astype(np.uint64) + np.uint64(1)
        # In order of their homes, each goes right behind the one before it, or home if that is further on.
        rank = np.arange(len(entries))
        places = np.maximum.accumulate(self._homes(tags) - rank) + rank
        inside = int(np.searchsorted(places, self._places))
        self._entries[places[:inside]] = entries[:inside]
        for entry in entries[inside:].tolist():  # past the end: they go on at the beginning
            self._insert(entry >> 32, (entry & _SLOT_MASK) - 1)
        self._count = len(entries)

    def slots(self) -> I64:
        """Slots of all keys, in no order."""
        used = self._entries[self._entries > 0]
        return (used & _U_SLOT_MASK).view(np.int64) - 1

    def column(self) -> KeyArray:
        """Keys by slot, V32: a copy. Slots that hold nothing have what was there last."""
        return np.frombuffer(self._keys, KEY)[: self._slot_count].copy()


def _tag(key: PageKey) -> int:
    return _word_of(key)[0] * _FACTOR >> _TAG_SHIFT & _TAG_MASK  # type: ignore[no-any-return]


def _tags(words: U64) -> U64:
    """``_tag`` of keys that begin with ``words``."""
    return words * _U_FACTOR >> _U_TAG_SHIFT


def _repeated(keys: KeyArray, order: U64) -> list[int]:
    """Positions of keys that are there before. ``order``: ``tag << 32 | position``, ascending."""
    same = np.flatnonzero(order[1:] >> _U_32 == order[:-1] >> _U_32)
    suspects = np.unique(order[np.concatenate([same, same + 1])] & _U_SLOT_MASK)
    first: dict[bytes, int] = {}
    return [row for row in suspects.tolist() if first.setdefault(keys[row].tobytes(), row) != row]
