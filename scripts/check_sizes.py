"""Functions of at most 70 lines, files of at most 600: beyond that a thing has two jobs. Ruff has no such rule."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

FUNCTION_LINES_MAX, FILE_LINES_MAX = 70, 600
FOLDERS = ("flexkv_sglang", "backends", "triton_kernels", "tests", "benchmarks", "scripts")


def problems(path: Path) -> list[str]:
    """What is too long in one file."""
    text = path.read_text()
    lines = text.count("\n")
    found = [f"{path}: {lines} lines, at most {FILE_LINES_MAX}"] if lines > FILE_LINES_MAX else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            length = node.end_lineno - node.lineno + 1
            if length > FUNCTION_LINES_MAX:
                found.append(
                    f"{path}:{node.lineno}: {node.name} has {length} lines, at most {FUNCTION_LINES_MAX}"
                )
    return found


def main() -> int:
    """Print every problem; 1 if there is any."""
    files = [path for folder in FOLDERS for path in sorted(Path(folder).rglob("*.py"))
             if not path.is_symlink() and "flexkv_sglang/backends" not in str(path)
             and "flexkv_sglang/triton_kernels" not in str(path)]  # fmt: skip
    found = [line for path in files for line in problems(path)]
    print("\n".join(found) or f"sizes: {len(files)} files are within bounds")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
