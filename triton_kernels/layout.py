"""Names of the byte orders a page can have, shared by kernels, linker and tests.

The kernels themselves come with the GPU-direct path; the storage backend never sees device memory.
"""

from __future__ import annotations

from typing import Final

PAGE_LAYOUTS: Final = ("layer_first", "page_first", "page_first_direct", "page_head")
"""SGLang's ``--hicache-mem-layout`` values; linker blocks are byte-equal to ``page_first_direct``."""
