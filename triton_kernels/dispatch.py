"""Which implementation serves a device: the Triton kernels or plain torch. Nobody else looks for triton."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch


def kernels(device: torch.device, module: str) -> ModuleType | None:
    """The module of this folder with the kernels, or ``None`` where the torch reference serves.

    Only here are modules imported that import triton.
    """
    if runs_kernels(device):
        return importlib.import_module(f"flexkv_sglang.triton_kernels.{module}")
    return None


def runs_kernels(device: torch.device) -> bool:
    """Kernels run on CUDA and HIP devices when triton is there."""
    return device.type == "cuda" and has_triton()


@functools.cache
def has_triton() -> bool:
    """Can ``triton`` be imported?"""
    return importlib.util.find_spec("triton") is not None
