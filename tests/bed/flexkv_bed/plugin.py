"""An SGLang plug-in that lets HiCache's host pools work on the CPU. Does nothing where CUDA is there."""

from __future__ import annotations

import importlib
from typing import Any

_HOST_POOL_INIT = "sglang.srt.mem_cache.pool_host.base.HostKVCache.__init__"
_POOL_MODULES = (
    "sglang.srt.mem_cache.pool_host.mha",
    "sglang.srt.mem_cache.pool_host.mla",
    "sglang.srt.mem_cache.pool_host.unified",
)


def register() -> None:
    """Entry point of the group ``sglang.srt.plugins``: every SGLang process calls it at start."""
    import torch

    if torch.cuda.is_available():
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(_HOST_POOL_INIT, without_pinning, HookType.BEFORE)
    _bind_copies()


def without_pinning(pool: Any, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pinning is ``cudaHostRegister``; the parameter is keyword-only in the releases the bed supports."""
    return (pool, *args), {**kwargs, "pin_memory": False}


def _bind_copies() -> None:
    """SGLang imports the copy kernels into its pool modules only under CUDA: put the torch ones there."""
    import sgl_kernel.kvcacheio as copies

    for name in _POOL_MODULES:
        module = importlib.import_module(name)
        for function in copies.ALL:
            if not hasattr(module, function):
                setattr(module, function, getattr(copies, function))
