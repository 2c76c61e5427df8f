"""Seeded bugs. Each is one wrong line; the tests named beside it must fail with it, and pass without.

    scripts/mutants            all of them (most of an hour)
    scripts/mutants pin child  those whose name contains one of the words
    scripts/mutants --check    only: does every bug still fit the code?

A bug is applied to a copy of the tree, so a run that is interrupted leaves nothing behind.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = "tests/test_index_model.py"
ENGINE = "tests/test_engine.py"
NEIGHBOURS = "tests/backends/test_neighbours.py"


@dataclass(frozen=True, slots=True)
class Mutant:
    """``old`` occurs exactly once in ``file`` and becomes ``new``; ``tests`` are what must notice."""

    name: str
    file: str
    old: str
    new: str
    tests: str


INDEX = "flexkv_sglang/index.py"
EVICTION = "flexkv_sglang/eviction.py"
CHAINS = "flexkv_sglang/chains.py"


def _elsewhere() -> list[Mutant]:
    """The tables of ``mutants_of_*.py`` beside this file: their ``MUTANTS``, rows of (name, file, old, new, tests)."""
    found: list[Mutant] = []
    for path in sorted(Path(__file__).parent.glob("mutants_of_*.py")):
        found += [Mutant(*row) for row in importlib.import_module(path.stem).MUTANTS]
    return found


MUTANTS = (
    Mutant(
        "evict a pinned page",
        INDEX,
        "return self._pins[slot] == 0 and self._free_slots.is_open(slot)",
        "return self._free_slots.is_open(slot)",
        MODEL,
    ),
    Mutant(
        "evict a page with a child",
        CHAINS,
        "return parent if self.children[parent] == 0 else NO_SLOT",
        "return parent",
        MODEL,
    ),
    Mutant(
        "evict a page with a child after a restart",
        INDEX,
        "slots[children[slots] == 0]",
        "slots",
        MODEL,
    ),
    Mutant(
        "evict pages of the own batch",
        INDEX,
        "self._pins[slot] += 1\n        absent",
        "pass\n        absent",
        MODEL,
    ),
    Mutant(
        "most recently used goes first",
        EVICTION,
        "            last_use[slot] = now\n            if not",
        "            last_use[slot] = (1 << 30) - now\n            if not",
        MODEL,
    ),
    Mutant(
        "use does not protect",
        INDEX,
        "        self._touch_chain(slots)\n        return slots",
        "        return slots",
        "tests/test_index.py",
    ),
    Mutant(
        "a page being written is visible",
        INDEX,
        "SlotId(slot) if slot != NO_SLOT and self._state[slot] == READY",
        "SlotId(slot) if slot != NO_SLOT and self._state[slot] != FREE",
        MODEL,
    ),
    Mutant(
        "a page being written counts in a prefix",
        INDEX,
        "        ready = self._in_state(slots, READY)",
        "        ready = slots != NO_SLOT",
        MODEL,
    ),
    Mutant(
        "abort leaks the slot",
        INDEX,
        "                self._forget(slot)\n            self._free(slot)",
        "                self._forget(slot)",
        MODEL,
    ),
    Mutant(
        "discard frees a slot that is read",
        INDEX,
        "if self._pins[slot]:\n            self._state[slot] = DOOMED",
        "if False:\n            self._state[slot] = DOOMED",
        MODEL,
    ),
    Mutant(
        "clear frees a slot that is written",
        INDEX,
        "if self._state[slot] == WRITING or self._pins[slot]:",
        "if self._pins[slot]:",
        MODEL,
    ),
    Mutant(
        "a parent's count is not reduced",
        CHAINS,
        "        self.children[parent] -= 1\n",
        "",
        MODEL,
    ),
    Mutant(
        "links survive a replaced parent",
        CHAINS,
        "(self._generation[slot] + 1) & 0xFFFFFFFF",
        "(self._generation[slot] + 0) & 0xFFFFFFFF",
        MODEL,
    ),
    Mutant(
        "recovered links are lost",
        CHAINS,
        "np.frombuffer(self.parent, np.int64)[slots[linked]] = parents[linked]",
        "pass",
        MODEL,
    ),
    Mutant(
        "no second look at a neighbour",
        "flexkv_sglang/engine.py",
        "self._neighbours.still_valid(plan.claims), strict=True",
        "[True] * len(plan.claims), strict=True",
        NEIGHBOURS,
    ),
    Mutant(
        "failed pages are committed",
        "flexkv_sglang/engine.py",
        "if moved[i] and alive[i]]",
        "if alive[i]]",
        ENGINE,
    ),
    Mutant(
        "pages of before a clear are committed",
        "flexkv_sglang/engine.py",
        "if moved[i] and alive[i]]",
        "if moved[i]]",
        ENGINE,
    ),
    Mutant(
        "page checksum is not compared",
        "flexkv_sglang/engine.py",
        "page_checksum(kind, keys[row], parts) == sums[row]",
        "page_checksum(kind, keys[row], parts) >= 0",
        ENGINE,
    ),
    Mutant(
        "the key is not part of the checksum",
        "backends/checksum.py",
        'seed=int.from_bytes(key[:8], "little")',
        "seed=0",
        ENGINE,
    ),
    Mutant(
        "less verified pages are adopted",
        "backends/slot_file.py",
        "& np.isin(kinds, list(accepted))",
        "& True",
        ENGINE,
    ),
    Mutant(
        "a neighbour's less verified pages are believed",
        "backends/neighbour.py",
        "length == self._payload_bytes and flags & 0xFF in self._accepted",
        "length == self._payload_bytes",
        ENGINE,
    ),
    Mutant(
        "True behind a hole",
        "flexkv_sglang/engine.py",
        "results = cut_after_first_failure(results)",
        "pass",
        ENGINE,
    ),
    Mutant(
        "a short transfer is a whole page",
        "flexkv_sglang/transfer.py",
        "good = moved == self._wanted",
        "good = moved >= 0",
        "tests/test_transfer.py",
    ),
    Mutant(
        "a refused page reaches its target",
        "flexkv_sglang/transfer.py",
        "                if kept:\n                    self._parts.accept(position)",
        "                self._parts.accept(position)",
        "tests/test_transfer.py",
    ),
    Mutant(
        "unaligned memory goes to O_DIRECT",
        "flexkv_sglang/transfer.py",
        "direct[rows] = addresses_fit[rows]",
        "direct[rows] = True",
        "tests/test_transfer.py",
    ),
    Mutant(
        "a record's CRC is not checked",
        "backends/records.py",
        "return records[: int(wrong.argmax()) if wrong.any() else usable]",
        "return records[:usable]",
        "tests/backends/test_records.py",
    ),
    Mutant(
        "a record's number is not checked",
        "backends/records.py",
        "usable = int(wrong.argmax()) if wrong.any() else usable",
        "pass",
        "tests/backends/test_records.py",
    ),
    Mutant(
        "the snapshot's checksum is not checked",
        "backends/journal.py",
        "or zlib.crc32(body) != header.body_crc",
        "or False",
        "tests/backends/test_journal.py",
    ),
    Mutant(
        "a foreign namespace is adopted",
        "backends/journal.py",
        "if header.namespace != namespace or header.owner",
        "if header.owner",
        "tests/backends/test_journal.py",
    ),
    Mutant(
        "the oldest word on a slot wins",
        "backends/journal.py",
        "position[place] = known",
        "position[place[::-1]] = known[::-1]",
        "tests/backends/test_journal.py",
    ),
    Mutant(
        "CLEAR is not obeyed at recovery",
        "backends/journal.py",
        "if len(clears):",
        "if False:",
        "tests/backends/test_journal.py",
    ),
    Mutant(
        "a torn append stays in the journal",
        "backends/journal.py",
        "            os.ftruncate(self._fd, self._size)\n        except",
        "            pass\n        except",
        "tests/backends/test_journal.py",
    ),
    Mutant(
        "the layout is not part of the namespace",
        "flexkv_sglang/keys.py",
        "text = json.dumps(self.fields(), sort_keys=True)",
        "text = json.dumps(self.fields() | {'layout': ''}, sort_keys=True)",
        "tests/test_keys.py",
    ),
    Mutant(
        "an owner's lock is not taken",
        "backends/ownership.py",
        "fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "tests/backends/test_local_tier.py",
    ),
    *_elsewhere(),
)


def main(words: list[str]) -> int:
    """0 if every chosen mutant was caught."""
    if words == ["--check"]:
        return check()
    chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    survivors = []
    with tempfile.TemporaryDirectory(prefix="flexkv-mutants-") as folder:
        tree = copy_tree(Path(folder))
        tests = " ".join(sorted({m.tests for m in chosen})).split()
        if not passes(tree, sorted(set(tests))):
            print("the tests fail without any mutant")
            return 1
        for number, mutant in enumerate(chosen, 1):
            caught = try_mutant(tree, mutant)
            print(
                f"{number:2}/{len(chosen)} {'caught  ' if caught else 'SURVIVED'} {mutant.name}",
                flush=True,
            )
            if not caught:
                survivors.append(mutant.name)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants caught")
    return 1 if survivors else 0


def check() -> int:
    """0 if every mutant still fits the code; part of ``scripts/check``."""
    stale = [m for m in MUTANTS if (ROOT / m.file).read_text().count(m.old) != 1]
    for mutant in stale:
        print(f"mutant {mutant.name!r} does not fit {mutant.file} any more")
    told = f"{len(MUTANTS)} seeded bugs"
    if told not in (ROOT / "README.md").read_text():
        print(f"README.md does not say {told!r}")
        return 1
    return 1 if stale else 0


def copy_tree(folder: Path) -> Path:
    """The tree, and a folder for PYTHONPATH with nothing but the package in it."""
    tree = folder / "tree"
    names = (
        "flexkv_sglang",
        "backends",
        "triton_kernels",
        "benchmarks",
        "scripts",
        "tests",
        "setup.cfg",
    )
    tree.mkdir()
    for name in names:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, symlinks=True)
        else:
            shutil.copy(source, tree / name)
    (folder / "site").mkdir()
    (folder / "site" / "flexkv_sglang").symlink_to(tree / "flexkv_sglang")
    return tree


def try_mutant(tree: Path, mutant: Mutant) -> bool:
    path = tree / mutant.file
    whole = path.read_text()
    found = whole.count(mutant.old)
    if found != 1:
        raise SystemExit(f"mutant {mutant.name!r}: its line occurs {found} times in {mutant.file}")
    path.write_text(whole.replace(mutant.old, mutant.new))
    try:
        return not passes(tree, mutant.tests.split())
    finally:
        path.write_text(whole)


def passes(tree: Path, tests: list[str]) -> bool:
    """Do these tests pass in ``tree``? Errors that are no test failures are reported, not counted."""
    run = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
        cwd=tree,
        env={
            "PYTHONPATH": str(tree.parent / "site"),
            "PATH": "/usr/bin:/bin",
            "HYPOTHESIS_PROFILE": "mutants",
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    failed = run.stdout.rstrip().rpartition("\n")[2].partition(" failed")[1] != ""
    if run.returncode < 0 and failed:  # torch may crash at exit what a failed test still holds
        return False
    if run.returncode not in (0, 1):
        raise SystemExit(f"pytest could not run {tests}:\n{run.stdout[-3000:]}{run.stderr[-1000:]}")
    return run.returncode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
