"""Which implementation serves a device: the Triton kernels or plain torch. triton is imported here and nowhere else."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch

from flexkv_sglang.triton_kernels import reference

LAUNCH = "flexkv_sglang.triton_kernels.launch"


def implementation(device: torch.device) -> ModuleType:
    """The module with ``gather`` and the others: kernels on CUDA and HIP when triton is there, torch otherwise."""
    if device.type == "cuda" and has_triton():
        return importlib.import_module(LAUNCH)
    return reference


@functools.cache
def has_triton() -> bool:
    """Can ``triton`` be imported?"""
    return importlib.util.find_spec("triton") is not None
