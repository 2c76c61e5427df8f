"""Seeded bugs. Each is one wrong line; the tests named beside it must fail with it, and pass without.

    scripts/mutants            all of them (most of an hour)
    scripts/mutants pin child  those whose name contains one of the words
    scripts/mutants --part 1/2 every second one: two runs side by side take half the time
    scripts/mutants --check    only: does every bug still fit the code?

A bug is applied to a copy of the tree, so a run that is interrupted leaves nothing behind.
"""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Mutant:
    """``old`` occurs exactly once in ``file`` and becomes ``new``; ``tests`` are what must notice."""

    name: str
    file: str
    old: str
    new: str
    tests: str


def _tables() -> tuple[Mutant, ...]:
    """The rows of every table beside this file: (name, file, old, new, tests)."""
    found: list[Mutant] = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path != Path(__file__):
            found += [Mutant(*row) for row in runpy.run_path(str(path))["MUTANTS"]]
    return tuple(found)


MUTANTS = _tables()


def main(words: list[str]) -> int:
    """0 if every chosen mutant was caught."""
    if words == ["--check"]:
        return check()
    chosen = _chosen(words)
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


def _chosen(words: list[str]) -> list[Mutant]:
    if words[:1] == ["--part"]:
        part, parts = map(int, words[1].split("/"))
        return list(MUTANTS[part - 1 :: parts])
    return [m for m in MUTANTS if not words or any(word in m.name for word in words)]


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
        errors="replace",
        timeout=900,
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
