"""Redis entries: names of keys, a node's entry, an entry of a stream. Pure; docs/DATA_FILE.md has the table.

Redis may contain anything: bytes that do not decode are None, and a valid entry only means "this node may have
that page".
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

import numpy as np

from flexkv_sglang.backends.fleet.vocabulary import (
    CHANGE_KEYS,
    PROTOCOL,
    Change,
    NodeId,
    NodeInfo,
    Op,
    namespace_bytes,
)

PREFIX = "fk1"
ENTRY_BYTES_MAX = 128 << 10
NAMESPACES_MAX = 2048
_NUMBER_MAX = 1 << 62
_NAME = re.compile(r"[\w.-]{1,96}", re.ASCII)
_ADDRESS = re.compile(r"[\w.:\[\]-]{3,128}", re.ASCII)
_LETTERS = {Op.ADD: b"A", Op.DROP: b"D", Op.CLEAR: b"C", Op.HEARTBEAT: b"K"}
_OPS = {letter: op for op, letter in _LETTERS.items()}


def is_name(text: str) -> bool:
    """Is ``text`` a valid node id or cluster id: up to 96 letters, digits, ``_ . -``?"""
    return bool(_NAME.fullmatch(text))


def member_keys(cluster_id: str) -> tuple[str, str, str]:
    """Return the keys of the ZSET of live nodes, the HASH of their entries, the STRING that changes with them."""
    tag = f"{PREFIX}:{{{cluster_id}}}"
    return f"{tag}:live", f"{tag}:nodes", f"{tag}:ver"


def stream_key(cluster_id: str, namespace: str, node_id: NodeId) -> bytes:
    """Return the key of the stream of a node's changes in a namespace."""
    return f"{PREFIX}:{{{cluster_id}}}:{namespace}:log:{node_id}".encode()


def encode_info(info: NodeInfo) -> bytes:
    """Encode a node's entry as JSON: the same bytes for the same content."""
    entry = {
        "proto": info.protocol,
        "epoch": f"{info.epoch:016x}",
        "addr": [info.address],
        "engines": list(info.engines),
        "pod": info.share_group,
        "ns": sorted(info.namespaces)[:NAMESPACES_MAX],
        "ver": info.version,
    }
    return json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()


def decode_info(node_id: bytes, entry: bytes | None) -> NodeInfo | None:
    """Decode a node's entry; None unless it is a valid one of this protocol."""
    if entry is None or len(entry) > ENTRY_BYTES_MAX:
        return None
    try:
        name = node_id.decode()
        fields = json.loads(entry)
        info = NodeInfo(
            node_id=NodeId(name),
            epoch=int(fields["epoch"], 16),
            address=fields["addr"][0],
            share_group=fields["pod"],
            namespaces=tuple(fields["ns"]),
            engines=tuple(fields["engines"]),
            version=str(fields["ver"])[:64],
            protocol=fields["proto"],
        )
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    return info if is_sound(info) else None


def is_sound(info: NodeInfo) -> bool:
    """Does another node's entry keep to types and limits?"""
    texts = (info.node_id, info.address, info.share_group, *info.namespaces, *info.engines)
    if not all(isinstance(text, str) for text in texts):
        return False
    return (
        info.protocol == PROTOCOL
        and 0 < info.epoch < 1 << 64
        and is_name(info.node_id)
        and bool(_ADDRESS.fullmatch(info.address))
        and len(info.share_group) <= 128
        and len(info.namespaces) <= NAMESPACES_MAX
        and all(is_namespace(name) for name in info.namespaces)
        and len(info.engines) <= 16
    )


def is_namespace(name: str) -> bool:
    """Is ``name`` a valid name of a namespace?"""
    try:
        namespace_bytes(name)
    except ValueError:
        return False
    return True


def encode_change(change: Change) -> dict[bytes, bytes]:
    """Encode a change as the fields of a stream's entry."""
    return {
        b"e": b"%016x" % change.epoch,
        b"q": b"%d" % change.first,
        b"o": _LETTERS[change.op],
        b"k": change.fingerprints.astype("<u8", copy=False).tobytes(),
    }


def decode_change(fields: Mapping[bytes, bytes] | None) -> Change | None:
    """Decode the fields of a stream's entry; None unless they are a valid change."""
    if fields is None:
        return None
    try:
        epoch, first, op, keys = (fields[name] for name in (b"e", b"q", b"o", b"k"))
        if len(epoch) != 16 or len(first) > 20 or len(keys) > 8 * CHANGE_KEYS or len(keys) % 8:
            return None
        change = Change(
            int(epoch, 16), int(first), _OPS[op], np.frombuffer(keys, "<u8").astype(np.uint64)
        )
    except (KeyError, ValueError, TypeError):
        return None
    has_keys = change.op in (Op.ADD, Op.DROP)
    sound = 0 < change.first < _NUMBER_MAX and has_keys == bool(len(keys))
    return change if sound else None
