"""AgentLauncher: keeps an agent of use beside this rank process.

Every 5 s it looks for an agent. None: it starts one. One that fits (``fitness``): it says so in its rank lock, which
keeps that agent alive. One that does not fit: it has it replaced if no living rank process needs it, and says once a
minute why not otherwise.

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
from typing import Any

from flexkv_sglang.backends.fleet.wire.curve import Secret
from flexkv_sglang.backoff import Backoff
from flexkv_sglang.config.settings import FlexKVConfig
from flexkv_sglang.log_limit import RateLimitedLog
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.sharing.lifecycle.agent_notes import NotesReader
from flexkv_sglang.sharing.lifecycle.fitness import Fitness, Unfit, name_of
from flexkv_sglang.sharing.lifecycle.handover import NEXT
from flexkv_sglang.sharing.lifecycle.old_agent import OldAgent
from flexkv_sglang.sharing.run_dir import RunDir, needing
from flexkv_sglang.threads import PeriodicThread

logger = logging.getLogger(__name__)

_CHECK_S = 5.0
_IDLE_S = 1.0
_SOON_S = 1.0
_PAUSE_S, _PAUSE_MAX_S = 2.0, 60.0
_JOIN_S = 2.0
_SHELL_S = 10.0

FLEXKV = (sys.executable, "-P", "-m", "flexkv_sglang.cli")
"""The command ``flexkv``."""

_REMEDIES = {
    "settings": "Give all servers of a node the same settings, or their own share.run_dir",
    "secret": "They read share.secret_file again within 5 s; restart those that name another file",
    "address": "Restart the servers that use it",
}
_RESTART = "Restart them with the same release"


class AgentLauncher:
    """Holds this process's rank lock. ``idle`` is called every second, on the thread.

    ``new_secret`` gets the keys when the content of the secret file has changed. ``usable``: may this process use the
    agent and what it has written? Raises ``OSError``, ``ConfigError``.
    """

    def __init__(
        self,
        config: FlexKVConfig,
        run_dir: RunDir,
        idle: Callable[[], None] = lambda: None,
        *,
        check_s: float = _CHECK_S,
        flexkv: Sequence[str] = FLEXKV,
        metrics: Metrics | None = None,
        new_secret: Callable[[Secret | None], None] = lambda _secret: None,
    ) -> None:
        self._flexkv = flexkv
        self._idle = idle
        self._metrics = metrics or Metrics()
        self._new_secret = new_secret
        self._config = config
        self._run_dir = run_dir
        self._check_s = check_s
        self._fitness = Fitness(config.share)
        self._notes = NotesReader(run_dir)
        self._old = OldAgent(lambda pid: (run_dir.agent() or {}).get("pid") == pid)
        self._log = RateLimitedLog(logger)
        self._silent_before = ""  # name of the agent that was silent at the last look
        self._gauged = ""
        self._lock = run_dir.take_rank_lock()
        self._fields: Mapping[str, object] = {}
        self._verdict: dict[str, str] = {}
        self._reported = ""
        self._check_at = 0.0
        self._backoff = Backoff(_PAUSE_S, _PAUSE_MAX_S)
        self.usable = True
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
        self._fields = fields
        text = json.dumps({**fields, **self._verdict}, sort_keys=True)
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
            self._check_at = time.monotonic() + self._check_s
            self._check_at = time.monotonic() + self._look()
        self._thread.pause(_IDLE_S)
        if not self._thread.stopped:
            self._idle()
        return 0.0

    def _look(self) -> float:
        """Look after the agent; failures are logged. Returns the seconds until the next look."""
        try:
            self._recreate_run_dir()
            self._notes.copy()
            if self._fitness.secret.changed():
                logger.info("flexkv: share.secret_file holds %s now", self._fitness.secret.kid)
                self._new_secret(self._fitness.secret.current)
            card = self._run_dir.agent()
            if card is not None:
                return self._judge(card)
            self._say(None, "")
            if self._run_dir.agent(NEXT) is not None:
                return self._check_s  # it takes its place at this moment
            launch_agent(self._config, self._run_dir, self._flexkv)
        except (OSError, subprocess.SubprocessError) as exc:
            logger.warning("flexkv: the agent cannot be started: %s", exc)
        return self._pause()

    def _pause(self) -> float:
        return max(self._backoff.failed(), self._check_s) * random.uniform(0.8, 1.2)

    def _judge(self, card: Mapping[str, Any]) -> float:
        """Use the agent, or have it replaced. Returns the seconds until the next look. Raises ``OSError``."""
        unfit = self._fitness.unfit(card, self._run_dir.beat_age_s())
        self.usable = unfit is None or unfit.usable
        self._say(unfit, name_of(card) if card else "")
        if unfit is None:
            self._backoff.reset()
            return self._check_s
        if unfit.reason == "silent" and self._silent_before != name_of(card):
            self._silent_before = name_of(card)  # the whole machine may have stood still
            return self._check_s
        own = self._lock.path.stem
        reports = {rank: each for rank, each in self._run_dir.reports().items() if rank != own}
        needed_by = needing(name_of(card), reports)
        if needed_by or card.get("by_hand"):
            decided = all(reports[rank] for rank in needed_by)
            if decided:
                self._complain(card, unfit, needed_by)
            return self._check_s if decided else min(_SOON_S, self._check_s)
        return self._replace(card, unfit)

    def _complain(self, card: Mapping[str, Any], unfit: Unfit, needed_by: Sequence[str]) -> None:
        if needed_by:
            why = (
                f"server processes {', '.join(each.partition('-')[0] for each in needed_by)} use it"
            )
            remedy = _REMEDIES.get(unfit.reason, _RESTART)
        else:
            why = "it was started by hand"
            remedy = "Restart it: systemctl restart, or the command flexkv agent"
        self._log.log(
            unfit.reason,
            logging.ERROR,
            "flexkv: the agent of %s (pid %s) %s and is not replaced: %s. %s. %s",
            self._run_dir.path,
            card.get("pid"),
            unfit.text,
            why,
            "This process uses it meanwhile"
            if unfit.usable
            else "This process does not share with other nodes",
            remedy,
        )

    def _replace(self, card: Mapping[str, Any], unfit: Unfit) -> float:
        """Start a successor of an agent that nobody else needs; end one that knows none, or does nothing any more."""
        if self._run_dir.agent(NEXT) is not None:
            return self._check_s
        text = "flexkv: the agent of %s (pid %s) %s, and nobody else uses it: it is replaced"
        self._log.log(
            name_of(card), logging.WARNING, text, self._run_dir.path, card.get("pid"), unfit.text
        )
        if "instance" in card and unfit.reason != "silent":
            launch_agent(self._config, self._run_dir, self._flexkv, succeed=name_of(card))
            return self._pause()
        refused = self._old.end(int(card.get("pid", 0)))
        if refused:
            text = "flexkv: the agent of %s %s and is not replaced: %s. End it by hand"
            self._log.log("old", logging.ERROR, text, self._run_dir.path, unfit.text, refused)
        return self._check_s

    def _say(self, unfit: Unfit | None, name: str) -> None:
        """Tell the agent, the other rank processes and the metrics what this one thinks. Raises ``OSError``."""
        self._verdict = {"unfit": unfit.text} if unfit else {"fits": name} if name else {}
        self.report({**self._fields, "usable": self.usable})
        self._metrics.gauge("agent_up", float(bool(name)))
        if self._gauged and (unfit is None or unfit.reason != self._gauged):
            self._metrics.gauge("agent_unfit", 0.0, self._gauged)
        self._gauged = unfit.reason if unfit else ""
        if unfit:
            self._metrics.gauge("agent_unfit", 1.0, unfit.reason)
        counts = self._run_dir.status().get("sharing", {})
        self._metrics.gauge("agent_exceptions", float(counts.get("agent_exceptions", 0)))

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


def launch_agent(
    config: FlexKVConfig, run_dir: RunDir, flexkv: Sequence[str] = FLEXKV, *, succeed: str = ""
) -> None:
    """Start an agent as a child of init, in our working directory: paths may be relative to it.

    ``succeed``: name of the living agent, which hands over to the new one.
    Raises ``OSError``, ``subprocess.SubprocessError``.
    """
    run_dir.write_config(config)
    command = [*flexkv, "agent", "--config", str(run_dir.config_path)]
    command += ["--run-dir", str(run_dir.path), "--for-ranks"]
    if succeed:
        command += ["--succeed", succeed]
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
