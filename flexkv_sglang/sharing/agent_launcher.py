"""AgentLauncher: starts an agent beside this rank process whenever there is none.

The agent must outlive the server, so it is no descendant of it: SGLang kills those when it ends. A shell starts the
agent in the background and exits, and init inherits it. Of several agents that start at once, one takes the lock and
the others end.
"""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from flexkv_sglang.backoff import Backoff
from flexkv_sglang.config.settings import FlexKVConfig
from flexkv_sglang.sharing.run_dir import RunDir, settings_digest
from flexkv_sglang.threads import PeriodicThread

logger = logging.getLogger(__name__)

_CHECK_S = 5.0
_IDLE_S = 1.0
_PAUSE_S, _PAUSE_MAX_S = 2.0, 60.0
_JOIN_S = 2.0
_SHELL_S = 10.0

FLEXKV = (sys.executable, "-P", "-m", "flexkv_sglang.cli")
"""The command ``flexkv``."""


class AgentLauncher:
    """Holds this process's rank lock. ``idle`` is called every second, on the thread. Raises ``OSError``."""

    def __init__(
        self,
        config: FlexKVConfig,
        run_dir: RunDir,
        idle: Callable[[], None] = lambda: None,
        *,
        check_s: float = _CHECK_S,
        flexkv: Sequence[str] = FLEXKV,
    ) -> None:
        self._flexkv = flexkv
        self._idle = idle
        self._config = config
        self._run_dir = run_dir
        self._check_s = check_s
        self._digest = settings_digest(config.share)
        self._lock = run_dir.take_rank_lock()
        self._mismatch_logged = False
        self._reported = ""
        self._check_at = 0.0
        self._backoff = Backoff(_PAUSE_S, _PAUSE_MAX_S)
        self.usable = True  # False: the agent runs with other settings
        self._thread = PeriodicThread(
            "flexkv-agent-keeper",
            self._step,
            lambda: None,
            trouble="flexkv: the replica cannot be followed",
            retry_s=0.0,  # a step pauses
        )

    def start(self) -> None:
        """Start the thread; it starts the agent."""
        self._run_dir.add_places(self._config)
        self._thread.start()

    def report(self, fields: Mapping[str, object]) -> None:
        """Write this rank process's view of other nodes into its lock, for ``flexkv nodes``. Raises ``OSError``."""
        text = json.dumps(fields, sort_keys=True)
        if text != self._reported:
            self._lock.write(text)
            self._reported = text

    def close(self) -> None:
        """End the thread and release the rank lock; the agent stays. Idempotent."""
        self._thread.stop()
        self._thread.join(time.monotonic() + _JOIN_S)
        self._lock.close()
        self._lock.path.unlink(missing_ok=True)

    def _step(self) -> float:
        if time.monotonic() >= self._check_at:
            pause = self._check_s
            self._check_at = time.monotonic() + pause
            if self._ensure_running():
                self._backoff.reset()
            else:
                pause = max(self._backoff.failed(), self._check_s) * random.uniform(0.8, 1.2)
            self._check_at = time.monotonic() + pause
        self._thread.pause(_IDLE_S)
        if not self._thread.stopped:
            self._idle()
        return 0.0

    def _ensure_running(self) -> bool:
        """True if an agent lives. If not, start one; a failure is logged."""
        try:
            self._recreate_run_dir()
            if self._agent_lives():
                return True
            launch_agent(self._config, self._run_dir, self._flexkv)
        except (OSError, subprocess.SubprocessError) as exc:
            logger.warning("flexkv: the agent cannot be started: %s", exc)
        return False

    def _recreate_run_dir(self) -> None:
        """Make the run directory and our lock again if /dev/shm was cleaned (systemd does so at a logout)."""
        if self._lock.in_place:
            return
        self._run_dir.make()
        lost, self._lock = self._lock, self._run_dir.take_rank_lock()
        lost.close()
        self._reported = ""
        self._run_dir.add_places(self._config)
        logger.warning("flexkv: %s had been removed; it is made again", self._run_dir.path)

    def _agent_lives(self) -> bool:
        """Does an agent live? ``usable`` says afterwards if its settings are ours."""
        agent = self._run_dir.agent()
        if agent is None:
            return False
        other = agent.get("settings", self._digest) != self._digest
        self.usable = not other
        if other and not self._mismatch_logged:
            self._mismatch_logged = True
            logger.error(
                "flexkv: the agent of %s (pid %s) runs with other settings of share: this process does not share "
                "with other nodes. Give all servers of a node the same settings, or their own share.run_dir",
                self._run_dir.path,
                agent.get("pid"),
            )
        return True


def launch_agent(config: FlexKVConfig, run_dir: RunDir, flexkv: Sequence[str] = FLEXKV) -> None:
    """Start an agent as a child of init, in our working directory: paths may be relative to it.

    Raises ``OSError``, ``subprocess.SubprocessError``.
    """
    run_dir.write_config(config)
    command = [*flexkv, "agent", "--config", str(run_dir.config_path)]
    command += ["--run-dir", str(run_dir.path), "--for-ranks"]
    with run_dir.log_path.open("ab") as log:
        subprocess.run(
            ["/bin/sh", "-c", '"$@" &', "sh", *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            timeout=_SHELL_S,
            check=True,
        )
    logger.info("flexkv: agent started; it writes %s", run_dir.log_path)
