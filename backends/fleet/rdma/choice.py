"""Which one-sided engine a configuration asks for."""

from __future__ import annotations

import logging
from collections.abc import Callable

from flexkv_sglang.backends.fleet.rdma.base import OneSidedEngine
from flexkv_sglang.config.share import ShareConfig

logger = logging.getLogger(__name__)

_kept: list[
    object
] = []  # engines that still run, and their memory: freed, it would end the process


def open_engine(share: ShareConfig, host: Callable[[], str]) -> OneSidedEngine | None:
    """None for ``zmq``. ``host``: where others reach this machine. Raises ``ConfigError`` for an engine not there."""
    if share.engine == "zmq":
        return None
    engine: OneSidedEngine
    if share.engine == "nixl":
        from flexkv_sglang.backends.fleet.rdma.nixl import NixlEngine

        engine = NixlEngine()
    else:
        assert share.engine == "mooncake", share.engine
        from flexkv_sglang.backends.fleet.rdma.mooncake import MooncakeEngine

        engine = MooncakeEngine(host())
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
