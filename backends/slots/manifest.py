"""NAMESPACE.json: the description of a namespace folder, for people and for later starts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from flexkv_sglang.backends.safe_files import publish, read_own

MANIFEST = "NAMESPACE.json"
_BYTES_MAX = 1 << 16


def noted(directory: Path, key: str) -> object:
    """The value under ``key``; None if there is none, or no readable file."""
    try:
        fields = _read(directory)
    except (OSError, ValueError):
        return None
    return fields.get(key) if isinstance(fields, dict) else None


def note(directory: Path, key: str, value: object) -> None:
    """Add or replace a field. Raises ``OSError`` or, if the file is not readable, ``ValueError``."""
    fields = _read(directory)
    if not isinstance(fields, dict):
        raise ValueError(f"{directory / MANIFEST} holds no object")  # noqa: TRY004
    write_manifest(directory, {**fields, key: value})


def _read(directory: Path) -> object:
    try:
        return json.loads(read_own(directory / MANIFEST, _BYTES_MAX, shared=True))
    except RecursionError as exc:
        raise ValueError(f"{directory / MANIFEST} is nested too deeply") from exc


def write_manifest(directory: Path, fields: Mapping[str, object]) -> None:
    """Replace the whole file. Raises ``OSError``. Everybody may read it, as far as the umask allows."""
    text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    publish(directory, MANIFEST, [text.encode()], mode=0o666)
