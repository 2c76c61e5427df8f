"""The tests of this folder with the kernels themselves: in Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
FILES = (
    "kernels_alone.py",
    "test_copies.py",
    "test_heads.py",
    "test_checksum.py",
    "test_exponents.py",
    "test_quant.py",
)


def run(file: str, way: str, environment: dict[str, str]) -> None:
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"--kernels-on={way}", str(HERE / file)],
        cwd=HERE.parents[1],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    last = done.stdout.strip().splitlines()[-1]
    assert re.match(r"\d+ passed", last), last
    assert "skipped" not in last


@pytest.mark.parametrize("file", FILES)
def test_kernels_in_the_interpreter(file: str) -> None:
    run(file, "interpreter", {"TRITON_INTERPRET": "1"})


@pytest.mark.gpu
@pytest.mark.parametrize("file", FILES)
def test_kernels_on_a_gpu(file: str) -> None:
    run(file, "cuda", {})
