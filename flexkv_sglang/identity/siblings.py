"""Siblings: namespaces that one server uses side by side, for its pools, shards and ranks. Pure."""

from __future__ import annotations

from collections.abc import Mapping

_OF_THE_SERVER = ("model", "settings", "epoch", "format")
_OF_A_POOL = ("dtype", "layout", "page_size", "split_heads", "storage_format_tag")
_SHARDS = ("tp", "pp", "attn_cp", "dcp")


def are_siblings(one: Mapping[str, object], other: Mapping[str, object]) -> bool:
    """Can a server that uses the namespace with these fields (``Identity.fields``) use the other one as well?

    Pools may differ in everything but the model; the shards of one pool are alike but for their rank. Without a model
    in both, nobody knows: False.
    """
    if not one.get("model") or any(one.get(name) != other.get(name) for name in _OF_THE_SERVER):
        return False
    if one.get("pool") != other.get("pool"):
        return True
    return all(one.get(name) == other.get(name) for name in _OF_A_POOL) and all(
        _size(one.get(name)) == _size(other.get(name)) for name in _SHARDS
    )


def _size(shard: object) -> object:
    """Of (rank, size): the size. A list after JSON."""
    return shard[1] if isinstance(shard, list | tuple) and len(shard) == 2 else shard
