"""SGLang's external linker: pages between device pools and tiers without a host cache."""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """``FlexKVLinker``, by the module path that SGLang's ``dynamic`` linker is given; lazily, for torch."""
    if name != "FlexKVLinker":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("flexkv_sglang.linker.linker").FlexKVLinker
