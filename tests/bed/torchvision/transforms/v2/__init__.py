"""Names of ``torchvision.transforms.v2`` that are imported at start; see the package."""

from __future__ import annotations

from torchvision.transforms.v2 import functional

__all__ = ["functional"]
