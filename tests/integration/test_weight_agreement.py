"""The agreement of the ranks of one server after a weight update, in a real process group of two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SUPPORT = Path(__file__).parents[1] / "support" / "sglang_bed"

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
    first, second = _both(
        "agreement_rank.py", tmp_path, [(contents[rank], clean[rank]) for rank in range(2)]
    )
    assert first == second
    assert (first["content"], first["clean"]) == expected
    assert bool(first["nonce"]) is (expected[0] == "")


@pytest.mark.parametrize("first", ["attach", "update"])
def test_a_rank_that_could_not_attach_still_takes_part(tmp_path: Path, first: str) -> None:
    """SGLang leaves the others attached, and their exchange must not meet its next collective."""
    one, other = _both("attach_rank.py", tmp_path, [(first,)] * 2)
    assert one == other
    assert one["agreed"]
    assert one["nonce"]
    assert one["ranks"] == ["0", "1"]


def _both(program: str, place: Path, words: list[tuple[str, ...]]) -> list[dict[str, Any]]:
    ranks = [
        subprocess.Popen(
            [sys.executable, SUPPORT / program, place, str(rank), *words[rank]],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    return [json.loads(text.splitlines()[-1]) for text in said]
