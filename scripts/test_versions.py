"""Runs ``tests/contract`` with the wheel of an SGLang release first on the path and the rest of ``.venv``.

Of the packages that a release pins, only transformers (and the tokenizers that it accepts) matters for an import of
SGLang: the pinned ones are laid beside the wheel. A wheel that pip cannot fetch is a failure, never a skip.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".versions"
SUPPORTED = ("0.5.11", "0.5.14", "0.5.17", "0.5.19", "0.5.20", "0.5.21", "0.5.22", "0.5.23")
OLD_TOKENIZERS = "0.22.2"
"""For releases that pin none: a version that the transformers of that time accept."""

_SUITE = (
    "pytest",
    str(ROOT / "tests" / "contract"),
    "-q",
    "-p",
    "no:cacheprovider",
    "-W",
    "ignore",
)
_DEMO = ("flexkv_bed.demo",)
_TIMEOUT_S = 540
_PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
_SUMMARY = re.compile(r"\b(\d+) (passed|failed|error|errors|skipped)\b")


class NoWheelError(Exception):
    """pip cannot fetch a package."""


def pip(*words: str, what: str) -> None:
    """Run pip; raises ``NoWheelError`` with the end of its output."""
    done = subprocess.run([*_PIP, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoWheelError(f"{what} cannot be had: {done.stderr.strip()[-600:]}")


def unpacked(version: str) -> Path:
    """The folder with the files of this release, fetched if it is absent."""
    target = CACHE / f"sglang-{version}"
    if target.is_dir():
        return target
    wheels = CACHE / "wheels"
    what = f"sglang=={version}"
    pip("download", "--no-deps", "--only-binary=:all:", "--dest", str(wheels), what, what=what)
    (wheel,) = wheels.glob(f"sglang-{version}-*.whl")
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        Path(folder).rename(target)
        Path(folder).mkdir()  # for the context manager to remove
    wheel.unlink()
    return target


def companions(release: Path) -> Path | None:
    """The transformers that this release pins, with tokenizers; None if ``.venv`` has the same."""
    metadata = next(release.glob("sglang-*.dist-info/METADATA")).read_text()
    pins = dict(
        re.findall(r"^Requires-Dist: (transformers|tokenizers)==([\w.]+)$", metadata, re.MULTILINE)
    )
    wanted = pins["transformers"]
    installed = ROOT.glob(f".venv/lib/python*/site-packages/transformers-{wanted}.dist-info")
    if any(installed):
        return None
    target = CACHE / f"transformers-{wanted}"
    if not target.is_dir():
        packages = [
            f"transformers=={wanted}",
            f"tokenizers=={pins.get('tokenizers', OLD_TOKENIZERS)}",
        ]
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            whole = Path(folder) / "packages"
            pip("install", "--no-deps", "--target", str(whole), *packages, what=packages[0])
            whole.rename(target)
    return target


def search_path(version: str) -> str:
    """PYTHONPATH for this release."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs at once: the second finds everything
        release = unpacked(version)
        return os.pathsep.join(str(part) for part in (release, companions(release)) if part)


def run(version: str, *, servers: bool) -> dict[str, object]:
    """The contract suite, or the demo's servers, on one release. Returns the outcome."""
    started = time.monotonic()
    try:
        path = search_path(version)
    except NoWheelError as exc:
        print(f"sglang {version}: {exc}", flush=True)
        return {"ok": False, "why": "no wheel"}
    settings = {"PYTHONPATH": path, "SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}
    # SGLang compiles its page hash at the first use; releases disturb each other in one folder
    settings["TORCH_EXTENSIONS_DIR"] = str(CACHE / f"extensions-{version}")
    command = [sys.executable, "-P", "-m", *(_DEMO if servers else _SUITE)]
    if servers:
        settings["TRITON_INTERPRET"] = "1"  # releases before 0.5.22 want a driver otherwise
    else:
        command += ["--sglang-version", version]
        settings |= {"SGLANG_PLUGINS": "flexkv", "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | settings,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        print(f"sglang {version}: did not end in {_TIMEOUT_S} s", flush=True)
        return {"ok": False, "why": "timeout"}
    if done.returncode:
        print(done.stdout[-12000:] + done.stderr[-3000:], flush=True)
    found = _demo(done.stdout) if servers else _counts(done.stdout)
    ok = done.returncode == 0 and bool(found.get("storage_tokens" if servers else "passed"))
    seconds = round(time.monotonic() - started, 1)
    print(f"sglang {version}: {'ok' if ok else 'FAILED'} {found} in {seconds} s", flush=True)
    return {"ok": ok, **found, "seconds": seconds}


def _counts(output: str) -> dict[str, int]:
    return {name: int(number) for number, name in _SUMMARY.findall(output[-300:])}


def _demo(output: str) -> dict[str, int]:
    lines = output.splitlines()
    said = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    return {"storage_tokens": said.get("restart_storage_tokens", 0)}


def main() -> int:
    """0 if every release passed. The last line is JSON."""
    parser = argparse.ArgumentParser(description="Contract tests against SGLang's wheels.")
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"default: {SUPPORTED}")
    parser.add_argument(
        "--servers", action="store_true", help="run scripts/demo with them instead of the suite"
    )
    args = parser.parse_args()
    versions = args.versions or SUPPORTED
    results = {version: run(version, servers=args.servers) for version in versions}
    ok = all(result["ok"] for result in results.values())
    print(json.dumps({"ok": ok, "versions": results}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
