"""The model fingerprint tells checkpoints apart by content, not by where they lie."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flexkv_sglang.fingerprint import directory_fingerprint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"hidden_size": 128}')
    (model / "tokenizer.json").write_text("{}")
    (model / "model-00001.safetensors").write_bytes(bytes(range(256)) * 4096)
    return model


def test_a_copy_elsewhere_has_the_same_fingerprint(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "elsewhere" / "other-name")
    assert directory_fingerprint(checkpoint) == directory_fingerprint(
        tmp_path / "elsewhere" / "other-name"
    )


@pytest.mark.parametrize("position", [0, 100, (1 << 20) - 1])
def test_other_weights_of_the_same_size_differ(checkpoint: Path, position: int) -> None:
    before = directory_fingerprint(checkpoint)
    weights = checkpoint / "model-00001.safetensors"
    data = bytearray(weights.read_bytes())
    data[position] ^= 1
    weights.write_bytes(data)
    assert directory_fingerprint(checkpoint) != before


def test_config_and_file_names_count_and_the_tokenizer_does_not(checkpoint: Path) -> None:
    before = directory_fingerprint(checkpoint)
    (checkpoint / "tokenizer.json").write_text('{"changed": true}')
    assert directory_fingerprint(checkpoint) == before
    (checkpoint / "config.json").write_text('{"hidden_size": 129}')
    changed = directory_fingerprint(checkpoint)
    assert changed != before
    (checkpoint / "model-00001.safetensors").rename(checkpoint / "model-00002.safetensors")
    assert directory_fingerprint(checkpoint) != changed


def test_a_directory_without_a_model_has_none(tmp_path: Path) -> None:
    assert directory_fingerprint(tmp_path) is None
