"""Files that appear whole or not at all, and that no planted link can lead elsewhere.

Everything is relative to a descriptor of the directory, so the directory that was looked at is the one that is used.
A new file has a temporary name, ``<name>.<16 hex digits>.tmp``, that did not exist before (``O_EXCL``), and is renamed
into place. A crash leaves at most a temporary, which nothing reads: ``remove_temporaries``. Threads: any.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PRIVATE = 0o600
"""Mode of a file of this user alone: KV cache is as confidential as the prompts."""

_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_TEMPORARY = re.compile(r"(\.[0-9a-f]{16})?\.tmp$")  # version 0.1 made them without the digits


@contextmanager
def open_directory(path: Path) -> Iterator[int]:
    """A descriptor of ``path``, which is a directory and not a link to one. Raises ``OSError``."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def replacing(
    directory: Path, name: str, mode: int = PRIVATE, *, replace: bool = True
) -> Iterator[int]:
    """A descriptor to write the new ``name`` to; it is in place when the block ends. Raises ``OSError``.

    If anything is raised, ``name`` is as it was and the temporary is removed. ``replace=False``: an existing ``name``
    stays, and ``FileExistsError`` is raised.
    """
    with open_directory(directory) as folder:
        temporary = f"{name}.{secrets.token_hex(8)}.tmp"
        fd = os.open(temporary, _NEW, mode, dir_fd=folder)
        try:
            try:
                yield fd
            finally:
                os.close(fd)
            if replace:
                os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
            else:
                os.link(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
                os.unlink(temporary, dir_fd=folder)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
            raise


def publish(
    directory: Path,
    name: str,
    parts: Iterable[bytes | memoryview],
    *,
    sync: bool = False,
    mode: int = PRIVATE,
    replace: bool = True,
) -> None:
    """Write ``parts`` to a new file and put it in the place of ``name``. ``sync``: flush it to the medium before.

    ``replace``: as for ``replacing``. Raises ``OSError``.
    """
    with replacing(directory, name, mode, replace=replace) as fd:
        write_all(fd, parts, sync=sync)


def write_all(fd: int, parts: Iterable[bytes | memoryview], *, sync: bool = False) -> None:
    """Write ``parts`` at the position of ``fd``, and flush them to the medium with ``sync``. Raises ``OSError``."""
    with open(fd, "wb", closefd=False) as file:
        file.writelines(parts)
    if sync:
        os.fdatasync(fd)


def remove_temporaries(directory: Path, prefix: str) -> None:
    """Remove what a crash left of new files whose names begin with ``prefix``. Raises ``OSError``."""
    with open_directory(directory) as folder:
        for name in os.listdir(folder):
            if name.startswith(prefix) and _TEMPORARY.search(name):
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=folder)
