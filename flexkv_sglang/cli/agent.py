"""``flexkv agent``: runs this node's agent in the foreground; rank processes start it the same way."""

from __future__ import annotations

import json
import logging
import logging.handlers
import resource
import signal
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any

from flexkv_sglang.backends.fleet.wire.curve import load_secret
from flexkv_sglang.cli.output import complain
from flexkv_sglang.config.parsers import shown
from flexkv_sglang.config.settings import FlexKVConfig
from flexkv_sglang.errors import ConfigError, FlexKVError
from flexkv_sglang.sharing.agent import Agent
from flexkv_sglang.sharing.lifecycle.agent_notes import AgentNotes, note_failure
from flexkv_sglang.sharing.lifecycle.fitness import new_card, secret_id
from flexkv_sglang.sharing.lifecycle.handover import AgentLock
from flexkv_sglang.sharing.run_dir import RunDir

logger = logging.getLogger(__name__)

_LOG_BYTES = 1 << 20
_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def run_agent(
    config_path: Path,
    run_path: Path | None,
    *,
    for_ranks: bool,
    succeed: str = "",
    times: Mapping[str, Any] = MappingProxyType({}),
) -> int:
    """Exit code 0 when stopped, no longer needed, or when another agent lives; 1 for an unusable run directory.

    2 for a wrong setting. ``succeed``: name of the living agent that hands over to this one. ``times``: fields of
    ``ShareConfig`` that are no settings, for tests.
    """
    run_dir = RunDir(run_path) if run_path is not None else None
    try:
        config = _read(config_path)
        config = replace(config, share=replace(config.share, **times))
        run_dir = run_dir or RunDir.of(config)
        _raise_file_limit()
        stop = threading.Event()

        def end(_number: int, _frame: FrameType | None) -> None:
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end)
        while _live(config, run_dir, stop, for_ranks=for_ranks, succeed=succeed):
            logger.info("flexkv: starting again")
    except (FlexKVError, OSError) as exc:
        if for_ranks and run_dir is not None:
            _leave_word(run_dir, exc)
        complain(str(exc))  # the log of an agent that a rank process started
        return 2 if isinstance(exc, ConfigError) else 1
    return 0


def _leave_word(run_dir: RunDir, error: Exception) -> None:
    with suppress(OSError):
        note_failure(
            run_dir, str(error), f"A rank process starts it again soon. More: {run_dir.log_path}"
        )


def _live(
    config: FlexKVConfig, run_dir: RunDir, stop: threading.Event, *, for_ranks: bool, succeed: str
) -> bool:
    """Run one agent, from its lock to its end. True if its run directory was removed, so that a new one is needed."""
    run_dir.make()
    secret = load_secret(config.share)
    kid = secret_id(secret, config.share.cluster_id)
    card = new_card(config.share, kid, by_hand=not for_ranks)
    notes = AgentNotes(card["instance"])
    _log_to(run_dir.log_path if for_ranks else None, notes)
    lock = AgentLock(run_dir, card, succeed)
    if lock.lock is None and not lock.waits:
        logger.info("flexkv: an agent lives already: %s", run_dir.agent())
        return False
    try:
        agent = Agent(config, run_dir, secret, card, notes)
        try:
            if not agent.start(lock, stop):
                return False
            if agent.run(stop):
                agent.hand_over(stop)
                return False
            return not stop.is_set() and not lock.in_place
        finally:
            agent.close()
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


def _log_to(path: Path | None, notes: AgentNotes) -> None:
    handler: logging.Handler = logging.StreamHandler()
    if path is not None:
        handler = logging.handlers.RotatingFileHandler(path, maxBytes=_LOG_BYTES, backupCount=1)
    logging.basicConfig(level=logging.INFO, format=_FORMAT, handlers=[handler, notes], force=True)


def _raise_file_limit() -> None:
    """Raise the limit of open files: each node needs a socket."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
