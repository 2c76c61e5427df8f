"""Files in a storage directory, seen from outside: for the demo and the tests. Knows no formats."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

BLOCK = 512  # the unit of st_blocks, whatever the file system's own is
State = dict[Path, tuple[int, int]]


def memory_of(directory: Path) -> Path:
    """Place of the memory tier above ``directory``, for servers that have one."""
    return Path(
        "/dev/shm", f"flexkv-bed-{hashlib.sha256(str(directory).encode()).hexdigest()[:16]}"
    )


def files(directory: Path) -> list[Path]:
    """All regular files of a storage, memory tier included; one that vanishes meanwhile is no error."""
    places = (directory, memory_of(directory))
    return sorted(path for place in places for path in place.rglob("*") if path.is_file())


def state(directory: Path) -> State:
    """Size and time of change of every file."""
    found = {}
    for path in files(directory):
        try:
            entry = path.stat()
        except FileNotFoundError:
            continue
        found[path] = (entry.st_size, entry.st_mtime_ns)
    return found


def bytes_on_disk(directory: Path) -> int:
    """Allocated bytes: a slot file is reserved in whole when it is made."""
    return sum(path.stat().st_blocks * BLOCK for path in files(directory))


def wait_written(
    directory: Path,
    before: State,
    quiet_s: float = 1.0,
    timeout_s: float = 30.0,
    waiting: Callable[[float], None] | None = None,
) -> float:
    """Wait until a file changed since ``before`` and none changed for ``quiet_s``. Returns the seconds.

    SGLang stores pages after the answer and gives no sign when it is done; a directory that no longer changes
    is the only sign from outside.
    """
    begin = time.monotonic()
    last, since = before, begin
    while (now := time.monotonic()) - begin < timeout_s:
        current = state(directory)
        if current != last:
            last, since = current, now
        elif current != before and now - since >= quiet_s:
            return now - begin
        if waiting is not None:
            waiting(now - begin)
        time.sleep(0.1)
    raise TimeoutError(
        f"nothing was written to {directory}, or writing did not end, in {timeout_s:.0f} s"
    )


def flip_bytes(path: Path, every: int = 4096) -> int:
    """Damage a file: one byte of each ``every`` that holds data; how many were flipped.

    Holes and reserved zeros are left alone, else a small file of pages would grow to its full size.
    """
    flipped = 0
    with path.open("r+b") as file:
        offset = 0
        while block := file.read(every):
            if any(block):
                at = offset + len(block) // 2
                file.seek(at)
                file.write(bytes([block[len(block) // 2] ^ 0xFF]))
                flipped += 1
            offset += len(block)
            file.seek(offset)
    return flipped
