"""Damaged, foreign and swapped files cause misses and a log line, never wrong bytes; the store goes on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv_sglang.cache.engine import CacheEngine
from stores.engines import Bytes, keys, open_engine, page_memory, soon

PAGE = 8192
SLOTS = 16


def stored(directory: Path, count: int = 12, seed: int = 0, namespace: str = "ns") -> Bytes:
    """A closed store with a snapshot (12 pages) and a journal; returns the pages' bytes."""
    source, buffers = page_memory(count, PAGE, seed=seed)
    for _ in range(2):  # the second start makes the snapshot
        engine = open_engine(directory, PAGE, SLOTS * PAGE, namespace=namespace)
        assert all(engine.put(keys(count, seed), buffers, None, soon()))
        engine.close()
    return source


def served_right(engine: CacheEngine, source: Bytes, seed: int = 0) -> int:
    """Number of pages of ``source`` that are served, after comparing each."""
    count = 0
    for i, key in enumerate(keys(len(source), seed)):
        target, buffers = page_memory(1, PAGE)
        if engine.get([key], buffers, soon()) == [True]:
            assert np.array_equal(target[0], source[i]), f"wrong bytes for page {i}"
            count += 1
    engine.check()
    return count


def works(engine: CacheEngine) -> None:
    source, buffers = page_memory(SLOTS, PAGE, seed=77)
    assert all(engine.put(keys(SLOTS, 77), buffers, None, soon()))
    assert served_right(engine, source, 77) == SLOTS


def one(directory: Path, ending: str) -> Path:
    (path,) = directory.rglob(f"*{ending}")
    return path


def change(path: Path, edit: Callable[[bytearray], None]) -> None:
    data = bytearray(path.read_bytes())
    edit(data)
    path.write_bytes(data)


def zero(data: bytearray) -> None:
    data[:] = bytes(len(data))


def other_version(data: bytearray) -> None:
    data[8] += 1


def half(data: bytearray) -> None:
    del data[len(data) // 2 :]


DAMAGE: list[tuple[str, str, Any, int]] = [
    ("zeroed slots", ".slots", zero, 0),
    ("zeroed journal", ".journal", zero, 0),
    ("zeroed snapshot", ".snap", zero, 0),
    ("cut slots", ".slots", half, SLOTS // 2),
    ("cut journal header", ".journal", half, 0),
    ("cut snapshot", ".snap", half, 0),
    ("empty journal", ".journal", bytearray.clear, 0),
    ("journal of another version", ".journal", other_version, 0),
    ("snapshot of another version", ".snap", other_version, 0),
    ("no record behind the snapshot", ".journal", lambda data: data.__delitem__(slice(4096, None)), 12),
    ("torn record", ".journal", lambda data: data.extend(b"\x01" * 63), 12),
    ("rubbish behind the journal", ".journal", lambda data: data.extend(os.urandom(640)), 12),
]  # fmt: skip


@pytest.mark.parametrize(
    ("ending", "edit", "kept"), [d[1:] for d in DAMAGE], ids=[d[0] for d in DAMAGE]
)
def test_a_damaged_file_costs_pages_and_never_bytes(
    tmp_path: Path, ending: str, edit: Callable[[bytearray], None], kept: int
) -> None:
    source = stored(tmp_path)
    change(one(tmp_path, ending), edit)
    engine = open_engine(tmp_path, PAGE, SLOTS * PAGE)
    assert served_right(engine, source) == kept
    works(engine)
    engine.close()


def test_a_missing_slot_file_is_a_miss(tmp_path: Path) -> None:
    source = stored(tmp_path)
    one(tmp_path, ".slots").unlink()
    engine = open_engine(tmp_path, PAGE, SLOTS * PAGE)
    assert served_right(engine, source) == 0
    works(engine)
    engine.close()


def test_a_directory_copied_from_another_model_is_not_read(tmp_path: Path) -> None:
    source = stored(tmp_path, namespace="model-a")
    shutil.copytree(tmp_path / "model-a", tmp_path / "model-b")
    engine = open_engine(tmp_path, PAGE, SLOTS * PAGE, namespace="model-b")
    assert served_right(engine, source) == 0
    assert engine.neighbour_page_count() == 0
    works(engine)
    engine.close()
    engine = open_engine(tmp_path, PAGE, SLOTS * PAGE, namespace="model-a")
    assert served_right(engine, source) == 12
    engine.close()


@pytest.mark.parametrize("ending", [".slots", ".journal", ".snap"])
def test_files_of_two_owners_that_changed_places_are_refused(tmp_path: Path, ending: str) -> None:
    for seed, name in ((0, "a"), (1, "b")):
        source = stored(tmp_path / name, seed=seed)
        assert len(source) == 12
    for path in (tmp_path / "b" / "ns").iterdir():
        path.rename(tmp_path / "a" / "ns" / path.name)
    first, second = (tmp_path / "a" / "ns").glob(f"*{ending}")
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    engine = open_engine(tmp_path / "a", PAGE, 2 * SLOTS * PAGE)
    for seed in (0, 1):
        source, _ = page_memory(12, PAGE, seed=seed)
        assert served_right(engine, source, seed) == 0
    works(engine)
    engine.close()
