"""The real ``flexkv`` command in a subprocess, and engines that die without closing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flexkv_sglang

_PATHS = (Path(flexkv_sglang.__file__).parent.parent, Path(__file__).resolve().parents[1])
_DIE = """
import os, sys
from pathlib import Path
from stores.engines import keys, open_engine, page_memory, soon
directory, namespace, page, count, seed, verify = sys.argv[1:]
engine = open_engine(Path(directory), int(page), 64 * int(page), namespace=namespace, verify=verify)
_, buffers = page_memory(int(count), int(page), seed=int(seed))
assert all(engine.put(keys(int(count), int(seed)), buffers, None, soon()))
os._exit(0)
"""


@dataclass(frozen=True, slots=True)
class Output:
    """Output of a command."""

    code: int
    text: str
    errors: str

    @property
    def json(self) -> Any:
        """The object on the last line."""
        return json.loads(self.text.splitlines()[-1])


def _python(*arguments: str, timeout_s: float = 60.0) -> Output:
    paths = os.pathsep.join([*map(str, _PATHS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-P", *arguments],
        env={**os.environ, "PYTHONPATH": paths},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    return Output(done.returncode, done.stdout, done.stderr)


def flexkv(*arguments: object) -> Output:
    """Run ``flexkv``; it must never end with a traceback."""
    output = _python("-m", "flexkv_sglang.cli", *map(str, arguments))
    assert "Traceback" not in output.errors, output.errors
    return output


def die_after_put(
    directory: Path,
    page: int,
    count: int,
    *,
    seed: int = 0,
    verify: str = "full",
    namespace: str = "ns",
) -> None:
    """A process opens an engine on ``directory``, stores pages and ends without closing anything."""
    output = _python(
        "-c", _DIE, str(directory), namespace, str(page), str(count), str(seed), verify
    )
    assert output.code == 0, output.errors
