"""The run directory: where one node's agent and its rank processes meet. Files and locks, no threads.

    agent.lock          held by the agent; says which settings it runs with
    agent.json          the configuration to start it with
    agent.log           what it says, two files of 1 MiB
    status.json         what ``flexkv nodes`` shows, written every second
    places/<digest>     a list of directories that some rank process uses: the agent serves them all
    ranks/<name>.lock   held by a rank process as long as it lives
    peers.tbl, <namespace>/...   the sets of other nodes (``backends.fleet.replica.files``)

It lies on tmpfs: nothing in it is worth a disk write, and everything in it is made anew after a reboot.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexkv_sglang.backends.file_lock import FileLock
from flexkv_sglang.backends.safe_files import publish
from flexkv_sglang.config.settings import FlexKVConfig
from flexkv_sglang.config.share import ShareConfig
from flexkv_sglang.errors import ConfigError

_MEMORY = Path("/dev/shm")
_NODE_ID, _RUN = "node-id", ".run"
IN_DATA_DIRECTORY = frozenset({_NODE_ID, _RUN})
"""What is kept in a data directory beside namespaces: the node's mark, and run directories where /dev/shm is none."""

_LOCAL = ("listen", "advertise", "run_dir", "node_id")
"""Settings of ``share`` that differ between nodes and processes without harm."""


class RunDir:
    """Paths and locks of one run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, config: FlexKVConfig) -> RunDir:
        """The run directory of this configuration, made if needed. Raises ``ConfigError``."""
        try:
            mark = _node_mark(_home(config))
        except OSError as exc:
            raise ConfigError(
                f"path: cannot write {_NODE_ID} in {str(_home(config))!r}: {exc.strerror or exc}"
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
            found = cls(_place(config, read_mark(_home(config))))
            return found if found.path.is_dir() else None
        except OSError:
            return None

    @classmethod
    def all_of_user(cls) -> list[RunDir]:
        """Those of this user that are where they are by default and have had an agent."""
        return [cls(path.parent) for path in sorted(_of_user().glob("*/agent.lock"))]

    def make(self) -> None:
        """Make what is missing of it: somebody may have cleaned /dev/shm. Raises ``OSError``."""
        if self.path.parent == _of_user():  # in a directory that everybody may write
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
        """Have the agent serve this configuration's directories. Raises ``OSError``."""
        places = sorted(
            str(Path(path).expanduser().absolute()) for t in config.tiers for path in t.path
        )
        text = json.dumps({"paths": places, "io_engine": config.io_engine})
        name = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        _write(self.path / "places" / name, text)

    def places(self) -> dict[str, str]:
        """Directory -> ``io_engine``, of all rank processes that ever used this run directory."""
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
        _write(self.config_path, json.dumps(dict(config.given), sort_keys=True))

    def write_status(self, fields: Mapping[str, Any]) -> None:
        """For ``flexkv nodes``. Raises ``OSError``."""
        _write(self.status_path, json.dumps(fields, sort_keys=True))

    def take_agent_lock(self, digest: str) -> FileLock | None:
        """For the agent's life; None while another agent lives. Raises ``OSError``."""
        lock = FileLock.take(self.path / "agent.lock", os.O_CREAT, tries=5)
        if lock is not None:
            lock.write(json.dumps({"pid": os.getpid(), "settings": digest}))
        return lock

    def agent(self) -> dict[str, Any] | None:
        """What the living agent's lock says ({} if it has not said yet); None if there is no agent."""
        path = self.path / "agent.lock"
        if not FileLock.is_held(path):
            return None
        try:
            fields = json.loads(path.read_text())
        except (OSError, ValueError):
            return {}
        return fields if isinstance(fields, dict) else {}

    def take_rank_lock(self) -> FileLock:
        """For the life of a rank process. Raises ``OSError``."""
        return FileLock.make(self.path / "ranks" / f"{os.getpid()}-{secrets.token_hex(4)}.lock")

    def ranks(self) -> int:
        """Rank processes that live; locks of dead ones are removed."""
        count = 0
        for path in (self.path / "ranks").glob("*.lock"):
            if FileLock.is_held(path):
                count += 1
            else:
                path.unlink(missing_ok=True)
        return count

    def reports(self) -> dict[str, dict[str, Any]]:
        """What each living rank process says: ``usable``, are the agent's settings its own; ``breakers``, nodes that
        it does not ask for a while, and why; ``doubts``, namespace -> node -> how often it did not have what the
        replica says. {} of one that has said nothing yet."""
        found = {}
        for path in sorted((self.path / "ranks").glob("*.lock")):
            try:
                if FileLock.is_held(path):
                    fields = json.loads(path.read_text() or "{}")
                    found[path.stem] = fields if isinstance(fields, dict) else {}
            except (OSError, ValueError):
                continue  # it has ended, or is writing
        return found

    def breakers(self) -> dict[str, dict[str, str]]:
        """Rank process -> nodes that it does not ask for a while, and why."""
        return {name: dict(said.get("breakers", {})) for name, said in self.reports().items()}

    def status(self) -> dict[str, Any]:
        """What the agent last reported; {} if it has not."""
        try:
            fields = json.loads(self.status_path.read_text())
        except (OSError, ValueError):
            return {}
        return fields if isinstance(fields, dict) else {}


def settings_digest(share: ShareConfig) -> str:
    """Of what an agent and the rank processes beside it must have in common."""
    fields = {key: value for key, value in share.settings().items() if key not in _LOCAL}
    return hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=8).hexdigest()


def node_name(config: FlexKVConfig) -> str:
    """``share.nid``, else the host's name with a mark of this node's data directory. Raises ``OSError``."""
    if config.share.node_id is not None:
        return config.share.node_id
    host = "".join(c if c.isalnum() or c in "-." else "-" for c in socket.gethostname())[:48]
    return f"{host}-{_node_mark(_home(config))}"


def _make_private(path: Path) -> None:
    """A directory that only this user can change: another's would lead passwords and pages astray.

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


def _of_user() -> Path:
    return _MEMORY / f"flexkv-{os.getuid()}"


def _place(config: FlexKVConfig, mark: str) -> Path:
    share = config.share
    if share.run_dir is not None:
        return Path(share.run_dir).expanduser().resolve()
    if os.access(_MEMORY, os.W_OK):
        return _of_user() / f"{share.cluster_id}-{mark}"
    return _home(config) / _RUN / share.cluster_id


def _home(config: FlexKVConfig) -> Path:
    """The lowest tier's first directory: the one that lasts."""
    return Path(config.tiers[-1].path[0]).expanduser()


def _node_mark(home: Path) -> str:
    """8 hex digits that stay with a data directory."""
    path = home / _NODE_ID
    for _ in range(2):
        mark = read_mark(home)
        if mark:
            return mark
        home.mkdir(parents=True, exist_ok=True)
        temporary = home / f"{_NODE_ID}.{os.getpid()}-{secrets.token_hex(4)}"
        temporary.write_text(secrets.token_hex(4) + "\n")
        try:
            os.link(temporary, path)  # of several processes that start at once, one wins
        except FileExistsError:
            if not read_mark(home):  # cut off, or not ours
                temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)
    return read_mark(home)


def read_mark(home: Path) -> str:
    """The mark of a data directory; "" if it has none. Raises ``OSError`` unless it is only missing."""
    try:
        text = (home / _NODE_ID).read_bytes().strip().decode("ascii", "replace")
    except FileNotFoundError:
        return ""
    return text if len(text) == 8 and all(c in "0123456789abcdef" for c in text) else ""


def _write(path: Path, text: str) -> None:
    publish(path.parent, path.name, [text.encode()])
