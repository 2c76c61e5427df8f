"""What the server this process belongs to serves: which weights, in pools of which shape.

Only reads SGLang's resolved arguments and the files they name. A name that another release does not have
reads as absent.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexkv_sglang.errors import ConfigError
from flexkv_sglang.identity.epochs import Epoch
from flexkv_sglang.identity.fingerprint import Checkpoint, checkpoint
from flexkv_sglang.integration.compat import server_args

logger = logging.getLogger(__name__)

_POOL_GEOMETRY = (
    "head_num",
    "head_dim",
    "v_head_dim",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "kv_cache_dim",
    "index_head_dim",
    "target_layer_num",
    "head_group_num",
    "end_layer",
)
_HEAD_COUNTS = frozenset({"head_num", "head_group_num"})
_FROM_ELSEWHERE = ("remote", "remote_instance", "rdma", "ipc_cache", "private")
"""Load formats whose weights are not the files at ``model_path``."""

_started_with: dict[tuple[str, str | None], Checkpoint] = {}
"""Checkpoints as they were when first asked for: their files may be replaced while the weights stay."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model this server has loaded from files: the target model or the draft model."""

    path: str
    revision: str | None
    load_format: str


def pool_geometry(pool: Any, head_groups: int = 1) -> dict[str, int]:
    """Those shape fields that this kind of host pool has; heads are those of one of ``head_groups`` groups."""
    found = {name: getattr(pool, name, None) for name in _POOL_GEOMETRY}
    shape = {name: int(value) for name, value in found.items() if isinstance(value, int)}
    return {n: max(1, v // head_groups) if n in _HEAD_COUNTS else v for n, v in shape.items()}


def model_identity(model_id: str | None, epoch: Epoch, *, draft: bool = False) -> str:
    """One text that differs whenever the weights, or the configuration they are run with, differ.

    ``model_id`` (configured) names both as they are at the start; otherwise the served checkpoint's files
    are fingerprinted. ``draft``: for a pool of the draft model, whose KV cache depends on both models.
    Raises ``ConfigError`` if there are no files to look at and no ``model_id``: a name alone would let
    two models share pages.
    """
    args = server_args()
    target = _named(model_id, _target(args), epoch.content)
    if not draft:
        return target
    own = _draft(args)
    if own == _target(args):
        return f"{target} draft {target}"
    # SGLang loads new weights into both; those that a draft of its own path does not have stay as they are.
    updated = " updated" if epoch.content else ""
    return f"{target} draft {_named(model_id, own, '')}{updated}"


def loaded_content(path: str, load_format: str | None) -> str:
    """Fingerprint of weights just loaded from ``path``; "" if there are no local files to look at."""
    args = server_args()
    model = ServedModel(path, getattr(args, "revision", None), "")
    try:
        found = _fingerprint(model, None)  # SGLang reads an update from the usual cache
    except OSError as exc:
        logger.warning("flexkv: cannot fingerprint %r: %s", path, exc)
        return ""
    if found is None or found.weights is None:
        return ""
    usual = load_format in (None, "auto", getattr(args, "load_format", None))
    return found.weights if usual else f"{found.weights}+{load_format}"


def _named(model_id: str | None, model: ServedModel | None, content: str) -> str:
    if model_id:
        return f"id:{model_id}" + (f" weights:{content}" if content else "")
    started = _started(model)
    return f"config:{started.config} weights:{content or started.weights}"


def _started(model: ServedModel | None) -> Checkpoint:
    if model is None:
        raise _nothing_to_look_at("the served model is unknown to this release of SGLang")
    if model.load_format in _FROM_ELSEWHERE:
        raise _nothing_to_look_at(f"load_format {model.load_format!r} takes weights from elsewhere")
    if getattr(server_args(), "weight_cache_mode", None) == "client":
        raise _nothing_to_look_at("weight_cache_mode 'client' takes weights from another process")
    found = _started_with.get((model.path, model.revision))
    try:
        found = found or _fingerprint(model, getattr(server_args(), "download_dir", None))
    except OSError as exc:
        raise _nothing_to_look_at(f"{model.path!r} cannot be read: {exc}") from exc
    if found is None:
        raise _nothing_to_look_at(f"there are no local files of {model.path!r}")
    if found.weights is None and model.load_format != "dummy":
        raise _nothing_to_look_at(f"{model.path!r} holds no weight files")
    _started_with[model.path, model.revision] = found
    return found


def _fingerprint(model: ServedModel, download_dir: str | None) -> Checkpoint | None:
    """Of the files SGLang loads, hub models from ``download_dir``; None if there are none. Raises ``OSError``."""
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


def _nothing_to_look_at(why: str) -> ConfigError:
    return ConfigError(
        f"model_id: not set, and the weights cannot be fingerprinted: {why}. "
        "Valid: any text that names these weights and no others"
    )


def _target(args: Any) -> ServedModel | None:
    try:
        return ServedModel(str(args.model_path), args.revision, plain(args.load_format))
    except AttributeError:
        return None


def _draft(args: Any) -> ServedModel | None:
    """Draft models of the ``NEXTN`` kind are part of the target checkpoint."""
    path = getattr(args, "speculative_draft_model_path", None)
    target = _target(args)
    if not path or target is None:
        return target
    revision = getattr(args, "speculative_draft_model_revision", None)
    load_format = getattr(args, "speculative_draft_load_format", None) or target.load_format
    return ServedModel(str(path), revision, plain(load_format))


def directory_of(model: ServedModel) -> Path | None:
    """Where its files lie, a hub model in the usual cache; None if nowhere on this machine."""
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
    """The folder below ``--download-dir`` that holds a model of the hub."""
    try:
        from huggingface_hub import snapshot_download

        found = snapshot_download(
            model.path, revision=model.revision, cache_dir=download_dir, local_files_only=True
        )
    except (ImportError, ValueError, OSError):
        return None
    return Path(found)


def plain(value: Any) -> str:
    """Enumerations by their value, whether SGLang has turned the text into one yet or not."""
    return str(getattr(value, "value", value))
