"""The tests of this folder with the kernels themselves: in Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

HERE = pathlib.Path(__file__).parent
FILES = ("kernels_alone.py", "test_copies.py")
TESTS_MIN = 50
"""There are more; fewer would mean that pytest does not find some of them."""


def run(way: str, environment: dict[str, str]) -> None:
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"--kernels-on={way}", *(str(HERE / file) for file in FILES)],
        cwd=HERE.parents[1],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    last = done.stdout.strip().splitlines()[-1]
    passed = re.fullmatch(r"(\d+) passed in .*", last)
    assert passed is not None, last  # nothing skipped either
    assert int(passed[1]) >= TESTS_MIN, last


@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    run("interpreter", {"TRITON_INTERPRET": "1"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_kernels_on_a_gpu() -> None:
    run("cuda", {})
