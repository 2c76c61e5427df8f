"""Let ``pytest`` run in a checkout that is not installed, without putting the repository root on sys.path.

The root holds a folder ``triton_kernels``; on the path it would answer for the Triton project's package.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, settings

ROOT = pathlib.Path(__file__).resolve().parents[1]

if importlib.util.find_spec("flexkv_sglang") is None:
    _dir = ROOT / "flexkv_sglang"
    _spec = importlib.util.spec_from_file_location(
        "flexkv_sglang", _dir / "__init__.py", submodule_search_locations=[str(_dir)]
    )
    assert _spec is not None
    assert _spec.loader is not None
    _module = importlib.util.module_from_spec(_spec)
    sys.modules["flexkv_sglang"] = _module
    _spec.loader.exec_module(_module)

sys.path.insert(0, str(ROOT / "tests" / "support"))  # helpers, imported by plain name
sys.path.insert(0, str(ROOT / "benchmarks"))

_slow_is_fine = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "dev", max_examples=30, deadline=None, suppress_health_check=_slow_is_fine
)
settings.register_profile(
    "ci", max_examples=100, deadline=None, suppress_health_check=_slow_is_fine
)
settings.register_profile(
    "nightly", max_examples=5000, deadline=None, suppress_health_check=_slow_is_fine
)
settings.register_profile(  # scripts/mutants: a failure is all that is wanted, not the smallest one
    "mutants",
    max_examples=100,
    deadline=None,
    suppress_health_check=_slow_is_fine,
    phases=[Phase.generate],
    database=None,
)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev")
)


LONGEST = (
    "test_weight_agreement.py",
    "test_versions.py",
    "test_campaign.py",
    "test_doctor_setup.py",
)
"""Files of which each takes most of a minute: with two at a time (``scripts/test``) they must not come last."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--e2e-variant",
        default="plain",
        choices=["plain", "memory", "threads"],
        help="servers with one disk, with a memory tier above it, or without io_uring",
    )
    parser.addoption(
        "--kernels-on",
        default="reference",
        choices=["reference", "interpreter", "cuda"],
        help="what serves tests/kernels: torch, Triton's interpreter (TRITON_INTERPRET=1), or a GPU",
    )
    parser.addoption(
        "--sglang-version",
        help="the release whose files must be first on the path (tests/contract)",
    )


@pytest.fixture
def shm_path() -> Iterator[pathlib.Path]:
    """An empty directory in memory (tmpfs)."""
    place = pathlib.Path(tempfile.mkdtemp(prefix="flexkv-test-", dir="/dev/shm"))
    yield place
    shutil.rmtree(place)
