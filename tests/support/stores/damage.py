"""Single-bit flips in every file of a store: each is refused or harmless, and never gives wrong bytes.

A golden store is built once by the real engine: several generations, evictions, a snapshot and a journal
behind it, not closed (a crash image) or closed. For each flip the files are written again with one bit
changed, an engine adopts them, and every key is asked for. What must still be served is computed from the
golden journal by a replay that shares no code with ``journal.recover``.
"""

from __future__ import annotations

import logging
import random
import shutil
import struct
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flexkv_sglang.backends.io.probe import probe_directory
from stores.crash_child import NAMESPACE, Setting, make_content, open_here
from stores.engines import Bytes, keys, page_memory, soon

SLOTS, PAYLOAD, CHAINS, CHAIN = 24, 4096, 6, 8
_HEADER, _RECORD = 4096, 64
_PUT, _DEL, _CLEAR = 1, 2, 3


@dataclass
class Damage:
    """Tally over flips. ``by``: (file kind, check that refused or absorbed the flip) -> count."""

    flips: int = 0
    wrong: int = 0
    missing: int = 0  # pages that the flip does not explain
    pages: int = 0
    by: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Golden:
    """The untouched files, and the last generation's records as raw 64-byte pieces."""

    files: dict[str, bytes]
    slots: str
    journal: str
    snapshot: str

    def replay(self, records: int) -> dict[int, bytes]:
        """slot -> key after the snapshot and the first ``records`` journal records, parsed here from the format."""
        held: dict[int, bytes] = {}
        body = self.files[self.snapshot][_HEADER:]
        tail = self.files[self.journal][_HEADER : _HEADER + records * _RECORD]
        for raw in (body, tail):
            for start in range(0, len(raw), _RECORD):
                op = raw[start + 4]
                slot = struct.unpack_from("<I", raw, start + 16)[0]
                if op == _PUT:
                    held[slot] = raw[start + 32 : start + 64]
                elif op == _DEL:
                    held.pop(slot, None)
                elif op == _CLEAR:
                    held.clear()
        return held


class FlipTest:
    """Golden store in ``directory``; ``run`` flips bits in copies of it."""

    def __init__(self, directory: Path, seed: int, *, verify: str = "full") -> None:
        self._rng = random.Random(seed)
        self._place = directory / NAMESPACE
        self._place.mkdir(parents=True)
        mode = probe_directory(str(directory))
        self._setting = Setting(
            directory, mode, SLOTS, PAYLOAD, CHAINS, verify, durable=False, alone=True
        )
        self._keys = keys(CHAINS * CHAIN)
        self._number = {key: i for i, key in enumerate(self._keys)}
        self._content: Bytes = make_content(CHAINS * CHAIN, PAYLOAD)
        self._golden = self._build()
        count = (len(self._golden.files[self._golden.journal]) - _HEADER) // _RECORD
        self._replays = [self._golden.replay(n) for n in range(count + 1)]
        assert count > 20, count
        assert len(self._replays[-1]) == SLOTS
        self.damage = Damage()

    def _put(self, engine: object, chain: int, count: int) -> None:
        memory, buffers = page_memory(count, PAYLOAD)
        first = chain * CHAIN
        memory[:] = self._content[first : first + count]
        assert all(engine.put(self._keys[first : first + count], buffers, None, soon()))  # type: ignore[attr-defined]

    def _build(self) -> Golden:
        """Fill, rotate, evict: a snapshot, and records behind it that change some of it."""
        engine = open_here(self._setting, SLOTS)
        for chain in range(4):
            self._put(engine, chain, CHAIN)
        engine.close()
        engine = open_here(self._setting, SLOTS)  # adoption starts a generation: a full snapshot
        for chain in (4, 5, 0):
            self._put(engine, chain, CHAIN)
        files = {path.name: path.read_bytes() for path in self._place.iterdir()}
        engine.close()

        def one(ending: str) -> str:
            (name,) = [name for name in files if name.endswith(ending)]
            return name

        return Golden(files, one(".slots"), one(".journal"), one(".snap"))

    def _lay_out(self) -> None:
        shutil.rmtree(self._place)
        self._place.mkdir()
        for name, data in self._golden.files.items():
            (self._place / name).write_bytes(data)

    def run(self, flips: int) -> Damage:
        """One flip per round in journal and snapshot; in the slot file several, each in another page."""
        while self.damage.flips < flips:
            kind = self._rng.choices(("slots", "journal", "snapshot"), (1, 8, 8))[0]
            if kind == "slots":
                self._slot_round(min(8, flips - self.damage.flips))
            else:
                self._record_round(kind)
        return self.damage

    def _flip(self, name: str, bit: int) -> None:
        with (self._place / name).open("r+b") as file:
            file.seek(bit // 8)
            byte = file.read(1)[0]
            file.seek(bit // 8)
            file.write(bytes([byte ^ 1 << bit % 8]))

    def _slot_round(self, count: int) -> None:
        self._lay_out()
        slots = self._rng.sample(range(SLOTS), count)
        for slot in slots:
            self._flip(self._golden.slots, (slot * PAYLOAD) * 8 + self._rng.randrange(PAYLOAD * 8))
        served, refused, _ = self._reopen()
        hit = {self._number[self._replays[-1][slot]] for slot in slots}
        expected = {self._number[key] for key in self._replays[-1].values()} - hit
        self._judge(served, expected, f"slots {slots}")
        self.damage.missing += abs(refused - count)
        self.damage.flips += count
        self.damage.by["slots: page checksum"] += count

    def _record_round(self, kind: str) -> None:
        self._lay_out()
        name = self._golden.journal if kind == "journal" else self._golden.snapshot
        bit = self._rng.randrange(len(self._golden.files[name]) * 8)
        self._flip(name, bit)
        served, refused, recovered = self._reopen()
        where = f"{kind} bit {bit}"
        whole = {self._number[key] for key in self._replays[-1].values()}
        self.damage.flips += 1
        if bit // 8 >= _HEADER and kind == "journal":
            record = (bit // 8 - _HEADER) // _RECORD
            said = self._replays[record]
            expected = {  # of what the rest says, pages whose slot was not given to another since
                self._number[key]
                for slot, key in said.items()
                if self._replays[-1].get(slot) == key
            }
            self._judge(served, expected, where)
            if recovered != len(said) or refused != len(said) - len(expected):
                self.damage.missing += 1
                self.damage.examples.append(f"{where}: {recovered} recovered, {refused} refused")
            self.damage.by["journal record: record CRC, tail lost"] += 1
        elif bit // 8 >= _HEADER:
            self._judge(served, set(), where)
            self.damage.by["snapshot record: body CRC, owner refused"] += 1
        elif not served:
            self._judge(served, set(), where)
            self.damage.by[f"{kind} header: owner refused"] += 1
        else:
            self._judge(served, whole, where)
            self.damage.by[f"{kind} header padding: harmless"] += 1
            self.damage.missing += int(self._in_checked_header(name, bit // 8))

    def _in_checked_header(self, name: str, byte: int) -> bool:
        length = struct.unpack_from("<I", self._golden.files[name], 12)[0]
        return byte < 20 + int(length)

    def _reopen(self) -> tuple[set[int], int, int]:
        """(keys served, pages refused by checksum, pages recovered) of an engine that adopts the files."""
        engine = open_here(self._setting, SLOTS)
        engine.check()
        recovered = engine.page_count()
        served = set()
        for key, name in enumerate(self._keys):
            memory, buffers = page_memory(1, PAYLOAD)
            if engine.get([name], buffers, soon()) == [True]:
                served.add(key)
                if not np.array_equal(memory[0], self._content[key]):
                    self.damage.wrong += 1
        engine.check()
        self.damage.pages += len(served)
        refused = int(engine._metrics.snapshot().get("corrupt_pages", 0))
        engine.close()
        return served, refused, recovered

    def _judge(self, served: set[int], expected: set[int], where: str) -> None:
        if served != expected:
            self.damage.missing += 1
            self.damage.examples.append(
                f"{where}: lacks {expected - served}, extra {served - expected}"
            )


def flip_bits(directory: Path, flips: int, seed: int) -> Damage:
    """``flips`` single-bit flips; the log's expected complaints are kept quiet."""
    logging.getLogger("flexkv_sglang").setLevel(logging.CRITICAL)
    try:
        return FlipTest(directory, seed).run(flips)
    finally:
        logging.getLogger("flexkv_sglang").setLevel(logging.NOTSET)
