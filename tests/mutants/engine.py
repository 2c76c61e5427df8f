"""Seeded bugs in the engine of a tier: index, chains, eviction, slots, transfers. (name, file, old, new, tests)."""

from __future__ import annotations

MODEL = "tests/cache/index/test_index_model.py"
ENGINE = "tests/cache/test_engine.py"
NEIGHBOURS = "tests/backends/slots/test_neighbours.py"
INDEX = "flexkv_sglang/cache/index/index.py"
EVICTION = "flexkv_sglang/cache/eviction/lru.py"
CHAINS = "flexkv_sglang/cache/index/chains.py"

MUTANTS = (
    (
        "evict a pinned page",
        INDEX,
        "return self._pins[slot] == 0 and self._free_slots.is_open(slot)",
        "return self._free_slots.is_open(slot)",
        MODEL,
    ),
    (
        "evict a page with a child",
        CHAINS,
        "return parent if self.children[parent] == 0 else NO_SLOT",
        "return parent",
        MODEL,
    ),
    (
        "evict a page with a child after a restart",
        INDEX,
        "slots[children[slots] == 0]",
        "slots",
        MODEL,
    ),
    (
        "evict pages of the own batch",
        INDEX,
        "        slots, victims, declined = self._take([keys[position] for position in wanted])",
        (
            "        self.unpin(present)\n"
            "        slots, victims, declined = self._take([keys[position] for position in wanted])\n"
            "        self.pin(present)"
        ),
        MODEL,
    ),
    (
        "most recently used goes first",
        EVICTION,
        "            last_use[slot] = now\n            if not",
        "            last_use[slot] = (1 << 30) - now\n            if not",
        MODEL,
    ),
    (
        "use does not protect",
        INDEX,
        "        self._touch_chain(slots)\n        return slots",
        "        return slots",
        "tests/cache/index/test_index.py",
    ),
    (
        "a page being written is visible",
        INDEX,
        "SlotId(slot) if slot != NO_SLOT and self._state[slot] == READY",
        "SlotId(slot) if slot != NO_SLOT and self._state[slot] != FREE",
        MODEL,
    ),
    (
        "a page being written counts in a prefix",
        INDEX,
        "        ready = self._in_state(slots, READY)",
        "        ready = slots != NO_SLOT",
        MODEL,
    ),
    (
        "abort leaks the slot",
        INDEX,
        "                self._forget(slot)\n            self._free(slot)",
        "                self._forget(slot)",
        MODEL,
    ),
    (
        "discard frees a slot that is read",
        INDEX,
        "if self._pins[slot]:\n            self._state[slot] = DOOMED",
        "if False:\n            self._state[slot] = DOOMED",
        MODEL,
    ),
    (
        "clear frees a slot that is written",
        INDEX,
        "if self._state[slot] == WRITING or self._pins[slot]:",
        "if self._pins[slot]:",
        MODEL,
    ),
    (
        "a parent's count is not reduced",
        CHAINS,
        "        self.children[parent] -= 1\n",
        "",
        MODEL,
    ),
    (
        "links survive a replaced parent",
        CHAINS,
        "(self._generation[slot] + 1) & 0xFFFFFFFF",
        "(self._generation[slot] + 0) & 0xFFFFFFFF",
        MODEL,
    ),
    (
        "recovered links are lost",
        CHAINS,
        "np.frombuffer(self.parent, np.int64)[slots[linked]] = parents[linked]",
        "pass",
        MODEL,
    ),
    (
        "no second look at a neighbour",
        "flexkv_sglang/cache/engine.py",
        "            valid = same and claim.journal.directory in seen\n",
        "            valid = True\n",
        NEIGHBOURS,
    ),
    (
        "failed pages are committed",
        "flexkv_sglang/cache/local_pages.py",
        "            if moved[row]:\n",
        "            if row not in left:\n",
        ENGINE,
    ),
    (
        "pages of before a clear are committed",
        "flexkv_sglang/cache/local_pages.py",
        "good = [i for i, flag in enumerate(alive) if flag]",
        "good = list(range(len(alive)))",
        ENGINE,
    ),
    (
        "page checksum is not compared",
        "flexkv_sglang/cache/engine.py",
        "page_checksum(kind, keys[row], parts) == sums[row]",
        "page_checksum(kind, keys[row], parts) >= 0",
        ENGINE,
    ),
    (
        "the key is not part of the checksum",
        "backends/checksum.py",
        'seed=int.from_bytes(key[:8], "little")',
        "seed=0",
        ENGINE,
    ),
    (
        "less verified pages are adopted",
        "backends/slots/slot_file.py",
        "& np.isin(kinds, list(accepted))",
        "& True",
        ENGINE,
    ),
    (
        "a neighbour's less verified pages are believed",
        "backends/slots/following/neighbour_journal.py",
        "length == self._payload_bytes and flags & 0xFF in self._accepted",
        "length == self._payload_bytes",
        ENGINE,
    ),
    (
        "True behind a hole",
        "flexkv_sglang/cache/engine.py",
        "results = cut_after_first_failure(results)",
        "pass",
        ENGINE,
    ),
    (
        "a short transfer is a whole page",
        "backends/io/transfer.py",
        "whole = moved == self.page_bytes",
        "whole = moved >= 0",
        "tests/backends/io/test_mover.py",
    ),
    (
        "a refused page reaches its target",
        "backends/io/transfer.py",
        "if right and self._targets is not None",
        "if self._targets is not None",
        "tests/backends/io/test_mover.py",
    ),
    (
        "unaligned memory goes to O_DIRECT",
        "backends/io/mover.py",
        "direct[rows] = addresses_fit[rows]",
        "direct[rows] = True",
        "tests/backends/io/test_mover.py",
    ),
    (
        "a record's CRC is not checked",
        "backends/slots/records.py",
        "return records[: int(wrong.argmax()) if wrong.any() else usable]",
        "return records[:usable]",
        "tests/backends/slots/test_records.py",
    ),
    (
        "a record's number is not checked",
        "backends/slots/records.py",
        "usable = int(wrong.argmax()) if wrong.any() else usable",
        "pass",
        "tests/backends/slots/test_records.py",
    ),
    (
        "the snapshot's checksum is not checked",
        "backends/slots/journal.py",
        "or zlib.crc32(body) != header.body_crc",
        "or False",
        "tests/backends/slots/test_journal.py",
    ),
    (
        "a foreign namespace is adopted",
        "backends/slots/journal.py",
        "if header.namespace != namespace or header.owner",
        "if header.owner",
        "tests/backends/slots/test_journal.py",
    ),
    (
        "the oldest word on a slot wins",
        "backends/slots/journal.py",
        "position[place] = known",
        "position[place[::-1]] = known[::-1]",
        "tests/backends/slots/test_journal.py",
    ),
    (
        "CLEAR is not obeyed at recovery",
        "backends/slots/journal.py",
        "if len(clears):",
        "if False:",
        "tests/backends/slots/test_journal.py",
    ),
    (
        "a torn append stays in the journal",
        "backends/slots/journal.py",
        "            os.ftruncate(self._fd, self._size)\n        except",
        "            pass\n        except",
        "tests/backends/slots/test_journal.py",
    ),
    (
        "the layout is not part of the namespace",
        "flexkv_sglang/identity/keys.py",
        "text = json.dumps(self.fields(), sort_keys=True)",
        "text = json.dumps(self.fields() | {'layout': ''}, sort_keys=True)",
        "tests/identity/test_keys.py",
    ),
    (
        "an owner's lock is not taken",
        "backends/file_lock.py",
        "                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n                except",
        "                    pass\n                except",
        "tests/backends/slots/test_opening.py",
    ),
)
