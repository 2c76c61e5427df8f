"""``flexkv agent`` with the short times of a test. Run as a program: TIMES, then the arguments of ``flexkv``.

TIMES: JSON object of fields of ``ShareConfig`` that are no settings.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from flexkv_sglang.cli.agent import run_agent


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("times", type=json.loads)
    parser.add_argument("command", choices=["agent"])
    parser.add_argument("--config", type=Path)
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--for-ranks", action="store_true")
    parser.add_argument("--succeed", default="")
    given = parser.parse_args()
    return run_agent(
        given.config,
        given.run_dir,
        for_ranks=given.for_ranks,
        succeed=given.succeed,
        times=given.times,
    )


if __name__ == "__main__":
    sys.exit(main())
