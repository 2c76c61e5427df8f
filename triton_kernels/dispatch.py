"""Chooses the implementation for a device: the Triton kernels or plain torch. No other module looks for triton."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch

from flexkv_sglang.triton_kernels import reference


def copies(device: torch.device) -> ModuleType:
    """``launch`` where kernels run, else ``reference``: both have ``gather``, ``scatter`` and ``prepare``.

    This is the only import of a module that imports triton.
    """
    if runs_kernels(device):
        return importlib.import_module("flexkv_sglang.triton_kernels.launch")
    return reference


def runs_kernels(device: torch.device) -> bool:
    """Kernels run on CUDA and HIP devices where triton is installed."""
    return device.type == "cuda" and has_triton()


@functools.cache
def has_triton() -> bool:
    """True when ``triton`` can be imported."""
    return importlib.util.find_spec("triton") is not None
