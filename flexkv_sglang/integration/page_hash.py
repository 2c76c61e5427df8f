"""The names that SGLang gives to stored pages: its page hash, and what that contains beside the tokens.

Up to 0.5.19 it holds the tokens alone. From 0.5.20 on a chain begins with a digest of the request's namespace: its
``extra_key``, which contains the id of the LoRA adapter, and its ``cache_salt``.
"""

from __future__ import annotations

import logging
from typing import Any

from flexkv_sglang.errors import ConfigError

logger = logging.getLogger(__name__)


def contains_namespace() -> bool:
    """Whether the page hash of the installed SGLang tells adapters, extra keys and salts apart."""
    try:
        from sglang.srt.mem_cache.utils import storage_namespace_seed  # noqa: F401
    except ImportError:
        return False
    return True


def refuse_adapters(args: Any) -> None:
    """Raise ``ConfigError`` if these server arguments allow LoRA adapters and the page hash leaves them out.

    ``enable_lora`` alone counts: adapters can then be loaded over HTTP at any time. Without it SGLang loads none.
    """
    allowed = getattr(args, "enable_lora", False) or getattr(args, "lora_paths", None)
    if allowed and not contains_namespace():
        raise ConfigError(
            f"enable_lora: SGLang {_release()} leaves the adapter out of its page hash, so pages of "
            "different adapters would be exchanged. Valid: false (and no lora_paths), or SGLang 0.5.20 or newer"
        )


def warn_of_salts() -> None:
    """Say in the log that salts isolate nothing, if they do not."""
    if not contains_namespace():
        logger.warning(
            "flexkv: SGLang %s names stored pages by their tokens alone: cache_salt and extra_key isolate nothing "
            "here, and requests of all tenants share stored pages. Remedy: SGLang 0.5.20 or newer, or for each tenant "
            "a server with its own path (and share.cluster_id)",
            _release(),
        )


def _release() -> str:
    import sglang

    return str(sglang.__version__)
