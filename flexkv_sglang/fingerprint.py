"""Fingerprint of a model's weights: two checkpoints served under one name must never share pages.

Digest over the configuration files and, per weight file, its name, size and sampled content (a
fine-tune has the same names, sizes and headers). Never over a path: replicas may keep the same
checkpoint in different places. Cost: a few reads per weight file, well under a second for 100 GB.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_CONFIG_SUFFIXES = (".json",)
_IGNORED = (
    "tokenizer",
    "vocab",
    "merges",
    "special_tokens",
    "added_tokens",
    "chat_template",
    "generation_config",
)
_SAMPLES = 16
_SAMPLE_BYTES = 4096
_MAX_CONFIG_BYTES = 64 << 20


def directory_fingerprint(directory: Path) -> str | None:
    """32 hex digits, or None if the directory holds no configuration and no weights."""
    digest = hashlib.blake2b(digest_size=16, person=b"flexkv-model")
    names = sorted(name for name in os.listdir(directory) if _relevant(name))
    if not names:
        return None
    for name in names:
        path = directory / name
        size = path.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        with path.open("rb") as file:
            if name.endswith(_CONFIG_SUFFIXES) and size <= _MAX_CONFIG_BYTES:
                digest.update(file.read())
                continue
            for offset in _sample_offsets(size):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _relevant(name: str) -> bool:
    if name.endswith(_WEIGHT_SUFFIXES):
        return True
    return name.endswith(_CONFIG_SUFFIXES) and not name.startswith(_IGNORED)


def _sample_offsets(size: int) -> list[int]:
    """Evenly spread, with the first and the last bytes of the file always among them."""
    last = max(0, size - _SAMPLE_BYTES)
    return sorted({last * step // (_SAMPLES - 1) for step in range(_SAMPLES)})
