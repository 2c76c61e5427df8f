"""The run directory: where one node's agent and its rank processes meet. Files and locks, no threads.

    agent.lock          held by the agent; contains its card (``fitness``)
    agent.next          held by the agent that will succeed it; contains its card, and ``succeeds``
    agent.notes         the agent's last warnings, which rank processes copy into the server's log
    agent.failed        why the last agent that a rank process started has ended at once
    agent.json          the configuration to start it with
    agent.log           its log, two files of 1 MiB
    status.json         shown by ``flexkv nodes``, written every second
    places/<digest>     directories of one configuration; the agent serves those of all
    ranks/<name>.lock   held by a rank process as long as it lives
    peers.tbl, <namespace>/...   the sets of other nodes' pages (``backends.fleet.replica.files``)

It lies on tmpfs: nothing in it is worth a disk write, and all of it can be made again after a reboot.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexkv_sglang.backends.file_lock import FileLock
from flexkv_sglang.backends.fleet.replica.files import PeersTable
from flexkv_sglang.backends.safe_files import publish
from flexkv_sglang.config.settings import FlexKVConfig
from flexkv_sglang.errors import ConfigError
from flexkv_sglang.sharing.node_identity import NODE_ID, data_directory, node_mark, read_mark

_MEMORY = Path("/dev/shm")
_RUN = ".run"
IN_DATA_DIRECTORY = frozenset({NODE_ID, _RUN})
"""Entries of a data directory beside namespaces: the node's mark, and run directories where /dev/shm is missing."""


class RunDir:
    """Paths and locks of one run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, config: FlexKVConfig) -> RunDir:
        """The run directory of this configuration, made if needed. Raises ``ConfigError``."""
        try:
            mark = node_mark(config)
        except OSError as exc:
            raise ConfigError(
                f"path: cannot write {NODE_ID} in {str(data_directory(config))!r}: {exc.strerror or exc}"
            ) from exc
        path = _place(config, mark)
        try:
            found = cls(path)
            found.make()
        except OSError as exc:
            raise ConfigError(
                f"share.run_dir: cannot use {str(path)!r}: {exc.strerror or exc}. "
                "Valid: a directory of this user, best in memory (/dev/shm)"
            ) from exc
        return found

    @classmethod
    def find(cls, config: FlexKVConfig) -> RunDir | None:
        """As ``of``, but makes nothing; None if there is none."""
        try:
            found = cls(_place(config, read_mark(config)))
            return found if found.path.is_dir() else None
        except OSError:
            return None

    @classmethod
    def all_of_user(cls) -> list[RunDir]:
        """Run directories of this user at the default place that had an agent once."""
        return [cls(path.parent) for path in sorted(_of_user().glob("*/agent.lock"))]

    def make(self) -> None:
        """Make the missing parts; /dev/shm may have been cleaned. Raises ``OSError``."""
        if self.path.parent == _of_user():  # /dev/shm is writable to all users
            _make_private(self.path.parent)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for directory in (self.path, self.path / "places", self.path / "ranks"):
            _make_private(directory)

    @property
    def config_path(self) -> Path:
        """``agent.json``."""
        return self.path / "agent.json"

    @property
    def log_path(self) -> Path:
        """``agent.log``."""
        return self.path / "agent.log"

    @property
    def status_path(self) -> Path:
        """``status.json``."""
        return self.path / "status.json"

    def add_places(self, config: FlexKVConfig) -> None:
        """Make the agent serve this configuration's directories. Raises ``OSError``."""
        places = sorted(
            str(Path(path).expanduser().absolute()) for t in config.tiers for path in t.path
        )
        text = json.dumps({"paths": places, "io_engine": config.io_engine})
        name = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        publish(self.path / "places", name, [text.encode()])

    def places(self) -> dict[str, str]:
        """Directory -> ``io_engine``, of all configurations that ever used this run directory."""
        found: dict[str, str] = {}
        for path in sorted((self.path / "places").glob("[0-9a-f]" * 16)):
            try:
                fields = json.loads(path.read_text())
                found |= dict.fromkeys(fields["paths"], fields["io_engine"])
            except (OSError, ValueError, KeyError, TypeError):
                continue  # being written
        return found

    def write_config(self, config: FlexKVConfig) -> None:
        """Leave the configuration for an agent. Raises ``OSError``."""
        text = json.dumps(dict(config.given), sort_keys=True)
        publish(self.path, self.config_path.name, [text.encode()])

    def write_status(self, fields: Mapping[str, Any]) -> None:
        """For ``flexkv nodes``. Raises ``OSError``."""
        text = json.dumps(fields, sort_keys=True)
        publish(self.path, self.status_path.name, [text.encode()])

    def take_agent_lock(self, card: Mapping[str, Any], name: str = "agent.lock") -> FileLock | None:
        """Held for the agent's life; None while another agent lives. Raises ``OSError``.

        ``name``: "agent.next" for the agent that will succeed the living one.
        """
        lock = FileLock.take(self.path / name, os.O_CREAT, tries=5)
        if lock is not None:
            lock.write(json.dumps(card))
        return lock

    def agent(self, name: str = "agent.lock") -> dict[str, Any] | None:
        """Card of the living agent ({} if nothing is written yet); None if there is no agent."""
        path = self.path / name
        return _fields(path) if FileLock.is_held(path) else None

    def write_note(self, name: str, fields: Mapping[str, Any]) -> None:
        """Replace "agent.notes" or "agent.failed". Raises ``OSError``."""
        publish(self.path, name, [json.dumps(fields).encode()])

    def note(self, name: str) -> dict[str, Any]:
        """Content of "agent.notes" or "agent.failed"; {} if there is none."""
        return _fields(self.path / name)

    def beat_age_s(self) -> float:
        """Seconds since the agent's last sign of life; 0.0 without a readable table."""
        table = PeersTable.open(self.path)
        return 0.0 if table is None else max(0.0, time.monotonic() - table.heartbeat_ns / 1e9)

    def take_rank_lock(self) -> FileLock:
        """Held for the life of a rank process. Raises ``OSError``."""
        return FileLock.make(self.path / "ranks" / f"{os.getpid()}-{secrets.token_hex(4)}.lock")

    def ranks(self) -> int:
        """Number of living rank processes; locks of dead ones are removed."""
        count = 0
        for path in (self.path / "ranks").glob("*.lock"):
            if FileLock.is_held(path):
                count += 1
            else:
                path.unlink(missing_ok=True)
        return count

    def reports(self) -> dict[str, dict[str, Any]]:
        """Per living rank process its report; {} if it wrote none yet.

        ``usable``: it uses the agent. ``fits`` or ``unfit``: name of the agent that it wants to keep, or the reason why
        it wants none that it found. ``breakers``: node -> reason why it is not read for a while. ``doubts``: namespace
        -> node -> number of misses of pages that the node's set contains. ``namespaces``: those that it uses.
        """
        found = {}
        for path in sorted((self.path / "ranks").glob("*.lock")):
            try:
                if FileLock.is_held(path):
                    fields = json.loads(path.read_text() or "{}")
                    found[path.stem] = fields if isinstance(fields, dict) else {}
            except (OSError, ValueError):
                continue  # it has ended, or is being written
        return found

    def breakers(self) -> dict[str, dict[str, str]]:
        """Rank process -> node -> reason why it is not read for a while."""
        return {name: dict(report.get("breakers", {})) for name, report in self.reports().items()}

    def status(self) -> dict[str, Any]:
        """The agent's last report; {} if there is none."""
        return _fields(self.status_path)


def needing(name: str, reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Rank processes, of ``RunDir.reports``, that keep the agent of this name alive.

    One that has not decided yet does so, and one of version 0.1, which does not say whom it uses.
    """
    return [
        rank
        for rank, report in reports.items()
        if "unfit" not in report
        and report.get("fits", name) == name
        and ("fits" in report or report.get("usable", True))
    ]


def _make_private(path: Path) -> None:
    """Make a directory that only this user can change; that of another user could take passwords and pages.

    Raises ``OSError``.
    """
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(0, f"{path} is a link, or no directory")
    if found.st_uid != os.getuid():
        raise PermissionError(0, f"{path} belongs to another user")
    if found.st_mode & 0o022:
        path.chmod(0o700)


def _fields(path: Path) -> dict[str, Any]:
    """A JSON object; {} if the file is missing, being written, or no object."""
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _of_user() -> Path:
    return _MEMORY / f"flexkv-{os.getuid()}"


def _place(config: FlexKVConfig, mark: str) -> Path:
    share = config.share
    if share.run_dir is not None:
        return Path(share.run_dir).expanduser().resolve()
    if os.access(_MEMORY, os.W_OK):
        return _of_user() / f"{share.cluster_id}-{mark}"
    return data_directory(config) / _RUN / share.cluster_id
