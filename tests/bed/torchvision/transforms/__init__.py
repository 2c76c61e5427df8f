"""Names of ``torchvision.transforms`` that are imported at start; see the package."""

from __future__ import annotations

import enum


class InterpolationMode(enum.Enum):
    """Tables in transformers are keyed by these at import time."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"
