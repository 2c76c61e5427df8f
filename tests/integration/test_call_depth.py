"""How many frames lie between SGLang's call and the system call that moves the bytes (issue 12: at most 14)."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from flexkv_sglang import FlexKVStorage
from flexkv_sglang.backends.io import uring
from models.plain_pools import KVPool, config, names, tokens

pytestmark = pytest.mark.sglang

MOST = 14
PAGES = 16


def depths(monkeypatch: pytest.MonkeyPatch, call: Any) -> list[int]:
    """Frames of each ``io_uring_enter`` during ``call()``: from the method of the storage to the system call."""
    found: list[int] = []
    real = uring.syscall
    own = len(inspect.stack(0)) + 1  # this function and the lambda that calls

    def counted(number: int, *arguments: Any) -> int:
        if number == uring.NR_ENTER:
            found.append(len(inspect.stack(0)) - own)
        return int(real(number, *arguments))

    monkeypatch.setattr(uring, "syscall", counted)
    call()
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("shift", [0, 1], ids=["straight", "through the slab"])
def test_at_most_fourteen_frames_from_the_storage_to_the_system_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: int
) -> None:
    storage = FlexKVStorage(config(tmp_path, io_engine="io_uring"), {})
    storage.register_mem_pool_host(pool := KVPool(seed=1))
    pool._base += shift  # unaligned memory is copied
    indices = tokens(*range(PAGES))
    keys = names(PAGES)
    written = depths(monkeypatch, lambda: storage.batch_set_v1(keys, indices))
    done: list[bool] = []
    read = depths(monkeypatch, lambda: done.extend(storage.batch_get_v1(keys, indices)))
    copied = storage.metrics.snapshot().get("copied_pages", 0)
    storage.close()
    assert (done, copied) == ([True] * PAGES, 2 * PAGES * shift)
    assert 1 < max(read) <= MOST, (read, written)
    assert 1 < max(written) <= MOST, written
