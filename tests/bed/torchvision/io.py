"""Names of ``torchvision.io`` that are imported at start; see the package."""

from __future__ import annotations

import enum
from typing import NoReturn


class ImageReadMode(enum.Enum):
    """Only the name is needed."""

    UNCHANGED = 0


def decode_image(*_args: object, **_kwargs: object) -> NoReturn:
    raise NotImplementedError("the CPU test bed has no torchvision")


decode_jpeg = read_image = decode_image
