"""``flexkv agent``: runs this node's agent in the foreground; rank processes start it the same way."""

from __future__ import annotations

import json
import logging
import logging.handlers
import resource
import signal
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any

from flexkv_sglang.cli.output import complain
from flexkv_sglang.config.parsers import shown
from flexkv_sglang.config.settings import FlexKVConfig
from flexkv_sglang.errors import ConfigError, FlexKVError
from flexkv_sglang.sharing.agent import Agent
from flexkv_sglang.sharing.run_dir import RunDir, settings_digest

logger = logging.getLogger(__name__)

_LOG_BYTES = 1 << 20
_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def run_agent(
    config_path: Path,
    run_path: Path | None,
    *,
    for_ranks: bool,
    times: Mapping[str, Any] = MappingProxyType({}),
) -> int:
    """Exit code 0 when stopped, no longer needed, or when another agent lives; 1 for an unusable run directory.

    2 for a wrong setting. ``times``: fields of ``ShareConfig`` that are no settings, for tests.
    """
    try:
        config = _read(config_path)
        config = replace(config, share=replace(config.share, **times))
        run_dir = RunDir.of(config) if run_path is None else RunDir(run_path)
        _raise_file_limit()
        stop = threading.Event()

        def end(_number: int, _frame: FrameType | None) -> None:
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end)
        while _live(config, run_dir, stop, for_ranks=for_ranks):
            logger.info("flexkv: starting again")
    except (FlexKVError, OSError) as exc:
        complain(str(exc))  # the log of an agent that a rank process started
        return 2 if isinstance(exc, ConfigError) else 1
    return 0


def _live(config: FlexKVConfig, run_dir: RunDir, stop: threading.Event, *, for_ranks: bool) -> bool:
    """Run one agent, from its lock to its end. True if its run directory was removed, so that a new one is needed."""
    run_dir.make()
    _log_to(run_dir.log_path if for_ranks else None)
    lock = run_dir.take_agent_lock(settings_digest(config.share))
    if lock is None:
        logger.info("flexkv: an agent lives already: %s", run_dir.agent())
        return False
    try:
        agent = Agent(config, run_dir, by_hand=not for_ranks)
        try:
            agent.run(stop, lambda: lock.in_place)
        finally:
            agent.close()
        return not stop.is_set() and not lock.in_place
    finally:
        lock.close()


def _read(path: Path) -> FlexKVConfig:
    try:
        given = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as exc:
        raise ConfigError(f"--config: {str(path)!r} cannot be read: {exc}") from exc
    if not isinstance(given, dict):
        raise ConfigError(f"--config: {str(path)!r} holds {type(given).__name__}. Valid: an object")
    config = FlexKVConfig.parse(given)
    if not config.share.wanted:
        raise ConfigError(
            f"share: {shown(given.get('share'))} in {str(path)!r} names no other nodes. "
            "Valid: redis_url, or peers, or both"
        )
    return config


def _log_to(path: Path | None) -> None:
    handler: logging.Handler = logging.StreamHandler()
    if path is not None:
        handler = logging.handlers.RotatingFileHandler(path, maxBytes=_LOG_BYTES, backupCount=1)
    logging.basicConfig(level=logging.INFO, format=_FORMAT, handlers=[handler], force=True)


def _raise_file_limit() -> None:
    """Raise the limit of open files: each node needs a socket."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
