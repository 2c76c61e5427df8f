"""Rules of the house that ruff has no rule for: sizes of functions, files and folders; each class name once.

A function has at most 70 lines, a file at most 600, a folder of the product at most 14 modules and 2,000 lines.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from pathlib import Path

FUNCTION_LINES_MAX, FILE_LINES_MAX, FOLDER_LINES_MAX, FOLDER_MODULES_MAX = 70, 600, 2000, 14
PRODUCT = ("flexkv_sglang", "backends", "triton_kernels")
FOLDERS = (*PRODUCT, "tests", "benchmarks", "scripts")


def long_functions_and_files(path: Path, tree: ast.Module) -> list[str]:
    """Functions and files beyond their limit."""
    lines = len(path.read_text().splitlines())
    found = [f"{path}: {lines} lines, at most {FILE_LINES_MAX}"] if lines > FILE_LINES_MAX else []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            length = node.end_lineno - node.lineno + 1
            if length > FUNCTION_LINES_MAX:
                found.append(
                    f"{path}:{node.lineno}: {node.name} has {length} lines, at most {FUNCTION_LINES_MAX}"
                )
    return found


def large_folders(paths: list[Path]) -> list[str]:
    """Folders of the product with too many modules or lines (sub-folders count for themselves)."""
    modules: dict[Path, list[Path]] = defaultdict(list)
    for path in paths:
        modules[path.parent].append(path)
    found = []
    for folder, files in modules.items():
        count = sum(path.name != "__init__.py" for path in files)
        lines = sum(len(path.read_text().splitlines()) for path in files)
        if count > FOLDER_MODULES_MAX:
            found.append(f"{folder}: {count} modules, at most {FOLDER_MODULES_MAX}")
        if lines > FOLDER_LINES_MAX:
            found.append(f"{folder}: {lines} lines, at most {FOLDER_LINES_MAX}")
    return found


def repeated_classes(trees: dict[Path, ast.Module]) -> list[str]:
    """Class names that the product defines more than once."""
    places: dict[str, list[str]] = defaultdict(list)
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{path}:{node.lineno}")
    return [
        f"class {name} is defined {len(where)} times: {', '.join(where)}"
        for name, where in places.items()
        if len(where) > 1
    ]


def main() -> int:
    """Print every problem; 1 if there is any."""
    files = [
        path
        for folder in FOLDERS
        for path in sorted(Path(folder).rglob("*.py"))
        if not any(part.is_symlink() for part in [path, *path.parents])
    ]
    trees = {path: ast.parse(path.read_text()) for path in files}
    product = [path for path in files if path.parts[0] in PRODUCT]
    found = [line for path, tree in trees.items() for line in long_functions_and_files(path, tree)]
    found += large_folders(product)
    found += repeated_classes({path: trees[path] for path in product})
    lines = sum(len(path.read_text().splitlines()) for path in product)
    print("\n".join(found) or f"house: {len(files)} files are within bounds")
    print(f"house: the product has {len(product)} modules and {lines} lines")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
