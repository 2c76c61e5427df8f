"""Stand-in for torchvision: SGLang and transformers import its names at start even for a text model. Tests only.

The published wheels fit one build of torch each, and a CUDA build of torchvision cannot be imported beside a
CPU torch. Nothing here works on images: every function raises when it is called.
"""

from __future__ import annotations

__version__ = "0.0.0+flexkv.test.bed"
