"""SGLang's external linker: moves pages between device pools and the tiers without a host cache.

It uses the stores of ``pools/`` as the storage backend does; code that both need does not belong here.
"""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """``FlexKVLinker``, for SGLang's ``linker_module_path``; imported late, because it imports torch."""
    if name != "FlexKVLinker":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("flexkv_sglang.linker.linker").FlexKVLinker
