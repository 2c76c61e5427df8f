"""Under SGLang's real radix tree and wrapper: ``tests/support/sglang_bed/linked_tree.py``, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flexkv_bed.tiny_model import write_config

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

TOKENS = {"full": 96, "swa": 96, "mamba": 6}
PROGRAM = Path(__file__).parents[1] / "support" / "sglang_bed" / "linked_tree.py"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("tree")
    model = write_config(tmp_path_factory.mktemp("model"))
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", str(PROGRAM), str(place), str(model)],
        env={**os.environ, "SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": str(PROGRAM.parent)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", TOKENS)
def test_a_prompt_is_offloaded_and_loaded_byte_for_byte(seen: dict[str, Any], name: str) -> None:
    case = seen[name]
    tokens = TOKENS[name]
    assert case["pending"] == 0
    assert case["seen"] == {"hit": tokens, "loaded": tokens, "failed": 0}
    assert case["same"]
    assert all(case["same"])


@pytest.mark.parametrize("name", TOKENS)
def test_what_is_not_there_or_not_ours_is_no_hit(seen: dict[str, Any], name: str) -> None:
    case = seen[name]
    assert case["nothing"] == {"hit": 0}
    assert case["neighbour"] == 0  # the first lookup: it may be gone when it is loaded
    assert case["lost"] == 0


@pytest.mark.parametrize("name", TOKENS)
def test_pages_survive_a_flush_of_the_cache(seen: dict[str, Any], name: str) -> None:
    assert seen[name]["after_reset"] == TOKENS[name]
