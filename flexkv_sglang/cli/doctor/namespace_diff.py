"""Compares namespaces: the fields of NAMESPACE.json that differ. Pure.

Each rank of one server has its own namespace, by design: they are one *family* here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

_NOT_IDENTITY = ("namespace", "pools", "unstored")
_SHARDS = ("tp", "pp", "attn_cp", "dcp")
_OF_STAGE = ("first_layer", "layer_count", "buffer_bytes")  # follow from the pipeline stage

WHY = {
    "model": "other weights, quantisation or load format (or one server sets model_id and the other does not)",
    "dtype": "--kv-cache-dtype",
    "layout": "--hicache-mem-layout",
    "page_size": "--page-size",
    "tp": "--tp-size",
    "pp": "--pp-size",
    "attn_cp": "the attention context-parallel size",
    "dcp": "the decode context-parallel size",
    "buffer_bytes": "follows from page size, dtype, layout and shard",
    "pool_class": "another attention backend or SGLang release",
    "storage_format_tag": "another attention backend or SGLang release",
    "split_heads": "tp_lcm_size",
    "format": "another release of flexkv-sglang",
}
"""Field -> the setting or fact that decides it."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Positions of two namespaces, and field -> their two values."""

    first: int
    second: int
    fields: Mapping[str, tuple[Any, Any]]


def family(fields: Mapping[str, Any]) -> str:
    """Equal for all ranks of one server, different for two servers that cannot share pages."""
    kept = {name: value for name, value in fields.items() if name not in _NOT_IDENTITY}
    for name in _SHARDS:
        if isinstance(kept.get(name), list):
            kept[name] = kept[name][1]
    if isinstance(kept.get("pp"), int) and kept["pp"] > 1:
        kept = {name: value for name, value in kept.items() if name not in _OF_STAGE}
    return json.dumps(kept, sort_keys=True)


def closest_pairs(namespaces: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """All pairs that differ, those with the fewest different fields first."""
    pairs = []
    for first, second in combinations(range(len(namespaces)), 2):
        one, other = (json.loads(family(namespaces[at])) for at in (first, second))
        fields = {
            name: (one.get(name), other.get(name))
            for name in sorted({*one, *other})
            if one.get(name) != other.get(name)
        }
        if fields:
            pairs.append(Pair(first, second, fields))
    return sorted(pairs, key=lambda pair: len(pair.fields))


def describe(pair: Pair) -> str:
    """``page_size (16 and 64: --page-size), ...``; of longer texts only the words that differ."""
    parts = []
    for name, (one, other) in pair.fields.items():
        if isinstance(one, str) and isinstance(other, str):
            words = one.split(), other.split()
            one, other = (
                " ".join(w for w in mine if w not in theirs) or "nothing"
                for mine, theirs in (words, words[::-1])
            )
        why = f": {WHY[name]}" if name in WHY else ""
        parts.append(f"{name} ({one} and {other}{why})")
    return ", ".join(parts)
