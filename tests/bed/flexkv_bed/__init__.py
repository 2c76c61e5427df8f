"""The CPU test bed: an unmodified SGLang with HiCache on a machine without a GPU. Tests and demo only.

Real: scheduler, radix tree, cache controller, host pools, storage threads, HTTP server, model execution.
Replaced: the CUDA kernels that copy pages between device and host memory (``sgl_kernel.kvcacheio``), pinned
memory, and torchvision. CPU streams and events do nothing, so ordering bugs of streams cannot show here.
"""

from __future__ import annotations

REPLACED_ON_CPU = (
    "the CUDA kernels that copy pages between device and host memory (L1 <-> L2) are torch copies here, "
    "and host memory is not pinned"
)
