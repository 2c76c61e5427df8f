"""Does our plug-in fit the SGLang of this environment? A program of its own: prints one JSON object.

``python -m flexkv_sglang.cli.doctor.plugin_check`` is run by ``flexkv doctor`` in a child:
it imports SGLang (seconds, torch, log lines), and that import may fail in any way. SGLang applies its
white list itself, as it would in a server started from the same shell.
"""

from __future__ import annotations

import importlib
import json
import sys
from importlib.metadata import entry_points
from typing import Any

GROUP, NAME = "sglang.srt.plugins", "flexkv"


def look() -> dict[str, Any]:
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
    except Exception as exc:  # noqa: BLE001 - whatever stops the plug-in here stops it in a server
        answer["error"] = f"{type(exc).__name__}: {exc}"
    return answer


def main() -> None:
    """Print the answer as the last line; what SGLang prints goes to stderr."""
    out, sys.stdout = sys.stdout, sys.stderr
    answer = look()
    sys.stdout = out
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
