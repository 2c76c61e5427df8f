"""What the ranks of one server agree on after a weight update, in a real process group of two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import agreeing

pytestmark = [pytest.mark.sglang, pytest.mark.slow]


@pytest.mark.parametrize(
    ("contents", "clean", "expected"),
    [
        (("x", "x"), ("clean", "clean"), ("x", True)),
        (("x", ""), ("clean", "clean"), ("", True)),
        (("x", "y"), ("clean", "clean"), ("", True)),
        (("x", "x"), ("clean", "dirty"), ("x", False)),
    ],
)
def test_ranks_agree_on_a_content_only_if_all_have_it(
    tmp_path: Path, contents: list[str], clean: list[str], expected: tuple[str, bool]
) -> None:
    """Two processes in a real process group."""
    ranks = [
        subprocess.Popen(
            [sys.executable, agreeing.__file__, tmp_path, str(rank), contents[rank], clean[rank]],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    first, second = (json.loads(rank.communicate(timeout=120)[0]) for rank in ranks)
    assert first == second
    assert (first["content"], first["clean"]) == expected
    assert bool(first["nonce"]) is (expected[0] == "")
