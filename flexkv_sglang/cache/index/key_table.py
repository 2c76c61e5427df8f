"""KeyTable: which slot holds which key. Pure: no I/O, no lock, no clock.

A hash table with chains (Knuth, TAOCP 3, 6.4) in flat columns: the keys by slot, per *bucket* the first
slot, and per slot the next one of its bucket. Between two and four buckets per slot: most keys are alone.

Why not a dict: an entry with its key and slot as Python objects takes 162 B, here it is 44 to 52 B. Many
keys are looked up by a few array operations, whose cache misses overlap; a journal is loaded by a few more.
One key alone costs more: 0.5 us to find, 1 us to put or remove, where a dict takes 0.1 to 0.3 us. A page that
is stored in place of another costs 3 us more than with a dict, beside the tens of us that writing it takes.

Keys are SHA-256 already. The bucket multiplies eight of their bytes with an odd number that is random per
process (Dietzfelbinger et al., J. Algorithms 1997), so an attacker cannot choose tokens whose pages share a bucket.
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Sequence
from struct import Struct

import numpy as np

from flexkv_sglang.types import I64, NO_SLOT, U64, BoolArray, KeyArray, PageKey

KEY_BYTES = 32
KEY = np.dtype(f"V{KEY_BYTES}")
_WORDS = KEY_BYTES // 8
_FACTOR = secrets.randbits(64) | 1
_U_FACTOR, _U_32, _U_ROW = np.uint64(_FACTOR), np.uint64(32), np.uint64(0xFFFFFFFF)
_FEW = 8  # keys that are looked up faster one by one

_word_of = Struct("=Q").unpack_from  # of a key


class KeyTable:
    """Keys of at most ``slot_count`` slots, each 32 bytes, each in one slot."""

    def __init__(self, slot_count: int) -> None:
        bits = min(32, (2 * slot_count).bit_length())
        self._slot_count = slot_count
        self._keys = bytearray(KEY_BYTES * max(1, slot_count))
        self._first = array("I", [0]) * (1 << bits)  # of a bucket: slot + 1, or 0
        self._next = array("I", [0]) * max(1, slot_count)  # in the bucket: slot + 1, or 0
        self._shift, self._mask = 64 - bits, (1 << bits) - 1
        self._count = 0
        # The same memory for array work; none of it is ever resized.
        self._words = np.frombuffer(self._keys, np.uint64)
        self._rows = self._words.reshape(-1, _WORDS)
        self._firsts = np.frombuffer(self._first, np.uint32)
        self._nexts = np.frombuffer(self._next, np.uint32)
        self._u_shift = np.uint64(self._shift)

    def __len__(self) -> int:
        """Number of keys."""
        return self._count

    def __contains__(self, key: PageKey) -> bool:
        return self.get(key) != NO_SLOT

    def __getitem__(self, slot: int) -> PageKey:
        """Key that was put into ``slot`` last."""
        return PageKey(bytes(self._keys[slot * KEY_BYTES : (slot + 1) * KEY_BYTES]))

    def get(self, key: PageKey) -> int:
        """Slot of a key, or -1."""
        word: int = _word_of(key)[0]
        after = self._first[word * _FACTOR >> self._shift & self._mask]
        while after:
            if self._keys.startswith(key, (after - 1) * KEY_BYTES):
                return after - 1
            after = self._next[after - 1]
        return NO_SLOT

    def get_all(self, keys: Sequence[PageKey]) -> I64:
        """``get`` of each, int64 ``[n]``."""
        if len(keys) <= _FEW:
            return np.fromiter(map(self.get, keys), np.int64, len(keys))
        joined = b"".join(keys)
        asked = np.frombuffer(joined, np.uint64).reshape(len(keys), _WORDS)
        words = asked[:, 0]
        slots = self._firsts.take(self._buckets(words)).astype(np.int64) - 1
        rows = np.flatnonzero(self._are_others(slots, words))
        while len(rows) > _FEW // 2:
            after = self._nexts.take(slots[rows]).astype(np.int64) - 1
            slots[rows] = after
            rows = rows[self._are_others(after, words[rows])]
        for row in rows.tolist():
            slots[row] = self.get(keys[row])
        found = self._rows.take(slots, 0, mode="clip")
        if found.tobytes() != joined:  # some are absent, or begin like another key
            for row in np.flatnonzero((found != asked).any(1) & (slots >= 0)).tolist():
                slots[row] = self.get(keys[row])
        return slots

    def _buckets(self, words: U64) -> I64:
        """Buckets of keys that begin with ``words``."""
        return (words * _U_FACTOR >> self._u_shift).view(np.int64)

    def _are_others(self, slots: I64, words: U64) -> BoolArray:
        """Per entry of ``slots`` (-1: none): does the key in that slot begin with another word than ``words``?"""
        flags: BoolArray = self._words.take(slots * _WORDS, mode="clip") != words
        return flags & (slots >= 0)

    def put(self, key: PageKey, slot: int) -> None:
        """Put ``key``, which is absent, into ``slot``."""
        assert len(key) == KEY_BYTES, key
        self._keys[slot * KEY_BYTES : (slot + 1) * KEY_BYTES] = key
        bucket = _word_of(key)[0] * _FACTOR >> self._shift & self._mask
        self._next[slot] = self._first[bucket]
        self._first[bucket] = slot + 1
        self._count += 1

    def remove(self, slot: int) -> PageKey:
        """Remove the key of ``slot``, which is present. Returns it."""
        key = self[slot]
        following = self._next
        bucket = _word_of(key)[0] * _FACTOR >> self._shift & self._mask
        at = self._first[bucket]
        if at == slot + 1:
            self._first[bucket] = following[slot]
        else:
            while (after := following[at - 1]) != slot + 1:
                assert after, f"slot {slot} is not in its bucket"
                at = after
            following[at - 1] = following[slot]
        self._count -= 1
        return key

    def clear(self) -> None:
        """Remove all keys."""
        self._firsts[:] = 0
        self._count = 0

    def load(self, keys: KeyArray, slots: I64) -> list[int]:
        """Fill an empty table; ``keys``: V32 ``[n]``. Of equal keys the first stays.

        Returns the positions of the others.
        """
        assert not self._count, "load() is for an empty table"
        column = np.ascontiguousarray(keys)
        hashes = column.view(np.uint64)[::_WORDS] * _U_FACTOR
        order = np.sort(hashes & ~_U_ROW | np.arange(len(keys), dtype=np.uint64))
        dropped = _repeated(column, order)
        if dropped:
            order = order[~np.isin(order & _U_ROW, dropped)]
        rows = (order & _U_ROW).view(np.int64)
        self._rows.view(KEY)[slots[rows], 0] = column[rows]
        buckets = (order >> self._u_shift).view(
            np.int64
        )  # ascending, as a bucket is a hash's highest bits
        entries = slots[rows].astype(np.uint32) + np.uint32(1)
        joins = np.ones(len(rows) + 1, np.bool_)  # is a key in the bucket of the one before it?
        joins[1:-1] = buckets[1:] == buckets[:-1]
        joins[[0, -1]] = False
        self._nexts[slots[rows]] = np.where(joins[1:], np.roll(entries, -1), 0)
        heads = np.flatnonzero(~joins[:-1])
        self._firsts[buckets[heads]] = entries[heads]
        self._count = len(rows)
        return dropped

    def slots(self) -> I64:
        """Slots of all keys, in no order."""
        found = []
        at = self._firsts[self._firsts > 0].astype(np.int64) - 1
        while len(at):
            found.append(at)
            at = self._nexts[at].astype(np.int64) - 1
            at = at[at >= 0]
        return np.concatenate([np.zeros(0, np.int64), *found])

    def column(self) -> KeyArray:
        """Keys by slot: a copy. An empty slot has the key that was there last."""
        return np.frombuffer(self._keys, KEY)[: self._slot_count].copy()


def _repeated(keys: KeyArray, order: U64) -> list[int]:
    """Positions of keys that occur before them. ``order``: hash with the position in its low half, ascending."""
    same = np.flatnonzero(order[1:] >> _U_32 == order[:-1] >> _U_32)
    suspects = np.unique(order[np.concatenate([same, same + 1])] & _U_ROW)
    first: dict[bytes, int] = {}
    return [row for row in suspects.tolist() if first.setdefault(keys[row].tobytes(), row) != row]
