"""What the server this process belongs to serves: which weights, with which settings that change KV cache.

Only reads SGLang's published arguments and the files they name. A name that another release does not have
reads as absent.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexkv_sglang.compat import UNKNOWN, server_args
from flexkv_sglang.epochs import Epoch
from flexkv_sglang.errors import ConfigError
from flexkv_sglang.fingerprint import Checkpoint, checkpoint, file_digest

logger = logging.getLogger(__name__)

KV_SETTINGS = (
    "load_format",
    "model_loader_extra_config",
    "custom_weight_loader",
    "model_impl",
    "json_model_override_args",
    "context_length",  # some models scale their rotary embedding by it
    "dtype",
    "quantization",
    "quantization_param_path",  # scaling factors of an fp8 KV cache
    "kv_cache_dtype",  # host pools of both fp8 types say uint8
    "qsa_indexer_dtype",
    "enable_deepseek_v4_fp4_indexer",
    "mamba_ssm_dtype",
    "enable_int8_mamba_checkpoint",
    "modelopt_quant",
    "modelopt_checkpoint_restore_path",
    "quantize_and_serve",
    "torchao_config",
    "rl_quant_profile",
    "decrypted_config_file",
    "enable_page_major_kv_layout",
)
"""Server arguments that change the bytes of a page, beside those that shape the host pool."""

DRAFT_SETTINGS = (
    "speculative_algorithm",
    "speculative_draft_load_format",
    "speculative_draft_model_quantization",
    "speculative_draft_kv_cache_dtype",
    "speculative_draft_window_size",
    "uno_lora_path",
)
"""Those that change the bytes of a draft model's pages as well."""

KV_ENVIRONMENT = ("SGLANG_USE_HND_KVCACHE", "SGLANG_AITER_KV_CACHE_LAYOUT")
"""SGLang's own switches of the byte order in device memory, which reaches the host pool as it is."""

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

_FILES = ("quantization_param_path", "decrypted_config_file", "rl_quant_profile")
_ABSENT = (None, False, "", "{}")

_started_with: dict[Path, Checkpoint] = {}
"""Checkpoints as they were when first asked for: their files may be replaced while the weights stay."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model this server has loaded from files: the target model or the draft model."""

    path: str
    revision: str | None
    load_format: str


def kv_settings(*, draft: bool = False) -> dict[str, str]:
    """Server arguments that change page bytes, those that are set. Files are named by their content.

    ``draft``: for a pool of the draft model. Raises ``ConfigError`` if a file cannot be read.
    """
    args = server_args()
    names = KV_SETTINGS + (DRAFT_SETTINGS if draft else ())
    found = {name: value for name in names if (value := getattr(args, name, None)) not in _ABSENT}
    if _plain(getattr(args, "load_format", None)) == "dummy":
        found["random_seed"] = args.random_seed
    settings = {name: _text(name, value) for name, value in found.items()}
    settings.update(_environment())
    if getattr(args, "enable_lora", False) or getattr(args, "lora_paths", None):
        _check_adapters_are_in_the_page_hash()
    adapters = _adapters(getattr(args, "lora_paths", None))
    if adapters:
        settings["lora_paths"] = adapters
    return settings


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
    return f"{target} draft {_named(model_id, _draft(args), '')}"


def loaded_content(path: str, load_format: str | None) -> str:
    """Fingerprint of weights just loaded from ``path``; "" if there are no local files to look at."""
    args = server_args()
    directory = _directory(ServedModel(path, getattr(args, "revision", None), ""))
    try:
        weights = None if directory is None else checkpoint(directory).weights
    except OSError as exc:
        logger.warning("flexkv: cannot fingerprint %r: %s", path, exc)
        return ""
    if weights is None:
        return ""
    usual = load_format in (None, "auto", getattr(args, "load_format", None))
    return weights if usual else f"{weights}+{load_format}"


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
    directory = _directory(model)
    if directory is None:
        raise _nothing_to_look_at(f"there are no local files of {model.path!r}")
    try:
        found = _started_with.get(directory) or checkpoint(directory)
    except OSError as exc:
        raise _nothing_to_look_at(f"{directory} cannot be read: {exc}") from exc
    if found.weights is None and model.load_format != "dummy":
        raise _nothing_to_look_at(f"{directory} holds no weight files")
    _started_with[directory] = found
    return found


def _nothing_to_look_at(why: str) -> ConfigError:
    return ConfigError(
        f"model_id: not set, and the weights cannot be fingerprinted: {why}. "
        "Valid: any text that names these weights and no others"
    )


def _target(args: Any) -> ServedModel | None:
    try:
        return ServedModel(str(args.model_path), args.revision, _plain(args.load_format))
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
    return ServedModel(str(path), revision, _plain(load_format))


def _directory(model: ServedModel) -> Path | None:
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


def _text(name: str, value: Any) -> str:
    if name not in _FILES:
        return _plain(value)
    try:
        return f"file:{file_digest(Path(value))}"
    except OSError as exc:
        raise ConfigError(f"{name}: {value!r} cannot be read: {exc}. Valid: a file") from exc


def _plain(value: Any) -> str:
    """Enumerations by their value, whether SGLang has turned the text into one yet or not."""
    return str(getattr(value, "value", value))


def _environment() -> dict[str, str]:
    try:
        from sglang.srt.environ import envs
    except UNKNOWN:
        return {}
    found = {name: getattr(envs, name).get() for name in KV_ENVIRONMENT if hasattr(envs, name)}
    usual = (*_ABSENT, "nhd")
    return {name: str(value) for name, value in found.items() if value not in usual}


def _check_adapters_are_in_the_page_hash() -> None:
    try:
        from sglang.srt.mem_cache.utils import storage_namespace_seed  # noqa: F401
    except ImportError as exc:
        raise ConfigError(
            "enable_lora: this release of SGLang leaves the adapter out of its page hash, so pages of "
            "different adapters would be exchanged. Valid: false, or a newer SGLang"
        ) from exc


def _adapters(given: Any) -> str:
    """Digest of the LoRA adapters of the command line.

    SGLang's page hash names those by name and path, which stay when their content changes. Adapters that
    are loaded later get a random id.
    """
    if not given:
        return ""
    named = given.items() if isinstance(given, Mapping) else (_adapter(item) for item in given)
    parts = []
    for name, path in sorted(named):
        directory = _directory(ServedModel(path, None, ""))
        try:
            found = None if directory is None else checkpoint(directory)
        except OSError as exc:
            raise ConfigError(f"lora_paths: {path!r} cannot be read: {exc}") from exc
        if found is None or found.weights is None:
            raise ConfigError(
                f"lora_paths: {path!r} has no local files to tell it from another adapter of that name. "
                "Valid: a directory, or an adapter loaded at run time"
            )
        parts.append(f"{name}={found.config}/{found.weights}")
    return " ".join(parts)


def _adapter(item: Any) -> tuple[str, str]:
    if isinstance(item, str):
        name, found, path = item.partition("=")
        return name, path if found else name
    if isinstance(item, Mapping):
        return str(item["lora_name"]), str(item["lora_path"])
    return str(item.lora_name), str(item.lora_path)
