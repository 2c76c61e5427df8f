"""The node's name, which stays with its data directory: a mark of 8 hex digits in the file ``node-id``."""

from __future__ import annotations

import secrets
import socket
from pathlib import Path

from flexkv_sglang.backends.safe_files import publish
from flexkv_sglang.config.settings import FlexKVConfig

NODE_ID = "node-id"
"""File in the data directory."""


def node_name(config: FlexKVConfig) -> str:
    """``share.nid``, else the host's name with the mark of its data directory. Raises ``OSError``."""
    if config.share.node_id is not None:
        return config.share.node_id
    host = "".join(c if c.isalnum() or c in "-." else "-" for c in socket.gethostname())[:48]
    return f"{host}-{node_mark(config)}"


def data_directory(config: FlexKVConfig) -> Path:
    """First directory of the lowest tier: the one that lasts."""
    return Path(config.tiers[-1].path[0]).expanduser()


def node_mark(config: FlexKVConfig) -> str:
    """The mark; made if there is none. Raises ``OSError``."""
    home = data_directory(config)
    for _ in range(2):
        mark = read_mark(config)
        if mark:
            return mark
        home.mkdir(parents=True, exist_ok=True)
        text = [f"{secrets.token_hex(4)}\n".encode()]
        try:  # of several processes that start at once, one wins
            publish(home.resolve(), NODE_ID, text, mode=0o666, replace=False)
        except FileExistsError:
            if not read_mark(config):  # cut off, or of another program
                publish(home.resolve(), NODE_ID, text, mode=0o666)
    return read_mark(config)


def read_mark(config: FlexKVConfig) -> str:
    """The mark; "" if there is none, or none that is valid. Raises ``OSError``."""
    try:
        raw = (data_directory(config) / NODE_ID).read_bytes()
    except FileNotFoundError:
        return ""
    text = raw.strip().decode("ascii", "replace")
    return text if len(text) == 8 and all(c in "0123456789abcdef" for c in text) else ""
