"""The contract suite on two older SGLang releases: the oldest supported, and one in the middle.

All of them: ``scripts/test-versions``. The installed release runs ``tests/contract`` itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.sglang
@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.5.11", "0.5.20"])
def test_the_contract_holds_with_an_older_sglang(version: str) -> None:
    """Fails if the wheel cannot be had: a release that nobody looked at is not supported."""
    command = [sys.executable, str(ROOT / "scripts" / "test_versions.py"), version]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-12000:] + done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["versions"][version]["passed"] > 40
