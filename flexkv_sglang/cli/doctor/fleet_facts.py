"""Facts about sharing between machines: one ``Fleet`` per run directory. Reads, never judges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexkv_sglang.cli.directory.trusted_files import refuse_irregular
from flexkv_sglang.config.settings import FlexKVConfig
from flexkv_sglang.sharing.lifecycle.fitness import settings_digest
from flexkv_sglang.sharing.run_dir import RunDir

_LOG_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Fleet:
    """``agent``: fields in the living agent's lock, None if none lives. ``status``: fields of ``status.json``.

    ``age_s``: age of the status. ``ranks``: living rank processes and their reports. ``differs``: a server was named
    and its settings are not the agent's. ``said``: the last line of the agent's log.
    """

    run_dir: str
    agent: Mapping[str, Any] | None = None
    status: Mapping[str, Any] = field(default_factory=dict)
    age_s: float = 0.0
    ranks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    differs: bool = False
    said: str = ""

    @property
    def reports(self) -> bool:
        """True if an agent lives and its status is fresh."""
        return self.agent is not None and bool(self.status) and self.age_s < STALE_S

    def feeds(self, kind: str) -> list[Mapping[str, Any]]:
        """The feeds of one kind: "redis" or "peer"."""
        return [feed for feed in self.status.get("feeds", ()) if feed.get("kind") == kind]

    @property
    def peers_up(self) -> list[Mapping[str, Any]]:
        """Other nodes that are alive."""
        return [peer for peer in self.status.get("peers", ()) if peer.get("state") == "up"]


STALE_S = 5.0
"""An agent writes its status every second."""


def look_at_fleets(
    paths: Iterable[Path], config: FlexKVConfig | None, now: float
) -> tuple[Fleet, ...]:
    """Run directories whose agents serve one of ``paths``, or that of ``config``. Never raises."""
    if config is not None:
        run_dirs = [RunDir.find(config)] if config.share.wanted else []
    else:
        wanted = {str(path.expanduser().absolute()) for path in paths}
        wanted |= {str(Path(path).parent) for path in wanted}  # a namespace was named
        run_dirs = [run_dir for run_dir in RunDir.all_of_user() if wanted & run_dir.places().keys()]
    return tuple(_look_safely(run_dir, config, now) for run_dir in run_dirs)


def _look_safely(run_dir: RunDir | None, config: FlexKVConfig | None, now: float) -> Fleet:
    try:
        return _look(run_dir, config, now)
    except Exception as exc:  # noqa: BLE001 - one odd run directory must not hide the others
        where = "none yet" if run_dir is None else str(run_dir.path)
        return Fleet(where, said=f"cannot be looked at: {type(exc).__name__}: {exc}")


def _look(run_dir: RunDir | None, config: FlexKVConfig | None, now: float) -> Fleet:
    if run_dir is None:
        return Fleet("none yet")
    try:
        refuse_irregular(run_dir.path)
        agent, ranks = run_dir.agent(), run_dir.reports()
    except OSError as exc:
        return Fleet(str(run_dir.path), said=f"cannot be looked at: {exc.strerror or exc}")
    status = run_dir.status()
    own = settings_digest(config.share) if config is not None else None
    theirs = (agent or {}).get("settings")
    return Fleet(
        str(run_dir.path),
        agent,
        status,
        now - float(status.get("written_at", now)),
        ranks,
        differs=own is not None and theirs not in (None, own),
        said=_last_line(run_dir.log_path),
    )


def _last_line(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LOG_BYTES))
            lines = file.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if "flexkv" in line), "")
