"""Out of descriptors, threads or memory, and interrupted calls: pages miss for as long as that lasts, and no longer."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from flexkv_sglang.backends.io import pinned_memory
from flexkv_sglang.backends.io.posix_io import PosixIo
from flexkv_sglang.backends.io.probe import make_engine
from flexkv_sglang.backends.io.transfer import IoEngine, PageTransfer
from flexkv_sglang.backends.slots import breaker
from stores.engines import keys, open_engine, page_memory, soon, wait_until

PAGE = 8192

_NO_DESCRIPTORS = """
import json, logging, resource, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from stores.engines import keys, open_engine, page_memory, soon, wait_until

PAGE = 8192
logging.basicConfig(level=logging.WARNING)
engine = open_engine(Path(sys.argv[1]), PAGE, 256 * PAGE)
kept, source = page_memory(50, PAGE, seed=1)
read, target = page_memory(50, PAGE)

def put(seed):
    return sum(engine.put(keys(50, seed), source, None, soon(5)))

def got(seed):
    return sum(engine.get(keys(50, seed), target, soon(5)))

engine.prepare(target.take([0]))
seen = {"before": put(0)}
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
time.sleep(1.0)  # some rounds of upkeep fail
seen["in want"] = got(0)
resource.setrlimit(resource.RLIMIT_NOFILE, limits)
seen["after"] = wait_until(lambda: put(1) == 50 and got(1) == 50 and got(0) == 50, 40)
engine.check()
engine.close()
print(json.dumps(seen))
"""


def test_out_of_descriptors(tmp_path: Path) -> None:
    support = str(Path(__file__).resolve().parents[1] / "support")
    done = subprocess.run(
        [sys.executable, "-P", "-c", _NO_DESCRIPTORS, str(tmp_path), support],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"before": 50, "in want": 50, "after": True}, done.stderr


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EMFILE, errno.EINTR, errno.EAGAIN])
def test_calls_that_fail_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(breaker, "_PAUSE_S", 0.1)
    failing = [False]

    def make(kind: str, traffic: Any = None) -> IoEngine:
        engine = make_engine(kind, traffic)
        move = engine.move

        def moved(transfer: PageTransfer) -> None:
            if failing[0]:
                raise OSError(code, "planted")
            move(transfer)

        engine.move = moved  # type: ignore[method-assign]
        return engine

    engine = open_engine(tmp_path, PAGE, 128 * PAGE, make=make)
    _kept, source = page_memory(10, PAGE, seed=1)
    _read, target = page_memory(10, PAGE)
    assert all(engine.put(keys(10), source, None, soon()))
    failing[0] = True
    for seed in range(1, 5):
        assert not any(engine.get(keys(10), target, soon()))
        assert not any(engine.put(keys(10, seed), source, None, soon()))
    failing[0] = False
    assert wait_until(lambda: all(engine.get(keys(10), target, soon())))
    assert wait_until(lambda: all(engine.put(keys(10, 1), source, None, soon())))
    engine.check()
    engine.close()


def test_no_thread_to_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is not made, and no half of a transfer is left behind; the next call makes it."""
    start, left = threading.Thread.start, [4]

    def refused(thread: threading.Thread) -> None:
        if thread.name.startswith("flexkv-io"):
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("can't start new thread")
        start(thread)

    engine = open_engine(tmp_path, PAGE, 128 * PAGE, io_engine="buffered")
    _kept, source = page_memory(10, PAGE, seed=1)
    _read, target = page_memory(10, PAGE)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        with pytest.raises(OSError, match="cannot be started"):
            PosixIo()
        assert not any(engine.put(keys(10), source, None, soon()))
    assert all(engine.put(keys(10), source, None, soon()))
    assert all(engine.get(keys(10), target, soon()))
    engine.close()


def test_pinning_that_was_interrupted_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    array, buffers = page_memory(4, PAGE, seed=1)
    memory = pinned_memory.PinnedMemory()
    memory.announce(-1, array.ctypes.data, array.nbytes)
    tried: list[int] = []

    def pin(_fd: int, entry: int, _address: int, _byte_count: int) -> None:
        tried.append(entry)
        if len(tried) == 1:
            raise InterruptedError(errno.EINTR, "planted")

    monkeypatch.setattr(pinned_memory, "make_buffer_table", lambda *_: None)
    monkeypatch.setattr(pinned_memory, "pin_buffer", pin)
    addresses, lengths = buffers.addresses[:, 0], buffers.lengths.repeat(4)
    for pinned in (0, array.nbytes):
        assert memory.ask(addresses, lengths) == [0]
        memory.pin(-1, 0)
        assert memory.pinned_bytes == pinned
    assert memory.ask(addresses, lengths) == []
