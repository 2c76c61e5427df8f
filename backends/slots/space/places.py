"""Places: the configured directories, proven by real I/O, and the namespace folder in each."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flexkv_sglang.backends.io.probe import IoMode, probe_directory
from flexkv_sglang.backends.safe_files import ForeignFileError, own_folder
from flexkv_sglang.backends.slots.breaker import Breaker
from flexkv_sglang.backends.slots.manifest import MANIFEST, write_manifest
from flexkv_sglang.backends.slots.space.disk_space import floor_bytes, free_bytes
from flexkv_sglang.backends.slots.space.memory_limit import mount_of
from flexkv_sglang.backends.slots.space.owners import Holding, survey
from flexkv_sglang.errors import ConfigError, TierUnavailableError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """One configured directory: its namespace folder, how I/O works there, and its health.

    ``root``: the configured directory. ``fields``: the meaning of the namespace. ``made``: the folder is new.
    ``min_free``: bytes left to others on the disk (default: see ``floor_bytes``). ``durable``: flush at
    every commit.
    """

    directory: Path
    mode: IoMode
    root: Path
    fields: Mapping[str, object]
    made: bool = False
    breaker: Breaker = field(default_factory=Breaker)
    min_free: int | None = None
    durable: bool = False

    def survey(self) -> list[Holding]:
        """The owners on this disk; see ``space.owners``."""
        return survey(self.root, self.directory, self.fields)

    def spare_bytes(self) -> int:
        """What may still be taken of the disk. Negative if others have less than ``min_free`` already."""
        return self.free_bytes() - self.floor_bytes()

    def free_bytes(self) -> int:
        """Free space of the disk."""
        return free_bytes(self.directory)

    def floor_bytes(self) -> int:
        """Free space that is left to others."""
        return floor_bytes(self.directory, self.min_free)


def prepare_directory(path: str, io_engine: str, *, require_mount: bool = False) -> IoMode:
    """Make the directory if needed and prove that pages can be written and read there.

    ``require_mount``: only on a file system that is mounted below the root. Raises ``ConfigError`` naming the directory
    and the reason.
    """
    try:
        directory = Path(path).expanduser()
    except RuntimeError as exc:
        raise ConfigError(f"path: {path!r}: {exc} Valid: an absolute path") from exc
    mount = mount_of(directory) if require_mount else None
    if require_mount and (mount is None or mount.point == Path("/")):
        raise ConfigError(
            f"require_mount: {str(directory)!r} lies on the root file system: no disk is mounted there. "
            "Valid: mount the disk, correct path, or require_mount=false"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        mode = probe_directory(str(directory), io_engine)
    except OSError as exc:
        raise ConfigError(
            f"path: cannot use {str(directory)!r}: {exc.strerror or exc}. "
            "Valid: a directory this user can write to, on a disk with free space"
        ) from exc
    except TierUnavailableError as exc:
        raise ConfigError(
            f"path, io_engine={io_engine!r}: {exc}. Valid: io_engine 'auto' takes what works"
        ) from exc
    logger.info(
        "flexkv: %s: io_engine=%s o_direct=%s segment_align=%d%s",
        directory,
        mode.engine,
        str(mode.o_direct).lower(),
        mode.segment_align,
        f" (not better because {mode.reason})" if mode.reason else "",
    )
    return mode


def open_places(
    paths: Mapping[str, IoMode],
    namespace: str,
    fields: Mapping[str, object],
    *,
    min_free: int | None = None,
    durable: bool = False,
) -> list[Place]:
    """The namespace folder in each directory, with a NAMESPACE.json that describes it."""
    places = []
    for path, mode in paths.items():
        root = Path(path).expanduser()
        try:
            made = not (root / namespace).exists()
            directory = own_folder(root / namespace)
            if not (directory / MANIFEST).exists():
                write_manifest(directory, {"namespace": namespace, **fields})
        except ForeignFileError as exc:
            raise ConfigError(
                f"path: {exc.filename} {exc.strerror}. KV cache is read from files of this user only. "
                "Valid: another path for each user, or remove that folder"
            ) from exc
        except OSError as exc:
            raise ConfigError(
                f"path: cannot use {str(Path(path) / namespace)!r}: {exc.strerror or exc}. "
                "Valid: a directory this user can write to"
            ) from exc
        places.append(Place(directory, mode, root, fields, made, Breaker(), min_free, durable))
    return places
