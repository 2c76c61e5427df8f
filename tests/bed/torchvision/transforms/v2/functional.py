"""Every function of ``torchvision.transforms.v2.functional``, none of which works; see the package."""

from __future__ import annotations

from torchvision.transforms.functional import __getattr__  # noqa: F401  # serves `from ... import name`
