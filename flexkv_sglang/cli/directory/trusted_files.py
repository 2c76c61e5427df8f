"""Files of a namespace folder that may be opened: regular, of the folder's owner, changed by nobody else. And JSON.

Nothing here follows a link or waits for a FIFO, and no content raises.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import signal
import stat
from pathlib import Path
from typing import Any

from flexkv_sglang.backends.safe_files import open_own, read_own
from flexkv_sglang.cli.directory.acting import user

_JSON_BYTES = 1 << 20
_DEPTH = 32
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def distrust(found: os.stat_result, uid: int, *, shared: bool = False) -> str:
    """The reason why a file with this ``lstat`` is not one of ours; "" if it is. ``shared``: others may write."""
    if not stat.S_ISREG(found.st_mode):
        return f"is {_KINDS.get(stat.S_IFMT(found.st_mode), 'no regular file')}, no file of ours"
    if found.st_uid != uid:
        return f"belongs to {user(found.st_uid)}, the folder to {user(uid)}"
    if found.st_mode & 0o022 and not shared:
        return f"can be written by others (mode {found.st_mode & 0o7777:04o})"
    return ""


def refuse_irregular(folder: Path) -> None:
    """Raise ``OSError`` if ``folder`` or one below it has a FIFO, link or device, whose reader could wait for ever."""
    for above, folders, names in os.walk(folder):
        for name in (*folders, *names):
            mode = (Path(above) / name).lstat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
                raise OSError(0, f"{Path(above) / name} is {kind}")


def is_locked(path: Path) -> bool:
    """True if a process holds the lock file ``path``. Works on read-only media. Raises ``OSError``.

    Shared, and for some microseconds: two that ask do not see each other.
    """
    fd = open_own(path)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def is_being_written(path: Path) -> bool | None:
    """True if a process of this machine, in any container, has the file open to write; None if it cannot be found out.

    Asks by a lease, which the kernel grants to the file's owner only while nobody has it open to write.
    """
    try:
        fd = open_own(path)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    before = signal.signal(
        signal.SIGIO, signal.SIG_IGN
    )  # sent to us if it is opened at this moment
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as exc:
        return True if exc.errno == errno.EAGAIN else None
    finally:
        os.close(fd)
        signal.signal(signal.SIGIO, before)
    return False


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of ours; {} for anything else: too large, too deep, a FIFO, of another user."""
    try:
        fields = json.loads(read_own(path, _JSON_BYTES, shared=True))
    except (OSError, ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) and _shallow(fields) else {}


def manifest_of(fields: dict[str, Any]) -> dict[str, Any]:
    """NAMESPACE.json without the fields whose type is wrong, so that nobody has to ask again."""
    return {name: value for name, value in fields.items() if _fits(name, value)}


def stats_of(fields: dict[str, Any]) -> dict[str, Any]:
    """``<owner>.stats.json`` without what has a wrong type; {} if a field is missing that every process writes."""
    counters = fields.get("counters")
    if not isinstance(counters, dict) or not _is_number(fields.get("written_at")):
        return {}
    if not isinstance(fields.get("process"), str):
        return {}
    kept = dict(fields)
    kept["counters"] = {name: value for name, value in counters.items() if _is_count(value)}
    gauges = fields.get("gauges")
    kept["gauges"] = {
        name: value
        for name, value in (gauges.items() if isinstance(gauges, dict) else ())
        if _is_number(value)
    }
    histograms = fields.get("histograms")
    kept["histograms"] = {
        name: value
        for name, value in (histograms.items() if isinstance(histograms, dict) else ())
        if _is_histogram(value)
    }
    if not _is_count(kept.get("pid")):
        kept.pop("pid", None)
    return kept


def _shallow(fields: dict[str, Any]) -> bool:
    level: list[Any] = [fields]
    for _ in range(_DEPTH):
        level = [
            inner
            for item in level
            for inner in (item.values() if isinstance(item, dict) else item)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return True
    return False


_SHARDS = ("tp", "pp", "attn_cp", "dcp")
_TEXTS = ("model", "dtype", "layout", "pool", "namespace", "pool_class", "storage_format_tag")
_LISTS_OF_TEXT = ("pools",)
_OBJECTS = ("settings", "unstored", "geometry")


def _fits(name: str, value: object) -> bool:
    if name == "buffer_bytes":
        return isinstance(value, list) and all(_is_count(item) and item > 0 for item in value)
    if name in _SHARDS:
        return _is_count(value) or (
            isinstance(value, list) and len(value) == 2 and all(map(_is_count, value))
        )
    if name in _TEXTS:
        return isinstance(value, str)
    if name in _LISTS_OF_TEXT:
        return isinstance(value, list)
    return isinstance(value, dict) if name in _OBJECTS else True


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_number(value: Any) -> bool:
    return _is_count(value) or (isinstance(value, float) and math.isfinite(value))


def _is_histogram(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    bounds, counts = value.get("bounds"), value.get("counts")
    return (
        isinstance(bounds, list)
        and isinstance(counts, list)
        and len(counts) == len(bounds) + 1
        and all(map(_is_number, bounds))
        and all(map(_is_count, counts))
    )
