"""Every host pool SGLang has for MHA and MLA: layouts, page sizes, aligned and odd page bytes.

Run as a script it writes pages of all of them through SGLang's real controller and exits; the tests then
read them in another process: ``python pool_matrix.py STORAGE_DIR MODEL_DIR``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from flexkv_bed.controller import LAYOUTS, Geometry, Rig, boot, token_ids, write_pages

PAGE_SIZES = (1, 16, 64)
PAGES = 6


def aligned(kind: str, layout: str, page_size: int) -> Geometry:
    """Page bytes that are a multiple of 4096, in buffers of multiples of 512 bytes where the pool allows."""
    fields: dict[str, Any] = {"kind": kind, "layout": layout, "page_size": page_size}
    if kind == "mla":  # 160 bytes per token and layer
        return Geometry(
            **fields, layers={1: 128, 16: 8, 64: 4}[page_size], size_tokens=64 * page_size
        )
    return Geometry(**fields, layers=4, heads=8, head_dim=128, size_tokens=64 * page_size)


def odd(kind: str, layout: str, page_size: int) -> Geometry:
    """Page bytes that fit no sector."""
    return Geometry(
        kind=kind,  # type: ignore[arg-type]
        layout=layout,  # type: ignore[arg-type]
        page_size=page_size,
        layers=3,
        heads=1,
        head_dim=24,
        size_tokens=64 * page_size,
    )


def combinations() -> list[tuple[str, Geometry]]:
    """(name, geometry) of everything that is tested."""
    return [
        (f"{shape.__name__}-{kind}-{layout}-{page_size}", shape(kind, layout, page_size))
        for shape in (aligned, odd)
        for kind, layouts in LAYOUTS.items()
        for layout in layouts
        for page_size in PAGE_SIZES
    ]


def rig(geometry: Geometry, storage: str) -> Rig:
    """A controller with flexkv on ``storage``."""
    return Rig(geometry, extra={"path": storage, "size": "8MB"})


def prompt(geometry: Geometry) -> list[int]:
    """``PAGES`` whole pages."""
    return token_ids(PAGES * geometry.page_size)


def main(storage: str, model: str) -> None:
    """Write every combination."""
    boot(Path(model))
    for name, geometry in combinations():
        with rig(geometry, storage) as made:
            written = write_pages(made, prompt(geometry), seed=7)
            assert written.completed_tokens == PAGES * geometry.page_size, name
        print(name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
