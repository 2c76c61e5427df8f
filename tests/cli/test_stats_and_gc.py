"""``flexkv stats`` and ``flexkv gc``, as commands, beside live and dead engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flexkv_sglang.backends.slots.ownership import owners
from flexkv_sglang.identity.keys import Identity
from stores.command import die_after_put, flexkv
from stores.engines import open_engine, wait_until

PAGE = 8192
ALL = ("--older-than", "0s")


def test_stats_of_a_live_and_a_dead_owner(tmp_path: Path) -> None:
    die_after_put(tmp_path, PAGE, 20)
    die_after_put(tmp_path, PAGE, 5, namespace="other")
    engine = open_engine(tmp_path, PAGE, 64 * PAGE)
    engine._metrics.count("asked_pages", 8)
    engine._metrics.count("found_pages", 6)
    assert wait_until(lambda: '"asked_pages": 8' in flexkv("stats", tmp_path, "--json").text)
    output = flexkv("stats", tmp_path)
    assert "hit rate 75.0 % (6 of 8 pages asked for)" in output.text
    assert "free" in output.text.splitlines()[-1]
    fields = flexkv("stats", tmp_path, "--json").json
    first, second = fields["namespaces"]
    assert (first["namespace"], second["namespace"]) == ("ns", "other")
    assert first["hit_rate"] == 0.75
    assert [(o["alive"], o["pages"], o["slots"]) for o in first["owners"]] == [(True, 20, 64)]
    assert [(o["alive"], o["pages"]) for o in second["owners"]] == [(False, 5)]
    assert first["owners"][0]["page_bytes"] == PAGE
    assert first["owners"][0]["disk_bytes"] >= 64 * PAGE
    assert second["hit_rate"] is None
    assert fields["disk_free_bytes"] > 0
    engine.close()


def test_counters_of_a_process_with_several_owners_count_once(tmp_path: Path) -> None:
    die_after_put(tmp_path, PAGE, 20)
    small = open_engine(tmp_path, PAGE, 96 * PAGE)  # the adopted owner and a new one
    small._metrics.count("asked_pages", 8)
    small.close()
    fields = flexkv("stats", tmp_path, "--json").json["namespaces"][0]
    assert len([owner for owner in fields["owners"] if owner["stats"]]) == 2
    assert fields["counters"]["asked_pages"] == 8


def test_stats_says_which_model(tmp_path: Path) -> None:
    open_engine(tmp_path, PAGE, 64 * PAGE).close()
    (tmp_path / "ns" / "NAMESPACE.json").write_text(
        '{"model": "id:tiny", "dtype": "bf16", "layout": "page_first", "page_size": 16, "tp": [1, 2], '
        '"pool": "mamba", "unstored": {"swa": "no flat pages"}}'
    )
    line, *details = flexkv("stats", tmp_path).text.splitlines()
    assert "  pool swa is not stored: no flat pages" in details
    assert line == "ns  id:tiny bf16 page_first pool=mamba page_size=16 tp=1/2"


def test_stats_shows_every_field_of_the_identity(tmp_path: Path) -> None:
    identity = Identity(
        model=f"config:{'0a' * 16} weights:{'1b' * 16}",
        settings={"load_format": "auto", "quantization": "fp8"},
        pool="kv",
        pool_class="MHATokenToKVPoolHost",
        dtype="torch.uint8",
        layout="page_first",
        page_size=16,
        buffer_bytes=(4096, 4096),
        geometry={"head_num": 2, "head_dim": 32},
        first_layer=4,
        layer_count=8,
        tp=(1, 2),
        pp=(1, 2),
        attn_cp=(1, 2),
        dcp=(1, 2),
        split_heads=4,
        storage_format_tag="token-major",
        epoch="ab" * 16,
    )
    open_engine(tmp_path, PAGE, 64 * PAGE).close()
    text = json.dumps({"namespace": identity.namespace, **identity.fields()})
    (tmp_path / "ns" / "NAMESPACE.json").write_text(text)
    lines = flexkv("stats", tmp_path).text.splitlines()
    assert lines[0] == (
        "ns  config:0a0a0a0a weights:1b1b1b1b torch.uint8 page_first page_size=16 "
        "tp=1/2 pp=1/2 attn_cp=1/2 dcp=1/2"
    )
    assert lines[1] == (
        f"  buffer_bytes=4096,4096 epoch={'ab' * 16} (weights updated in a running server: no other "
        "server can use them) first_layer=4 format=1 head_dim=32 head_num=2 layer_count=8 pool=kv "
        "pool_class=MHATokenToKVPoolHost split_heads=4 storage_format_tag=token-major"
    )
    assert lines[2] == "  settings: load_format=auto quantization=fp8"
    shown = flexkv("stats", tmp_path, "--json").json["namespaces"][0]["identity"]
    assert shown == json.loads(text)


def test_gc_without_a_selector_only_shows(tmp_path: Path) -> None:
    die_after_put(tmp_path, PAGE, 5)
    output = flexkv("gc", tmp_path, "--yes")
    assert output.code == 0
    assert "1 dead owner," in output.text
    assert "Nothing removed" in output.text
    assert owners(tmp_path / "ns")


def test_gc_asks_and_removes_nothing_without_a_terminal(tmp_path: Path) -> None:
    die_after_put(tmp_path, PAGE, 5)
    assert flexkv("gc", tmp_path, *ALL).code == 2
    assert flexkv("gc", tmp_path, *ALL, "--dry-run", "--yes").code == 0
    assert owners(tmp_path / "ns")


def test_gc_removes_dead_owners_whole_and_leaves_live_ones(tmp_path: Path) -> None:
    engine = open_engine(tmp_path, PAGE, 32 * PAGE)
    die_after_put(tmp_path, PAGE, 5, seed=1)
    (alive,) = [store.lock.owner for store in engine._tier.stores]
    before = sum(path.stat().st_size for path in tmp_path.rglob("*"))
    output = flexkv("gc", tmp_path, *ALL, "--yes", "--json")
    assert output.code == 0
    assert output.json["alive"] == 1
    assert len(output.json["removed"]) == 1
    assert output.json["freed_bytes"] >= 64 * PAGE
    assert before - sum(path.stat().st_size for path in tmp_path.rglob("*")) >= 64 * PAGE
    assert {path.name.partition(".")[0] for path in (tmp_path / "ns").iterdir()} == {
        alive,
        "NAMESPACE",
    }
    assert flexkv("check", tmp_path).code == 0
    engine.close()


def test_gc_of_one_namespace_leaves_the_others(tmp_path: Path) -> None:
    for name in ("first", "fifth", "second"):
        die_after_put(tmp_path, PAGE, 2, namespace=name)
    ambiguous = flexkv("gc", tmp_path, "--namespace", "fi", "--yes")
    assert ambiguous.code == 2
    assert "fifth, first" in ambiguous.errors
    assert flexkv("gc", tmp_path, "--namespace", "sec", "--yes").code == 0
    assert [bool(owners(tmp_path / name)) for name in ("first", "fifth", "second")] == [1, 1, 0]


def test_gc_by_age_takes_only_untouched_owners(tmp_path: Path) -> None:
    die_after_put(tmp_path, PAGE, 2, namespace="old")
    die_after_put(tmp_path, PAGE, 2, namespace="new")
    for path in (tmp_path / "old").iterdir():
        os.utime(path, (time.time() - 8 * 86400,) * 2)
    assert flexkv("gc", tmp_path, "--older-than", "7d", "--yes", "--json").json["alive"] == 0
    assert [bool(owners(tmp_path / name)) for name in ("old", "new")] == [False, True]


@pytest.mark.parametrize("age", ["7", "d", "-1d", "7 days", "1e3s"])
def test_a_wrong_age_is_a_usage_error(tmp_path: Path, age: str) -> None:
    assert flexkv("gc", tmp_path, f"--older-than={age}").code == 2


def test_the_command_needs_neither_torch_nor_sglang(tmp_path: Path) -> None:
    die_after_put(tmp_path, PAGE, 2)
    code = (
        "import sys\n"
        "from flexkv_sglang.cli.main import main\n"
        "for name in ('check', 'stats', 'gc'): assert main([name, sys.argv[1]]) == 0\n"
        "assert not {'torch', 'sglang', 'prometheus_client'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)
