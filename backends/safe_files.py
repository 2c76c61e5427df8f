"""Files that are ours, that appear whole or not at all, and that no planted link can lead elsewhere.

A file that another user could have written is not read: ``open_own`` looks at the owner, the kind and the mode of the
file that it has opened, and never follows a link or waits for a FIFO. Ancestors of a folder need no check: a user who
can move our folder away cannot make a file of our user in its place.

A new file has a temporary name, ``<name>.<16 hex digits>.tmp``, that did not exist before (``O_EXCL``), and is renamed
into place. A crash leaves at most a temporary, which nothing reads: ``remove_temporaries``. Threads: any.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PRIVATE = 0o600
"""Mode of a file of this user alone: KV cache is as confidential as the prompts."""

logger = logging.getLogger(__name__)

_WRITABLE_BY_OTHERS = 0o022
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_TEMPORARY = re.compile(r"(\.[0-9a-f]{16})?\.tmp$")  # version 0.1 made them without the digits


class ForeignFileError(OSError):
    """A file or folder that another user owns or may write, or one of another kind than is expected there."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(errno.EPERM, reason, str(path))


def open_own(path: Path, flags: int = os.O_RDONLY, *, shared: bool = False) -> int:
    """Descriptor of a regular file of this user that no other user may write. Raises ``OSError``.

    ``flags``: as for ``os.open``; with ``O_CREAT`` the file gets mode 0600. ``shared``: others may write it. Never
    follows a link, never waits.
    """
    safe = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path, flags | safe, PRIVATE)
    except OSError as exc:
        if exc.errno == errno.ELOOP:
            raise ForeignFileError(path, "is a link") from exc
        raise
    try:
        _check_own(path, os.fstat(fd), shared=shared)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_own(path: Path, limit: int, *, shared: bool = False) -> bytes:
    """The whole file, at most ``limit`` bytes. Raises ``OSError``, also for a longer one, before it is read."""
    fd = open_own(path, shared=shared)
    with open(fd, "rb") as file:
        size = os.fstat(fd).st_size
        if size > limit:
            raise OSError(
                errno.EFBIG,
                f"has {size} bytes, more than the {limit} that are plausible",
                str(path),
            )
        return file.read(size)


def own_folder(path: Path) -> Path:
    """The folder ``path``, made with mode 0700 if it is missing; a link of this user or of root is resolved.

    A folder of this user that others may write gets mode 0700. Raises ``OSError``.
    """
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    about = path.lstat()
    if stat.S_ISLNK(about.st_mode):
        if about.st_uid:
            _check_owner(path, about)
        path = path.resolve(strict=True)
    with open_directory(path) as fd:
        about = os.fstat(fd)
        _check_owner(path, about)
        if about.st_mode & _WRITABLE_BY_OTHERS:
            os.fchmod(fd, 0o700)
            mode = stat.S_IMODE(about.st_mode)
            logger.warning(
                "flexkv: %s had mode %04o, so others could write it; it has 0700 now", path, mode
            )
    return path


def read_secret(path: Path, limit: int) -> bytes:
    """Content of a file that holds a secret; a link to it is followed, as secret volumes of Kubernetes are links.

    It belongs to this user or to root, and no others may read it; a group may, if this process is in that group (as
    with ``fsGroup``). Raises ``OSError`` with the reason.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        about = os.fstat(fd)
        mode = stat.S_IMODE(about.st_mode)
        if not stat.S_ISREG(about.st_mode):
            raise ForeignFileError(path, "is not a regular file")
        if about.st_uid:
            _check_owner(path, about)
        if mode & 0o037:
            raise ForeignFileError(path, f"mode {mode:04o} lets others read or change it")
        if mode & 0o040:
            if about.st_gid not in (os.getegid(), *os.getgroups()):
                raise ForeignFileError(path, f"mode {mode:04o} lets group {about.st_gid} read it")
            logger.info(
                "flexkv: %s may be read by group %d, as its mode %04o says",
                path,
                about.st_gid,
                mode,
            )
        if about.st_size > limit:
            raise OSError(errno.EFBIG, f"has more than {limit} bytes", str(path))
        return file.read(limit + 1)


def _check_own(path: Path, about: os.stat_result, *, shared: bool) -> None:
    if not stat.S_ISREG(about.st_mode):
        raise ForeignFileError(path, "is not a regular file")
    _check_owner(path, about)
    if about.st_mode & _WRITABLE_BY_OTHERS and not shared:
        mode = stat.S_IMODE(about.st_mode)
        raise ForeignFileError(path, f"has mode {mode:04o}, so others may write it")


def _check_owner(path: Path, about: os.stat_result) -> None:
    if about.st_uid != os.geteuid():
        raise ForeignFileError(
            path, f"belongs to uid {about.st_uid}, this process is uid {os.geteuid()}"
        )


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
