"""Seeded bugs in the eviction policy and in what is declined, for ``run.py``: fields of ``Mutant``."""

from __future__ import annotations

INDEX = "flexkv_sglang/cache/index/index.py"
KEYS = "flexkv_sglang/cache/index/key_table.py"
LRU = "flexkv_sglang/cache/eviction/lru.py"
EVICTION = "flexkv_sglang/cache/eviction/reuse_density.py"
MODEL = "tests/cache/index/test_index_model.py"

MUTANTS = (
    (
        "ghosts are forgotten",
        EVICTION,
        "last, group = self._recall(ghost, now)\n                    ghosts",
        "pass\n                    ghosts",
        "tests/cache/eviction/test_policies.py",
    ),
    (
        "nothing is learned",
        EVICTION,
        "        self._reuse.learn(self._waiting())",
        "        pass",
        "tests/cache/eviction/test_policies.py",
    ),
    (
        "the most valuable leaf goes",
        EVICTION,
        "        heads.sort()",
        "        heads.sort(reverse=True)",
        "tests/cache/eviction/test_policies.py",
    ),
    (
        "waits that are not over are not counted",
        "flexkv_sglang/cache/eviction/reuse_model.py",
        "open_ended = self._censored + waiting",
        "open_ended = self._censored * 0",
        "tests/cache/eviction/test_policies.py",
    ),
    (
        "only the waits of ghosts are counted as not over",
        EVICTION,
        "counts += step * np.bincount(places, minlength=len(counts))\n        step",
        "step",
        "tests/cache/eviction/test_policies.py",
    ),
    (
        "a declined page leaves no ghost",
        EVICTION,
        "            ghosts[place] = tag << 20 | at_least",
        "            ghosts[place] = 0 | at_least",
        "tests/cache/eviction/test_policies.py",
    ),
    (
        "a bid does not know the ghost",
        EVICTION,
        "                at_least = max(at_least, min((ghost",
        "                max(at_least, min((ghost",
        "tests/cache/eviction/test_policies.py",
    ),
    (
        "a new page gets its slot at any price",
        EVICTION,
        "or 0.0 < heads[0][0] >= admission_value:",
        "or heads[0][0] < 0.0 >= admission_value:",
        "tests/cache/eviction/test_policies.py",
    ),
    (
        "a new page is worth nothing",
        EVICTION,
        "admission_values[position] = values[at_least]",
        "admission_values[position] = 0.0",
        "tests/cache/eviction/test_policies.py",
    ),
    (
        "a page's value ignores its age",
        EVICTION,
        "[bucket_of(self._now - self.last_use[slot])]",
        "[bucket_of(1)]",
        "tests/cache/eviction/test_policies.py",
    ),
    (
        "writing behind a page is a use of it",
        INDEX,
        "self._touch_chain(present if before == NO_SLOT else present[1:])",
        "self._touch_chain(present)",
        "tests/cache/eviction/test_policies.py",
    ),
    (
        "a parent is offered on although it has a child",
        INDEX,
        "            self._policy.renew(before, self._links.children[before])",
        "            pass",
        "tests/cache/index/test_index.py",
    ),
    (
        "a declined page is answered as not stored",
        "flexkv_sglang/cache/engine.py",
        "for position in reserved.refused:",
        "for position in reserved.refused + reserved.declined:",
        "tests/integration/test_declined.py",
    ),
    (
        "a chain is committed head first",
        "flexkv_sglang/cache/local_pages.py",
        "self.index.commit(good[::-1])",
        "self.index.commit(good)",
        "tests/integration/test_declined.py",
    ),
    (
        "a page used after the last victim goes first, whatever has become a leaf since",
        LRU,
        "tick, after, self._after = self.last_use[slot], self._after, 0",
        "tick, after = self.last_use[slot], self._after",
        "tests/cache/eviction/test_policies.py",
    ),
    (
        "the page after a victim that was found and left goes before it",
        LRU,
        "if slot == self._victim else 0",
        "if slot == self._victim else self.last_use[self._victim] + 1",
        "tests/cache/eviction/test_policies.py",
    ),
    (
        "a key that begins like another is found",
        KEYS,
        "if found.tobytes() != joined:",
        "if False:",
        "tests/cache/index/test_key_table.py",
    ),
    (
        "a removed key takes the rest of its bucket along",
        KEYS,
        "self._first[bucket] = following[slot]",
        "self._first[bucket] = 0",
        "tests/cache/index/test_key_table.py",
    ),
    (
        "of two recovered pages with one key both stay",
        KEYS,
        "dropped = _repeated(column, order)",
        "dropped: list[int] = []",
        "tests/cache/index/test_index.py",
    ),
)
