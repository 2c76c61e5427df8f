"""One set of tests, three ways to run it: in torch (as part of the suite), in Triton's interpreter, on a GPU.

The interpreter is chosen by a variable that triton reads when a kernel is defined, so it has a process of its own:
``test_other_ways.py`` starts it.
"""

from __future__ import annotations

import os

import pytest
import torch

from flexkv_sglang.triton_kernels import dispatch


@pytest.fixture(autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The implementation of the public functions in this run."""
    chosen = str(request.config.getoption("--kernels-on"))
    if chosen == "interpreter":
        assert os.environ.get("TRITON_INTERPRET") == "1"
        monkeypatch.setattr(dispatch, "runs_kernels", lambda device: True)
    else:
        assert "TRITON_INTERPRET" not in os.environ
    if chosen == "cuda":
        assert dispatch.runs_kernels(torch.device("cuda"))
    return chosen


@pytest.fixture
def device(way: str) -> torch.device:
    """The device of the tensors of a test."""
    return torch.device("cuda", 0) if way == "cuda" else torch.device("cpu")
