"""CI-sized pieces of the kill campaign, the bit flips and the soak. The long runs: docs/TESTING.md."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from damage import flip_bits
from soaking import soak

ROOT = Path(__file__).resolve().parents[2]
SEED = int.from_bytes(random.SystemRandom().randbytes(3))  # printed by a failure; differs each run


@pytest.mark.crash
@pytest.mark.slow
@pytest.mark.parametrize("scene", ["roomy", "tight", "resize", "pair"])
def test_killed_again_and_again_nothing_is_wrong_or_lost(tmp_path: Path, scene: str) -> None:
    """In an interpreter of its own: children are forked from it, and it must not have any threads."""
    command = [sys.executable, str(ROOT / "scripts" / "crash.py"), "--kills", "20"]
    command += ["--scene", scene, "--seed", str(SEED), "--dir", str(tmp_path)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    environment = {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"seed {SEED}: {done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] >= 20
    assert result["checked"] > 0
    assert result["acknowledged"] > 0


@pytest.mark.slow
def test_a_flipped_bit_is_refused_or_harmless_and_costs_what_it_must(tmp_path: Path) -> None:
    damage = flip_bits(tmp_path, 300, SEED)
    assert (damage.wrong, damage.missing, damage.examples) == (0, 0, []), f"seed {SEED}"
    assert damage.flips == 300
    assert damage.pages > 0
    assert sum(damage.by.values()) == 300


@pytest.mark.slow
def test_a_random_life_with_faults_and_races_keeps_every_invariant(tmp_path: Path) -> None:
    report = soak(tmp_path, 2400, SEED, segment_steps=600, slack_s=30.0)
    assert report.problems == [], f"seed {SEED}"
    assert len(report.engines) == 4
    assert report.steps == 2400
    assert report.pages_compared > 1000
    assert report.refused > 0  # the planted corruption was met, and refused
