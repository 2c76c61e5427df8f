"""The model fingerprint depends on the content of a checkpoint, not on its place, and costs little."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from flexkv_sglang.identity import fingerprint
from flexkv_sglang.identity.fingerprint import (
    FILE_READS,
    TENSOR_READS,
    Checkpoint,
    checkpoint,
    file_digest,
)
from models.checkpoints import write_checkpoint, write_safetensors


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = write_checkpoint(tmp_path / "model")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "plain.bin").write_bytes(bytes(range(256)) * 4096)
    return directory


def test_a_copy_elsewhere_has_the_same_fingerprint(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "elsewhere" / "other-name")
    assert checkpoint(model) == checkpoint(tmp_path / "elsewhere" / "other-name")


@pytest.mark.parametrize("position", [0, 100, (1 << 20) - 1])
def test_other_weights_of_the_same_size_differ(model: Path, position: int) -> None:
    before = checkpoint(model)
    _flip(model / "plain.bin", position)
    after = checkpoint(model)
    assert (after.config, after.weights != before.weights) == (before.config, True)


def test_weights_configuration_and_tokenizer_are_told_apart(model: Path) -> None:
    before = checkpoint(model)
    (model / "tokenizer.json").write_text('{"changed": true}')
    (model / "generation_config.json").write_text("{}")
    assert checkpoint(model) == before
    (model / "config.json").write_text('{"rope_theta": 1}')
    changed = checkpoint(model)
    assert (changed.config != before.config, changed.weights) == (True, before.weights)
    (model / "modeling_x.py").write_text("pass")
    assert checkpoint(model).config != changed.config
    (model / "model.safetensors.index.json").write_text("{}")
    indexed = checkpoint(model)
    assert indexed.weights != before.weights
    (model / "plain.bin").rename(model / "plane.bin")
    assert checkpoint(model).weights != indexed.weights


def test_a_directory_without_a_model_has_none(tmp_path: Path) -> None:
    (tmp_path / "sub.safetensors").mkdir()
    assert checkpoint(tmp_path) == Checkpoint(None, None)


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 8, b"\xff" * 100, b"\x10" + b"\x00" * 7 + b"x" * 90]
)
def test_a_file_with_a_false_safetensors_name_is_sampled(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    before = checkpoint(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(content + b"more")
    assert checkpoint(tmp_path).weights != before.weights


def test_an_edit_of_one_tensor_between_the_samples_of_its_file_is_seen(tmp_path: Path) -> None:
    tensors = {f"model.layers.{i}.mlp.down_proj.weight": 8 << 20 for i in range(700)}
    path = tmp_path / "model.safetensors"
    places = write_safetensors(path, tensors)
    before = checkpoint(tmp_path)
    size = path.stat().st_size
    for layer in (1, 333, 698):
        start = places[f"model.layers.{layer}.mlp.down_proj.weight"]
        taken = fingerprint._spread(size, 16)
        assert not any(start - 4096 < offset < start + (8 << 20) for offset in taken)
        middle = start + (4 << 20)
        _flip(path, middle)
        assert checkpoint(tmp_path) != before
        _flip(path, middle)
    assert checkpoint(tmp_path) == before


def test_dense_tensors_are_sampled_before_experts(tmp_path: Path) -> None:
    experts = {f"layers.{i}.mlp.experts.w": 8192 for i in range(3 * TENSOR_READS)}
    places = write_safetensors(tmp_path / "a.safetensors", {**experts, "zz.q_proj": 8192})
    before = checkpoint(tmp_path)
    _flip(tmp_path / "a.safetensors", places["zz.q_proj"] + 4096)
    assert checkpoint(tmp_path) != before


@pytest.mark.parametrize(("files", "tensors"), [(20, 80), (163, 550)])
def test_a_checkpoint_of_100_gb_costs_a_bounded_number_of_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int, tensors: int
) -> None:
    """Two large models: 20 files of a dense one; 163 files with 90,000 tensors, most of them experts."""
    each = 100 * 10**9 // files // tensors
    for number in range(files):
        kind = "experts" if files > 100 else "attn"
        names = {f"layers.{number}.{kind}.{i}": each for i in range(tensors)}
        write_safetensors(tmp_path / f"model-{number:05}.safetensors", names)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) > 99 * 10**9
    read: list[int] = []
    pread = os.pread

    def counted(*args: Any) -> bytes:
        read.append(args[1])
        return pread(*args)

    monkeypatch.setattr(os, "pread", counted)
    first = checkpoint(tmp_path)
    assert len(read) <= FILE_READS + TENSOR_READS + 2 * files
    assert max(read) == 4096
    assert checkpoint(tmp_path) == first


def test_the_digest_of_a_small_file(tmp_path: Path) -> None:
    (tmp_path / "scales.json").write_text("{}")
    before = file_digest(tmp_path / "scales.json")
    (tmp_path / "scales.json").write_text("[]")
    assert file_digest(tmp_path / "scales.json") != before
    with pytest.raises(OSError, match="missing"):
        file_digest(tmp_path / "missing")


def _flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))
