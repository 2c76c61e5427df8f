"""HangingMount: a disk that stops answering, with the file system on it: not only the I/O engine hangs in front of it.

An ext4 on a loop device; ``freeze`` makes it hang as a snapshot or a lost volume does (``fsfreeze``): whatever
writes to it, creates, renames or flushes files there waits for ``thaw``, in the kernel. Needs root and loop devices.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/bin:/bin"
TOOLS = ("mkfs.ext4", "losetup", "mount", "umount", "fsfreeze")


class HangingMount:
    """``path``: its mount point."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.frozen = False

    def freeze(self) -> None:
        """From now on it hangs."""
        _run("fsfreeze", "--freeze", str(self.path))
        self.frozen = True

    def thaw(self) -> None:
        """It answers again. Idempotent."""
        if self.frozen:
            _run("fsfreeze", "--unfreeze", str(self.path))
            self.frozen = False


def why_not() -> str:
    """The reason why this machine has no such mount; "" if it has."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=_PATH) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    return "" if Path("/dev/loop-control").exists() else "needs loop devices"


@contextmanager
def hanging_mount(folder: Path, megabytes: int = 64) -> Iterator[HangingMount]:
    """A mount in ``folder``. Raises ``OSError`` where the machine refuses it (some containers do)."""
    image, path = folder / "disk.img", folder / "mount"
    path.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(megabytes << 20)
    _run("mkfs.ext4", "-qF", str(image))
    _run("mount", "-o", "loop", str(image), str(path))
    mount = HangingMount(path)
    try:
        yield mount
    finally:
        mount.thaw()
        with suppress(OSError):
            _run("umount", "--lazy", str(path))


def _run(*command: str) -> None:
    program = shutil.which(command[0], path=_PATH) or command[0]
    done = subprocess.run(
        [program, *command[1:]],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PATH": _PATH},
    )
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
