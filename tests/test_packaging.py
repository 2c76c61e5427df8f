"""What an installation adds to a machine: one top-level name and an entry point, nothing else."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import zipfile

import pytest

import flexkv_sglang

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOREIGN = "def marker():\n    return 'foreign'\n"


def test_no_top_level_triton_kernels_or_backends_of_ours() -> None:
    find = (
        "import importlib.util as u, json, sys; s = u.find_spec(sys.argv[1]);"
        "print(json.dumps([] if s is None else [*(s.submodule_search_locations or []), s.origin or '']))"
    )
    for name in ("triton_kernels", "backends"):
        # -P: the working directory is not on the path, as for an installed command.
        command = [sys.executable, "-P", "-c", find, name]
        places = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        ours = [p for p in places if p and pathlib.Path(p).resolve().is_relative_to(ROOT)]
        # A virtual environment inside the checkout is not "ours".
        assert not [p for p in ours if ".venv" not in pathlib.Path(p).parts], places


def test_root_folders_are_linked_into_the_package() -> None:
    for name in ("backends", "triton_kernels"):
        link = ROOT / "flexkv_sglang" / name
        assert link.is_symlink()
        assert link.readlink() == pathlib.Path("..") / name


def test_triton_kernels_has_no_init() -> None:
    assert not (ROOT / "triton_kernels" / "__init__.py").exists()


def test_public_names_are_the_promised_ones() -> None:
    assert flexkv_sglang.__all__ == ["FlexKVConfig", "FlexKVStorage", "__version__"]
    assert flexkv_sglang.FlexKVConfig.__name__ == "FlexKVConfig"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source") / "tree"
    names = [
        "flexkv_sglang",
        "backends",
        "triton_kernels",
        "setup.cfg",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    ]
    source.mkdir()
    subprocess.run(["cp", "-a", *[str(ROOT / name) for name in names], str(source)], check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), str(source)],
        check=True,
        timeout=300,
    )
    return next(out.glob("*.whl"))


def test_the_wheel_holds_one_top_level_name_and_no_test_bed(wheel: pathlib.Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"flexkv_sglang"}
    assert "flexkv_sglang/backends/io/ring.py" in names
    kernels = {name for name in names if name.startswith("flexkv_sglang/triton_kernels/")}
    sources = {path.name for path in (ROOT / "triton_kernels").glob("*.py")}
    assert "launch.py" in sources
    assert kernels == {f"flexkv_sglang/triton_kernels/{name}" for name in sources}
    assert "__init__.py" not in sources
    assert "flexkv_sglang/py.typed" in names
    shipped = "flexkv_sglang/testing/"  # the conformance suite, for extenders
    rest = [name for name in names if not name.startswith(shipped)]
    assert len(rest) < len(names)
    assert not [name for name in rest if "test" in name or "bed" in name]


@pytest.mark.slow
def test_a_fresh_environment_gets_nothing_but_flexkv_sglang(
    wheel: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=120)
    listing = (
        "import os,sysconfig; print('\\n'.join(sorted(os.listdir(sysconfig.get_path('purelib')))))"
    )

    def installed() -> set[str]:
        out = subprocess.run(
            [str(python), "-c", listing], check=True, capture_output=True, text=True
        )
        return set(out.stdout.split())

    before = installed()
    subprocess.run(
        [str(python), "-m", "pip", "install", "-q", "--no-deps", str(wheel)],
        check=True,
        timeout=300,
    )
    added = {name for name in installed() - before if not name.endswith(".dist-info")}
    assert added == {"flexkv_sglang"}
    site = (
        python.parents[1]
        / "lib"
        / f"python{sys.version_info[0]}.{sys.version_info[1]}"
        / "site-packages"
    )
    check = (
        "import importlib.util as u, importlib.metadata as m\n"
        "assert u.find_spec('backends') is None\n"
        "assert (u.find_spec('triton_kernels') is None) is {absent}\n"
        "eps = [e for e in m.entry_points(group='sglang.srt.plugins') if e.name == 'flexkv']\n"
        "assert [e.value for e in eps] == ['flexkv_sglang.integration.plugin:register']\n"
        "import flexkv_sglang.integration.plugin\n"
    )
    subprocess.run([str(python), "-c", check.format(absent=True)], check=True, cwd=tmp_path)
    command = [str(python.with_name("flexkv")), "--help"]  # help needs no numpy
    assert "check" in subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (site / "triton_kernels").mkdir()
    (site / "triton_kernels" / "__init__.py").write_text(FOREIGN)
    (site / "triton_kernels" / "matmul.py").write_text("class PrecisionConfig: pass\n")
    foreign = (
        check.format(absent=False)
        + "import triton_kernels; assert triton_kernels.marker() == 'foreign'\n"
        + "from triton_kernels.matmul import PrecisionConfig\n"  # what SGLang imports of it
        + "import flexkv_sglang.triton_kernels.layout as ours\n"
        + "assert ours.BlockLayout((ours.Part(1, 16),)).block_bytes == 16\n"
        + "assert not hasattr(triton_kernels, 'layout')\n"
    )
    for cwd in (tmp_path, ROOT):  # also with our checkout as the working directory
        wanted = (
            foreign
            if cwd == tmp_path
            else foreign.replace("assert u.find_spec('backends') is None\n", "")
        )
        subprocess.run([str(python), "-c", wanted], check=True, cwd=cwd)
