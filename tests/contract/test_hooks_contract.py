"""The plug-in's hooks and the questions of ``compat`` on the SGLang release on the path: real plug-in framework,
real parser, real controller code. In a process of its own, because hooks and published arguments stay.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_bed.releases import HAS, release

pytestmark = [pytest.mark.sglang, pytest.mark.slow]
PROGRAM = Path(__file__).parents[1] / "support" / "sglang_bed" / "plugin_program.py"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of ``hooked``: one process for all tests, because the import of SGLang takes long."""
    place = tmp_path_factory.mktemp("hooked")
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", str(PROGRAM), str(place)],
        cwd=place,
        env={**os.environ, "SGLANG_USE_CPU_ENGINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_our_plug_in_loads_without_complaint(seen: dict[str, Any]) -> None:
    assert seen["misfit"] is None
    assert seen["complaints"] == []  # SGLang only logs errors of hooks


def test_the_command_line_accepts_the_name(seen: dict[str, Any]) -> None:
    assert {"flexkv", "file", "dynamic"} <= set(seen["choices"])
    assert seen["parsed"] == "flexkv"


def test_wrong_settings_are_refused_while_arguments_are_resolved(seen: dict[str, Any]) -> None:
    assert "planted" in seen["refused"]
    assert "sise: unknown key" in seen["wrong_setting"]


def test_attaching_flexkv_makes_our_class_with_the_zero_copy_interface(
    seen: dict[str, Any],
) -> None:
    assert seen["attached"] == [
        "FlexKVStorage",
        "flexkv",
        "_page_get_zero_copy",
        "_page_set_zero_copy",
    ]


def test_pages_go_through_the_controllers_own_transfer_functions(seen: dict[str, Any]) -> None:
    assert seen["stored"] is True
    assert seen["fetched"] == 3
    assert seen["same_bytes"] is True
    assert seen["generic_stored"] is True
    assert seen["generic_same_bytes"] is True


def test_the_served_model_is_known(seen: dict[str, Any]) -> None:
    """Else pages would be named after the served name only, and other weights of that name would be hits."""
    assert seen["server_args"] is True
    assert seen["data_parallel_size"] == 1
    assert not seen["model"].startswith("name:"), seen["model"]


def test_prefix_keys_are_switched_on_where_that_is_possible(seen: dict[str, Any]) -> None:
    assert seen["prefix_keys_hook"] is (HAS["storage_attachment"] <= release())
    assert seen["resolution"] == (
        "resolve_once" if HAS["resolve_once"] <= release() else "__post_init__"
    )


def test_weight_updates_and_flushes_are_noticed(seen: dict[str, Any]) -> None:
    """The list contains each further one that a release has."""
    assert set(seen["update_hooks"]) >= {
        "update_weights_from_disk",
        "update_weights_from_tensor",
        "update_weights_from_distributed",
        "reset",
    }
