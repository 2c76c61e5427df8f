"""An SGLang plug-in that lets HiCache's host pools work on the CPU. Does nothing where CUDA is there."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

_HOST_POOL_MODULES = (  # the newest first
    "sglang.srt.mem_cache.pool_host.base",
    "sglang.srt.mem_cache.memory_pool_host",  # before 0.5.14
)
_POOL_MODULES = (
    "sglang.srt.mem_cache.pool_host.mha",
    "sglang.srt.mem_cache.pool_host.mla",
    "sglang.srt.mem_cache.pool_host.unified",
    "sglang.srt.mem_cache.memory_pool_host",
)


def register() -> None:
    """Entry point of the group ``sglang.srt.plugins``: every SGLang process calls it at start."""
    import torch

    if torch.cuda.is_available():
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    module = next(module for name in _HOST_POOL_MODULES if (module := _module(name)) is not None)
    HookRegistry.register(
        f"{module.__name__}.HostKVCache.__init__", without_pinning, HookType.AROUND
    )
    _bind_copies()


def without_pinning(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Pinning is ``cudaHostRegister``; where the parameter stands differs by release."""
    bound = inspect.signature(inspect.unwrap(original)).bind(*args, **kwargs)
    bound.arguments["pin_memory"] = False
    original(*bound.args, **bound.kwargs)


def _bind_copies() -> None:
    """SGLang imports the copy kernels into its pool modules only under CUDA: put the torch ones there."""
    import sgl_kernel.kvcacheio as copies

    for name in _POOL_MODULES:
        module = _module(name)
        for function in copies.ALL if module is not None else ():
            if not hasattr(module, function):
                setattr(module, function, getattr(copies, function))


def _module(name: str) -> ModuleType | None:
    """None where this release of SGLang does not have it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None
