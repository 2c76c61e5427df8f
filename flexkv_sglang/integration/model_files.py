"""The files of served models: in a directory, in the cache of the hub, or below ``--download-dir``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flexkv_sglang.identity.fingerprint import Checkpoint, checkpoint


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that the server loads from files: ``path`` is a file, a directory or a name of the hub."""

    path: str
    revision: str | None
    load_format: str


def fingerprint(model: ServedModel, download_dir: str | None) -> Checkpoint | None:
    """Fingerprint of the files SGLang loads; None if there are none here. Raises ``OSError``.

    ``download_dir``: holds the weights of hub models; None: the usual cache does.
    """
    path = Path(model.path)
    if path.is_file():
        return checkpoint(path.parent, only=path.name)
    directory = directory_of(model)
    if path.is_dir() or not download_dir:
        return None if directory is None else checkpoint(directory)
    downloaded = _snapshot(model, download_dir)  # the configuration is read from the usual cache
    if downloaded is None:
        return None
    config = checkpoint(directory or downloaded).config
    return Checkpoint(config, checkpoint(downloaded).weights)


def directory_of(model: ServedModel) -> Path | None:
    """The directory of a model's files, for a hub model in the usual cache; None if they are not on this machine."""
    path = Path(model.path)
    if path.is_dir():
        return path
    if path.is_file():
        return path.parent
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
    except (ImportError, ValueError, OSError):
        return None
    return Path(found).parent if isinstance(found, str) else None


def _snapshot(model: ServedModel, download_dir: str) -> Path | None:
    """The folder of a hub model below ``--download-dir``."""
    try:
        from huggingface_hub import snapshot_download

        found = snapshot_download(
            model.path, revision=model.revision, cache_dir=download_dir, local_files_only=True
        )
    except (ImportError, ValueError, OSError):
        return None
    return Path(found)
