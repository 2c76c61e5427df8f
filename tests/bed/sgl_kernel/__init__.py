"""Stand-in for SGLang's compiled kernels, so that an unmodified SGLang starts on a plain CPU. Tests only.

SGLang imports ``sgl_kernel`` in places without asking whether it is there. On a CPU without AMX it then uses
torch for everything but one index helper, which is written out below; the host-device copies of HiCache
are in ``sgl_kernel.kvcacheio``. Any other kernel exists by name and raises when it is called: a model that
needs one must fail loudly and not compute something else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch

__version__ = "0.0.0+flexkv.test.bed"


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Write each request's new cache slots into its row of the request table (SGLang's signature)."""
    del pool_len
    taken = 0
    for row, first, last in zip(
        req_pool_indices.tolist(), start.tolist(), end.tolist(), strict=True
    ):
        count = last - first
        req_to_token[row, first:last] = out_cache_loc[taken : taken + count].to(req_to_token.dtype)
        taken += count


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_args: object, **_kwargs: object) -> NoReturn:
        raise NotImplementedError(f"the CPU test bed has no kernel sgl_kernel.{name}")

    missing.__name__ = name
    return missing
