"""``flexkv stats``: prints the pages under a directory, their owners and hit rates."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

from flexkv_sglang.backends.slots.space.disk_space import free_bytes
from flexkv_sglang.cli.directory.scan import (
    Namespace,
    OwnerStats,
    counters_of,
    hit_rate,
    owner_stats,
    scan,
)
from flexkv_sglang.cli.output import emit, human_bytes, human_seconds, table

_FINGERPRINT = re.compile(r"\b([0-9a-f]{8})[0-9a-f]{24}\b")
_SHOWN = (
    "namespace",
    "model",
    "pools",
    "unstored",
    "dtype",
    "layout",
    "page_size",
    "tp",
    "pp",
    "attn_cp",
    "dcp",
)


def run_stats(root: Path, *, as_json: bool) -> int:
    """Exit code 1 if an owner or folder cannot be read, else 0: ``check`` judges the rest. Raises ``OSError``."""
    looked = scan(root)
    found = [
        (item, [owner_stats(item, owner) for owner in item.owners]) for item in looked.namespaces
    ]
    free = free_bytes(root)
    total = os.statvfs(root).f_blocks * os.statvfs(root).f_frsize
    lines = [line for item, owners in found for line in _lines(item, owners)] or ["no namespaces"]
    lines += [f"{i.name}/NAMESPACE.json cannot be read" for i, _ in found if _unreadable(i)]
    lines += [f"{item.path} {item.reason}" for item in looked.refused]
    lines.append(f"disk: {human_bytes(free)} of {human_bytes(total)} free")
    fields: dict[str, object] = {
        "directory": str(root),
        "disk_free_bytes": free,
        "disk_total_bytes": total,
        "namespaces": [_fields(namespace, owners) for namespace, owners in found],
        "refused": {str(item.path): item.reason for item in looked.refused},
    }
    emit(lines, fields, as_json=as_json)
    refused = any(_unreadable(item) for item, _ in found) or any(
        item.ours or not found for item in looked.refused
    )
    return 1 if refused or any(_broken(item) for _, owners in found for item in owners) else 0


def _unreadable(namespace: Namespace) -> bool:
    return not namespace.fields and os.path.lexists(namespace.directory / "NAMESPACE.json")


def _broken(item: OwnerStats) -> bool:
    """Not for an owner that only begins."""
    begun = any(path.suffix == ".journal" for path in item.owner.files)
    return bool(item.owner.foreign or (item.trouble and begun))


def _lines(namespace: Namespace, owners: list[OwnerStats]) -> list[str]:
    lines = [f"{namespace.name}  {_identity(namespace)}".rstrip(), *_details(namespace)]
    if owners:
        head = ("owner", "state", "pages", "slots", "used", "page", "on disk", "journal", "stats")
        lines += table(head, [_row(item) for item in owners])
    lines += [f"  {item.owner.name}: {item.trouble}" for item in owners if item.trouble]
    counters = counters_of(owners)
    if counters:
        lines.append("  " + _use(counters))
    return lines


def _row(item: OwnerStats) -> tuple[object, ...]:
    age = time.time() - item.live["written_at"] if item.live else None
    return (
        item.owner.name,
        "alive" if item.owner.alive else "dead",
        item.pages,
        item.slots,
        f"{100 * item.pages / item.slots:.0f} %" if item.slots else "-",
        human_bytes(item.payload_bytes),
        human_bytes(item.owner.disk_bytes()),
        human_bytes(item.journal_bytes),
        "-" if age is None else f"{human_seconds(max(age, 0.0))} old",
    )


def _identity(namespace: Namespace) -> str:
    """The fields that most often differ; fingerprints by their first digits."""
    fields = namespace.fields
    parts = [str(fields[name]) for name in ("model", "dtype", "layout") if name in fields]
    parts[:1] = [_FINGERPRINT.sub(r"\1", model) for model in parts[:1]]
    if fields.get("pool", "kv") != "kv":
        parts.append(f"pool={fields['pool']}")
    if "page_size" in fields:
        parts.append(f"page_size={fields['page_size']}")
    parts += [
        f"{name}={fields[name][0]}/{fields[name][1]}"
        for name in ("tp", "pp", "attn_cp", "dcp")
        if isinstance(fields.get(name), list) and fields[name][1] > 1
    ]
    return " ".join(parts)


def _details(namespace: Namespace) -> list[str]:
    """All other fields of the identity, for a comparison of two namespaces."""
    fields = {
        name: value
        for name, value in sorted(namespace.fields.items())
        if name not in _SHOWN and value not in ("", {}, 0) and not _is_whole(value)
    }
    settings = fields.pop("settings", None)
    lines = ["  " + " ".join(_named(name, value) for name, value in fields.items())]
    unstored = namespace.fields.get("unstored")
    if isinstance(unstored, dict):
        lines += [f"  pool {name} is not stored: {why}" for name, why in sorted(unstored.items())]
    if isinstance(settings, dict):
        lines.append("  settings: " + " ".join(f"{k}={v}" for k, v in sorted(settings.items())))
    return [line for line in lines if line.strip()]


def _named(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={item}" for key, item in sorted(value.items()))
    if name == "epoch":
        return f"epoch={value} (weights updated in a running server: no other server can use them)"
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{name}={text}"


def _is_whole(value: object) -> bool:
    """True for the shard field of a pool that is not divided."""
    return value == [0, 1]


def _use(counters: dict[str, int]) -> str:
    rate = hit_rate(counters)
    get = counters.get
    hits = "nothing asked yet" if rate is None else f"{100 * rate:.1f} %"
    text = (
        f"hit rate {hits} ({get('found_pages', 0)} of {get('asked_pages', 0)} pages asked for), "
        f"read {get('read_pages', 0)} pages ({human_bytes(get('read_bytes', 0))}), "
        f"wrote {get('write_pages', 0)} ({human_bytes(get('write_bytes', 0))}), "
        f"evicted {get('evicted_pages', 0)}, corrupt {get('corrupt_pages', 0)}"
    )
    failed = sum(
        value for name, value in counters.items() if name.endswith(("_errors", "_exceptions"))
    )
    return text + (f", {failed} failures" if failed else "")


def _fields(namespace: Namespace, owners: list[OwnerStats]) -> dict[str, object]:
    counters = counters_of(owners)
    return {
        "namespace": namespace.name,
        "identity": namespace.fields,
        "owners": [item.fields() for item in owners],
        "counters": counters,
        "hit_rate": hit_rate(counters),
    }
