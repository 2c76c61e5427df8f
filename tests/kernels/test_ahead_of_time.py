"""Every kernel compiles for GPUs that this machine lacks, with 16-byte accesses, no spilled registers, and one binary
for all run-time values.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from models import ahead_of_time

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(ahead_of_time.__file__)
    done = subprocess.run(
        [sys.executable, "-P", str(script), *TARGETS],
        env=environment,
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[dict[str, Any]] = json.loads(done.stdout)
    assert {kernel["target"] for kernel in found} == set(TARGETS)
    assert len(found) >= 7 * len(TARGETS)
    return found


def test_they_compile_well(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        assert kernel["binary_bytes"] > 1000, kernel
        assert kernel["spilled"] == 0, kernel
        assert set(kernel["specialized"]) <= set(ahead_of_time.POINTERS), kernel
        if kernel["name"] != "odd rows of 4":
            assert kernel["wide_loads"] == kernel["wide_stores"] > 0, kernel
            assert kernel["narrow"] == 0, kernel
