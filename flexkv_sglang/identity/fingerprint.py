"""Fingerprint of a model's files: two checkpoints of one name must never share pages.

There are two digests, because a weight update from disk changes the weights and leaves the configuration: one over
the configuration files, one over name, size and sampled content of every weight file (a fine-tune has the same
names, sizes and headers). Paths and times do not count: replicas may have copies.

Samples are at most ``FILE_READS`` + ``TENSOR_READS`` reads of 4 KiB beside the headers. Some are spread over each
file, first and last bytes included. Others are the middle of each tensor of safetensors files, because the spread
samples could miss an edit of a single layer. With more tensors than reads, experts come last. An edit of a few
values, or of a few experts among many, may stay unseen.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
FILE_READS = 1024
"""Reads over all weight files, at most ``_PER_FILE`` and at least two for each."""

TENSOR_READS = 2048
"""Limit of sampled tensors, over all files."""

_CONFIG_SUFFIXES = (".json", ".py")
_IGNORED = (
    "tokeniz",
    "vocab",
    "merges",
    "special_tokens",
    "added_tokens",
    "chat_template",
    "generation_config",
    "preprocessor_config",
    "trainer_state",
)
_INDEX = ".index.json"
"""Suffix of the table of tensors by file: it belongs to the weights, not to the configuration."""

_PER_FILE = 16
_SAMPLE_BYTES = 4096
_WHOLE_FILE_MAX = 64 << 20
_HEADER_MAX = 100 << 20  # the format's own limit
_LENGTH = struct.Struct("<Q")
_SPLIT = re.compile(r"-\d{5}-of-(\d{5})(?=\.gguf$)")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Two digests of 32 hex digits; None if the directory has no such files."""

    config: str | None
    weights: str | None


def checkpoint(directory: Path, only: str | None = None) -> Checkpoint:
    """Fingerprint a checkpoint directory (its top level). Raises ``OSError`` if a file cannot be read.

    ``only``: the weights are this one file (GGUF: other quantisations lie beside it), or the parts of a split one.
    The number of reads does not depend on the size: 100 GB of weights take well under a second.
    """
    names = sorted(name for name in os.listdir(directory) if (directory / name).is_file())
    configs = [
        name for name in names if name.endswith(_CONFIG_SUFFIXES) and not name.startswith(_IGNORED)
    ]
    indexes = [name for name in configs if name.endswith(_INDEX)]
    weights = [name for name in names if name.endswith(WEIGHT_SUFFIXES)]
    if only is not None:
        indexes, weights = [], [name for name in names if _whole(name) == _whole(only)]
    return Checkpoint(
        _config_digest(directory, [name for name in configs if name not in indexes]),
        _weights_digest(directory, weights, indexes),
    )


def file_digest(path: Path) -> str:
    """Digest a small file (at most its first 64 MiB) to 32 hex digits. Raises ``OSError``."""
    digest = hashlib.blake2b(digest_size=16, person=b"flexkv-file")
    with path.open("rb") as file:
        digest.update(file.read(_WHOLE_FILE_MAX))
    return digest.hexdigest()


def _whole(name: str) -> str:
    """Remove the number of the part from a GGUF file's name."""
    return _SPLIT.sub(r"-of-\1", name)


def _config_digest(directory: Path, names: Sequence[str]) -> str | None:
    if not names:
        return None
    digest = hashlib.blake2b(digest_size=16, person=b"flexkv-config")
    for name in names:
        digest.update(f"{name}\0{file_digest(directory / name)}\0".encode())
    return digest.hexdigest()


def _weights_digest(directory: Path, names: Sequence[str], indexes: Sequence[str]) -> str | None:
    if not names:
        return None
    digest = hashlib.blake2b(digest_size=16, person=b"flexkv-weights")
    for name in indexes:
        digest.update(f"{name}\0{file_digest(directory / name)}\0".encode())
    per_file = max(2, min(_PER_FILE, FILE_READS // len(names)))
    tensors = _chosen_tensors(directory, names)
    for name in names:
        path = directory / name
        size = path.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        with path.open("rb") as file:
            for offset in sorted({*_spread(size, per_file), *tensors.get(name, ())}):
                digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, offset))
    return digest.hexdigest()


def _spread(size: int, count: int) -> set[int]:
    """Return evenly spread offsets, with those of the first and the last bytes."""
    last = max(0, size - _SAMPLE_BYTES)
    return {last * step // (count - 1) for step in range(count)}


def _chosen_tensors(directory: Path, names: Sequence[str]) -> dict[str, list[int]]:
    """Return the offsets of the middles of the sampled tensors, by file."""
    found: list[tuple[str, int]] = []
    experts: list[tuple[str, int]] = []
    for name in names:
        if name.endswith(".safetensors"):
            for tensor, middle in _tensors(directory / name):
                (experts if "expert" in tensor else found).append((name, middle))
    chosen = _thinned(found, TENSOR_READS)
    chosen += _thinned(experts, TENSOR_READS - len(chosen))
    offsets: dict[str, list[int]] = {}
    for name, middle in chosen:
        offsets.setdefault(name, []).append(middle)
    return offsets


def _thinned(tensors: list[tuple[str, int]], count: int) -> list[tuple[str, int]]:
    if len(tensors) <= count:
        return tensors
    return [tensors[len(tensors) * step // count] for step in range(count)]


def _tensors(path: Path) -> Iterator[tuple[str, int]]:
    """Yield name and middle of each tensor, from the header; nothing if the header is not that of safetensors."""
    with path.open("rb") as file:
        prefix = file.read(_LENGTH.size)
        length = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else 0
        if not 2 <= length <= _HEADER_MAX:
            return
        try:
            header = json.loads(file.read(length))
            places = {
                name: item["data_offsets"] for name, item in header.items() if name[:2] != "__"
            }
            for name in sorted(places):
                start, end = places[name]
                middle = (start + end - _SAMPLE_BYTES) // 2
                yield name, _LENGTH.size + length + max(int(start), int(middle))
        except (ValueError, TypeError, KeyError, AttributeError):
            return
