"""Every function of ``torchvision.transforms.functional``, none of which works; see the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_args: object, **_kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f"the CPU test bed has no torchvision.transforms.functional.{name}"
        )

    return missing
