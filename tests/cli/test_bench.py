"""``flexkv bench ssd`` as a command, on the real disk, beside fio."""

from __future__ import annotations

from pathlib import Path

import pytest

from stores.command import flexkv


@pytest.mark.slow
@pytest.mark.sglang
def test_bench_compares_with_fio_and_leaves_nothing(tmp_path: Path) -> None:
    sizes = ("--page-bytes", 1 << 20, "--seconds", 0.1)
    output = flexkv("bench", "ssd", tmp_path, *sizes, "--against", "fio", "--json")
    assert output.code == 0, output.errors
    ratio = output.json["ratio"]
    assert set(ratio) == {"read", "write"}
    assert all(set(peers) == {"fio"} and peers["fio"] > 0 for peers in ratio.values())
    cases = {(case["direction"], case["contender"]): case for case in output.json["cases"]}
    assert cases["read", "flexkv"]["cpu_s_per_gb"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value", "valid"),
    [("--against", "fio,rsync", "fio, fio-plain, file, nixl"), ("--page-bytes", "5000", "8192")],
)
def test_bench_says_what_is_valid(tmp_path: Path, option: str, value: str, valid: str) -> None:
    output = flexkv("bench", "ssd", tmp_path, option, value)
    assert output.code == 2
    assert valid in output.errors
