"""Checkpoint directories for fingerprints: safetensors files with few real bytes, or sparse ones of any size."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

from flexkv_bed.tiny_model import write_config


def write_safetensors(path: Path, tensors: Mapping[str, int], fill: int = 1) -> dict[str, int]:
    """A sparse file with tensors of the given byte sizes; returns where each begins.

    ``fill`` is written to the first bytes of every tensor.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places: dict[str, int] = {}
    position = 0
    for name, size in tensors.items():
        header[name] = {
            "dtype": "U8",
            "shape": [size],
            "data_offsets": [position, position + size],
        }
        places[name] = position
        position += size
    text = json.dumps(header).encode()
    base = 8 + len(text)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in places.values():
            file.seek(base + start)
            file.write(bytes([fill]) * 8)
        file.truncate(base + position)
    return {name: base + start for name, start in places.items()}


def write_checkpoint(directory: Path, fill: int = 1) -> Path:
    """``config.json`` of the tiny model and one weight file; ``fill`` makes it another fine-tune."""
    write_config(directory)
    write_safetensors(
        directory / "model.safetensors", {"embed": 65536, "layer.0.q": 8192, "norm": 64}, fill
    )
    return directory
