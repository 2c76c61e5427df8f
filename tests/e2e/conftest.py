"""Real SGLang servers. One pair of replicas on one directory serves every test that leaves it as it was."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexkv_bed import server
from flexkv_bed.server import Replica, Settings
from flexkv_bed.tiny_model import make_tiny_model

ADMIN = ("--admin-api-key", "bed")


@pytest.fixture(scope="session", autouse=True)
def _variant(request: pytest.FixtureRequest) -> Iterator[None]:
    server.variant = request.config.getoption("--e2e-variant")
    yield
    for left in Path("/dev/shm").glob("flexkv-bed-*"):
        shutil.rmtree(left)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory, model: Path
) -> Iterator[tuple[Replica, Replica]]:
    """Two replicas that share a directory: one started as a module, one by ``sglang serve`` with metrics."""
    work = tmp_path_factory.mktemp("pair")
    settings = [
        Settings(
            model=model,
            storage=work / "pages",
            log=work / f"{name}.log",
            through_serve=name == "b",
            arguments=(*ADMIN, "--enable-metrics") if name == "b" else ADMIN,
        )
        for name in "ab"
    ]
    with Replica(settings[0]) as a, Replica(settings[1]) as b:
        a.wait_ready()
        b.wait_ready()
        yield a, b
