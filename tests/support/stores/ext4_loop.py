"""A small ext4 of its own on a loop device, which the test may fill, break or make read-only. Needs root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def ext4(folder: Path, mib: int = 64) -> Iterator[Path]:
    """The mount point. The test is skipped where the machine cannot do this."""
    image, mount = folder / "image", folder / "disk"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(mib << 20)
    ways = (
        ["mkfs.ext4", "-q", "-F", str(image)],
        ["mount", "-o", "loop,errors=remount-ro", str(image), str(mount)],
    )
    for command in ways:
        if os.geteuid() or not _runs(command):
            pytest.skip(f"this machine cannot run {command[0]} on a loop device")
    try:
        yield mount
    finally:
        _runs(["umount", "-l", str(mount)])


def turn_read_only(mount: Path) -> None:
    """As ext4 does by itself after an error: open files stay open, each write fails from now on."""
    device = os.stat(mount).st_dev
    name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
    trigger = Path(f"/sys/fs/ext4/{name}/trigger_fs_error")
    if not trigger.exists():
        pytest.skip("this kernel's ext4 cannot be made to fail")
    trigger.write_text("a test\n")


def _runs(command: list[str]) -> bool:
    env = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
    try:
        return subprocess.run(command, capture_output=True, check=False, env=env).returncode == 0
    except OSError:
        return False
