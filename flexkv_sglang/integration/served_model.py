"""The identity of the served weights, from SGLang's resolved arguments and the files that they name.

A setting that this release of SGLang does not have counts as not set.
"""

from __future__ import annotations

import logging
from typing import Any

from flexkv_sglang.errors import ConfigError
from flexkv_sglang.identity.epochs import Epoch
from flexkv_sglang.identity.fingerprint import Checkpoint
from flexkv_sglang.integration.compat import as_text, server_args
from flexkv_sglang.integration.model_files import ServedModel, fingerprint

logger = logging.getLogger(__name__)

_FROM_ELSEWHERE = ("remote", "remote_instance", "rdma", "ipc_cache", "private")
"""Load formats that take weights from other places than ``model_path``."""

_started_with: dict[tuple[str, str | None], Checkpoint] = {}
"""Checkpoints at their first use. Their files may be replaced later, while the weights in memory stay."""


def model_identity(model_id: str | None, epoch: Epoch, *, draft: bool = False) -> str:
    """A text that differs whenever the weights or their configuration differ.

    ``model_id`` (configured) names both at the start; without it, the files of the served checkpoint are
    fingerprinted. ``draft``: for a pool of the draft model, whose KV cache depends on both models.
    Raises ``ConfigError`` if there are neither files nor a ``model_id``: with its name alone two models could share
    pages.
    """
    args = server_args()
    target = _named(model_id, _target(args), epoch.content)
    if not draft:
        return target
    own = _draft(args)
    if own == _target(args):
        return f"{target} draft {target}"
    # SGLang loads new weights into both; a draft with its own path keeps tensors that the new weights lack.
    updated = " updated" if epoch.content else ""
    return f"{target} draft {_named(model_id, own, '')}{updated}"


def loaded_content(path: str, load_format: str | None) -> str:
    """Fingerprint of weights that were just loaded from ``path``; "" if it has no local files."""
    args = server_args()
    model = ServedModel(path, getattr(args, "revision", None), "")
    try:
        found = fingerprint(model, None)  # SGLang reads an update from the usual cache
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
        found = found or fingerprint(model, getattr(server_args(), "download_dir", None))
    except OSError as exc:
        raise _nothing_to_look_at(f"{model.path!r} cannot be read: {exc}") from exc
    if found is None:
        raise _nothing_to_look_at(f"there are no local files of {model.path!r}")
    if found.weights is None and model.load_format != "dummy":
        raise _nothing_to_look_at(f"{model.path!r} holds no weight files")
    _started_with[model.path, model.revision] = found
    return found


def _nothing_to_look_at(why: str) -> ConfigError:
    return ConfigError(
        f"model_id: not set, and the weights cannot be fingerprinted: {why}. "
        "Valid: any text that names these weights and no others"
    )


def _target(args: Any) -> ServedModel | None:
    try:
        return ServedModel(str(args.model_path), args.revision, as_text(args.load_format))
    except AttributeError:
        return None


def _draft(args: Any) -> ServedModel | None:
    """The draft model. Those of the ``NEXTN`` kind are part of the target checkpoint."""
    path = getattr(args, "speculative_draft_model_path", None)
    target = _target(args)
    if not path or target is None:
        return target
    revision = getattr(args, "speculative_draft_model_revision", None)
    load_format = getattr(args, "speculative_draft_load_format", None) or target.load_format
    return ServedModel(str(path), revision, as_text(load_format))
