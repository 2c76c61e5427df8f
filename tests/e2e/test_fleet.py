"""Real SGLang servers on three hosts share a prompt; a server is stopped, a cable is cut. The demo is the test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
_CANNOT = 3


def test_three_hosts_one_cache(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "flexkv_bed.cluster_demo", "--dir", str(tmp_path / "d")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=570, check=False)
    story = json.loads(done.stdout.splitlines()[-1])
    if done.returncode == _CANNOT:
        pytest.skip(story["error"])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    whole = story["reusable_tokens"]
    assert story["h2_storage_tokens"] == whole
    assert story["h3_storage_tokens_after_h1_stopped"] == whole
    assert story["storage_tokens_while_cut"] == 0
    assert story["storage_tokens_after_heal"] == whole
    assert story["outputs_equal"]
