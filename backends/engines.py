"""Which one-sided engine a configuration asks for."""

from __future__ import annotations

import logging

from flexkv_sglang.backends.engine_base import OneSidedEngine
from flexkv_sglang.share_settings import ShareConfig

logger = logging.getLogger(__name__)

_kept: list[
    object
] = []  # engines that still run, and their memory: freed, it would end the process


def open_engine(share: ShareConfig) -> OneSidedEngine | None:
    """None for ``zmq``. Raises ``ConfigError`` for an engine that is not there."""
    if share.engine == "zmq":
        return None
    assert share.engine == "nixl", share.engine
    from flexkv_sglang.backends.engine_nixl import NixlEngine

    engine = NixlEngine()
    logger.warning(
        "flexkv: share.engine %r listens on all interfaces, and neither authenticates nor encrypts: whoever reaches"
        " its ports may read and write the staging memory of this process. For trusted fabrics only",
        share.engine,
    )  # fmt: skip
    return engine


def close_engine(engine: OneSidedEngine, memory: object) -> None:
    """Close it; ``memory``, which holds what it has registered, lives on if the engine has not let go of it."""
    if not engine.close():
        logger.warning("flexkv: share.engine %r still runs: its memory is kept", engine.name)
        _kept.append((engine, memory))
