"""The hooks, on SGLang's real argument parser and plug-in framework; and releases that they do not fit."""

from __future__ import annotations

import argparse
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from flexkv_sglang.errors import ConfigError
from flexkv_sglang.integration import plugin


class Controller:
    """Attaches as SGLang's controller does, and notes the arguments."""

    storage_backend_type: str | None = None

    def attach_storage_backend(
        self,
        storage_backend: str,
        prefetch_threshold: int = 256,
        model_name: str | None = None,
        storage_backend_extra_config: dict[str, Any] | None = None,
    ) -> str:
        self.storage_backend_type = storage_backend
        self.extra = storage_backend_extra_config
        return f"{storage_backend} {prefetch_threshold} {model_name}"


def fits(monkeypatch: pytest.MonkeyPatch, reason: str | None = None) -> None:
    monkeypatch.setattr(plugin, "misfit", lambda: reason)


@pytest.mark.parametrize("positional", [True, False])
def test_attaching_flexkv_is_attaching_dynamic_with_the_zero_copy_interface(
    monkeypatch: pytest.MonkeyPatch, positional: bool
) -> None:
    fits(monkeypatch)
    controller, mine = Controller(), {"path": "/somewhere"}
    original = Controller.attach_storage_backend
    if positional:
        answer = plugin.attach(original, controller, "flexkv", 16, "model", mine)
    else:
        answer = plugin.attach(
            original,
            controller,
            storage_backend="flexkv",
            prefetch_threshold=16,
            model_name="model",
            storage_backend_extra_config=mine,
        )
    assert answer == "dynamic 16 model"
    assert controller.extra == {
        "path": "/somewhere",
        "backend_name": "flexkv",
        "module_path": "flexkv_sglang",
        "class_name": "FlexKVStorage",
        "interface_v1": 1,
    }
    assert controller.storage_backend_type == "flexkv"  # a second attach over HTTP compares with it
    assert mine == {"path": "/somewhere"}


def test_other_backends_pass_through_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    fits(monkeypatch, "would refuse")
    controller = Controller()
    assert (
        plugin.attach(Controller.attach_storage_backend, controller, "file", model_name="m")
        == "file 256 m"
    )
    assert controller.extra is None


def test_a_misfit_is_one_clear_error_never_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    fits(monkeypatch, "SGLang has no such method")
    expected = r"hicache_storage_backend: 'flexkv' does not fit SGLang .*no such method.*dynamic"
    with pytest.raises(ConfigError, match=expected):
        plugin.attach(Controller.attach_storage_backend, Controller(), "flexkv")
    asked, other = argparse.Namespace(hicache_storage_backend="flexkv"), argparse.Namespace()
    with pytest.raises(ConfigError, match=expected):
        plugin.refuse_early(asked)
    plugin.refuse_early(other)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"sise": 1}', r"sise: unknown key, value 1. Did you mean 'size'"),
        ("{size", r"extra_config: '{size' is not JSON"),
        ("[1]", r"Valid: a JSON object"),
    ],
)
def test_a_wrong_setting_is_refused_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, message: str
) -> None:
    fits(monkeypatch)
    (tmp_path / "settings.json").write_text(text)
    for given in (text, f"@{tmp_path / 'settings.json'}"):
        args = argparse.Namespace(
            hicache_storage_backend="flexkv", hicache_storage_backend_extra_config=given
        )
        with pytest.raises(ConfigError, match=message):
            plugin.refuse_early(args)
    good = argparse.Namespace(
        hicache_storage_backend="flexkv",
        hicache_storage_backend_extra_config='{"size": "1GB", "prefetch_threshold": 16}',
    )
    plugin.refuse_early(good)
    good.hicache_storage_backend = "file"
    good.hicache_storage_backend_extra_config = '{"sise": 1}'
    plugin.refuse_early(good)


def test_a_changed_signature_is_a_misfit(monkeypatch: pytest.MonkeyPatch) -> None:
    def renamed(self: Any, backend: str) -> None:
        """Lacks the parameters we set."""

    monkeypatch.setattr(plugin, "resolve", lambda _path: renamed)
    assert "storage_backend, storage_backend_extra_config" in str(plugin.misfit())
    monkeypatch.undo()
    monkeypatch.setattr(plugin, "ATTACH", "sglang.srt.nowhere.Class.method")
    assert "cannot be reached (ModuleNotFoundError" in str(plugin.misfit())


def test_prefix_keys_are_passed_with_flexkv_only() -> None:
    for backend, expected in (("flexkv", True), ("file", False)):
        settings = {"storage_backend": backend, "hicache_storage_pass_prefix_keys": False}
        args, kwargs = plugin.pass_prefix_keys("self", **settings)
        assert args == ("self",)
        assert kwargs["hicache_storage_pass_prefix_keys"] is expected
        assert settings["hicache_storage_pass_prefix_keys"] is False


def test_only_our_store_learns_the_prefetch_timeout() -> None:
    told: list[tuple[float, float]] = []

    class FlexKVStorage:
        def set_prefetch_timeout(self, base: float, per_ki_token: float) -> None:
            told.append((base, per_ki_token))

    def attachment(store: object) -> Any:
        controller = types.SimpleNamespace(storage_backend=store)
        return types.SimpleNamespace(_cache=types.SimpleNamespace(cache_controller=controller))

    settings = {"prefetch_timeout_base": 3.0, "prefetch_timeout_per_ki_token": 0.5}
    assert plugin.set_prefetch_timeout(attachment(FlexKVStorage()), **settings) is None
    assert told == [(3.0, 0.5)]
    plugin.set_prefetch_timeout(attachment(object()), **settings)
    plugin.set_prefetch_timeout(attachment(FlexKVStorage()), prefetch_timeout_base=3.0)
    plugin.set_prefetch_timeout("another release", **settings)
    assert told == [(3.0, 0.5)]


def test_importing_the_plug_in_loads_neither_torch_nor_sglang() -> None:
    code = (
        "import sys, flexkv_sglang.integration.plugin\n"
        "print([m for m in ('torch', 'sglang', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/"
    )
    assert out.stdout.strip() == "[]"


@pytest.mark.sglang
@pytest.mark.slow
def test_the_real_parser_accepts_flexkv_and_the_real_controller_fits() -> None:
    code = """
from sglang.srt.plugins import load_plugins
load_plugins()
import argparse
from sglang.srt.server_args import ServerArgs
from flexkv_sglang.integration import plugin
assert plugin.misfit() is None, plugin.misfit()
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
action = next(a for a in parser._actions if a.dest == 'hicache_storage_backend')
assert 'flexkv' in action.choices and 'file' in action.choices, action.choices
args = parser.parse_args(['--model-path', 'm', '--hicache-storage-backend', 'flexkv'])
assert args.hicache_storage_backend == 'flexkv'
plugin.misfit = lambda: 'planted'
asked = ServerArgs(model_path='m', hicache_storage_backend='flexkv')
try:
    asked.resolve_once()
except ValueError as exc:
    assert 'planted' in str(exc), exc
else:
    raise AssertionError('a misfit went unnoticed')
print('fits')
"""
    out = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd="/"
    )
    assert out.stdout.strip().endswith("fits"), out.stdout[-2000:] + out.stderr[-2000:]
