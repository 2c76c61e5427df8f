"""Checks whether our plug-in fits the SGLang of this environment. A program: it prints one JSON object.

``flexkv doctor`` runs it in a child process, because it imports SGLang (seconds, torch, log lines) and that import may
fail in any way. SGLang applies its white list itself, as in a server started from the same shell.
"""

from __future__ import annotations

import importlib
import json
import sys
from importlib.metadata import entry_points
from typing import Any

GROUP, NAME = "sglang.srt.plugins", "flexkv"


def check_plugin() -> dict[str, Any]:
    """``sglang``: its version or None; ``entry_point``: it is installed; ``error``: why it does not load;
    ``allowed``: SGLang's white list, "" if there is none; ``listed``: SGLang would load it; ``misfit``: see plugin."""
    answer: dict[str, Any] = {"sglang": None}
    try:
        answer["sglang"] = importlib.import_module("sglang").__version__
    except ImportError:
        return answer
    points = list(entry_points(group=GROUP, name=NAME))
    answer["entry_point"] = bool(points)
    try:
        for point in points:
            point.load()
        environ = importlib.import_module("sglang.srt.environ")
        answer["allowed"] = environ.envs.SGLANG_PLUGINS.get()
        loaded = importlib.import_module("sglang.srt.plugins").load_plugins_by_group(GROUP)
        answer["listed"] = NAME in loaded
        answer["misfit"] = importlib.import_module("flexkv_sglang.integration.plugin").misfit()
    except Exception as exc:  # noqa: BLE001 - every error here also stops the plug-in in a server
        answer["error"] = f"{type(exc).__name__}: {exc}"
    return answer


def main() -> None:
    """Print the answer as the last line; SGLang's own output goes to stderr."""
    out, sys.stdout = sys.stdout, sys.stderr
    answer = check_plugin()
    sys.stdout = out
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
