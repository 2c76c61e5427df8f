"""FlexKV for SGLang: an L3 storage backend for HiCache, on local SSDs and on other machines.

Public names are imported lazily: ``sglang.srt.plugins`` loads this package in processes that must not
pay for (or fail on) torch. Single modules here are used by all folders and import no folder.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexkv_sglang.config.settings import FlexKVConfig
    from flexkv_sglang.integration.storage import FlexKVStorage

__version__ = "0.1.0"
__all__ = ["FlexKVConfig", "FlexKVStorage", "__version__"]

_HOME = {
    "FlexKVStorage": "flexkv_sglang.integration.storage",
    "FlexKVConfig": "flexkv_sglang.config.settings",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
