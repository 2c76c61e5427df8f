"""The writer is killed at any moment; four reader processes never see a page that was not there."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flexkv_sglang.backends.failpoints import Failpoint
from nodes import replica_child

READERS, KILLS = 4, 24
POINTS = (Failpoint.REPLICA_WRITTEN, Failpoint.REPLICA_RENAMED, Failpoint.REPLICA_KNOWN)


def start_writer(run_dir: Path, seed: int, point: Failpoint | None) -> int:
    """Fork a writer; return its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            replica_child.write(str(run_dir), seed, point)
        finally:
            os._exit(1)
    return pid


def kill_one(run_dir: Path, draw: random.Random) -> None:
    """One writer's life, at most half a second."""
    point = draw.choice((None, *POINTS))
    pid = start_writer(run_dir, draw.getrandbits(32), point)
    if point is None:
        time.sleep(draw.uniform(0.001, 0.1))  # the moment is random
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), "the writer ended by itself"


@pytest.mark.crash
def test_a_killed_writer_leaves_every_reader_right(shm_path: Path) -> None:
    seed = random.SystemRandom().getrandbits(32)
    draw, run_dir = random.Random(seed), shm_path / "run"
    script = str(Path(replica_child.__file__))
    readers = [
        subprocess.Popen(
            [sys.executable, script, str(run_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(READERS)
    ]
    try:
        for reader in readers:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "ready\n"
        found = 0
        for number in range(1, KILLS + 1):
            kill_one(run_dir, draw)
            if number % 6:
                continue
            held = replica_child.settle(str(run_dir), draw.getrandbits(32))
            for reader in readers:
                assert reader.stdin is not None
                print(json.dumps(held), file=reader.stdin, flush=True)
            for reader in readers:
                assert reader.stdout is not None
                answer = json.loads(reader.stdout.readline())
                assert answer["wrong"] == [], f"seed {seed}"
                assert answer["settled"], f"seed {seed}"
                found += answer["found"]
        assert found, f"no reader ever saw a page (seed {seed})"
    finally:
        for reader in readers:
            reader.kill()
            reader.communicate()
