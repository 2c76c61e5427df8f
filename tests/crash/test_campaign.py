"""CI-sized pieces of the kill campaign, the bit flips and the soak. The long runs: docs/TESTING.md."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stores.damage import flip_bits
from stores.soak_run import soak

ROOT = Path(__file__).resolve().parents[2]
SEED = int.from_bytes(random.SystemRandom().randbytes(3))  # printed by a failure; differs each run


def alone(script: str, *words: str) -> dict[str, Any]:
    """Run a campaign in an interpreter of its own, which may fork; its JSON line."""
    command = [sys.executable, str(ROOT / "scripts" / script), *words, "--seed", str(SEED)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    environment = {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"seed {SEED}: {done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.crash
@pytest.mark.slow
@pytest.mark.parametrize("scene", ["roomy", "tight", "resize", "pair"])
def test_repeated_kills_make_no_page_wrong_or_lost(tmp_path: Path, scene: str) -> None:
    """The campaign forks children, so it needs an interpreter without threads."""
    result = alone("crash.py", "--kills", "20", "--scene", scene, "--dir", str(tmp_path))
    assert result["kills"] >= 20
    assert result["checked"] > 0
    assert result["acknowledged"] > 0


@pytest.mark.crash
@pytest.mark.slow
def test_processes_that_are_killed_read_only_right_pages_of_each_other(tmp_path: Path) -> None:
    """Four on one directory; half of the time without checksums. Docs: ``stressing``."""
    result = alone("stress.py", "--minutes", "0.25", "--dir", str(tmp_path))
    assert len(result["phases"]) == 4
    for what in ("kills", "adoptions", "rotations", "evicted", "read_own", "read_neighbour"):
        assert result[what] > 0, f"{what}: this run shows nothing"
    assert result["verified"] > 0
    assert result["rejected"] > 0, "no slot was rewritten while it was read: this run shows nothing"


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
