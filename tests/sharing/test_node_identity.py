"""The node's name: one per data directory, also for processes that start at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flexkv_sglang.config.settings import FlexKVConfig
from flexkv_sglang.sharing.node_identity import node_name


def test_eight_processes_that_start_at_once_agree_on_the_nodes_name(tmp_path: Path) -> None:
    code = (
        "import sys; from flexkv_sglang.config.settings import FlexKVConfig\n"
        "from flexkv_sglang.sharing.node_identity import node_name\n"
        "print(node_name(FlexKVConfig.parse({'path': sys.argv[1]})))"
    )
    command = [sys.executable, "-P", "-c", code, str(tmp_path / "new")]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    names = {child.communicate()[0] for child in children}
    assert len(names) == 1
    assert names != {""}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["node-id"]


def test_other_nodes_have_other_names(tmp_path: Path) -> None:
    names = {node_name(FlexKVConfig.parse({"path": str(tmp_path / which)})) for which in "ab"}
    assert len(names) == 2


@pytest.mark.parametrize("rubbish", [b"", b"../../tmp", b"\xff\xfe\x00", b"ABCDEFGH"])
def test_a_node_id_that_is_no_mark_is_replaced(tmp_path: Path, rubbish: bytes) -> None:
    (tmp_path / "node-id").write_bytes(rubbish)
    config = FlexKVConfig.parse({"path": str(tmp_path)})
    assert node_name(config) == node_name(config)
    assert len((tmp_path / "node-id").read_text().strip()) == 8


def test_a_data_directory_that_is_a_link_has_the_name_of_its_target(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    through = node_name(FlexKVConfig.parse({"path": str(tmp_path / "link")}))
    assert through == node_name(FlexKVConfig.parse({"path": str(tmp_path / "disk")}))
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["node-id"]
