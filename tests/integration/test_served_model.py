"""The identity of the served model: two servers with different page bytes never have the same."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flexkv_bed.controller import boot
from flexkv_sglang.errors import ConfigError
from flexkv_sglang.identity.epochs import Epoch
from flexkv_sglang.integration import kv_settings as settings_module
from flexkv_sglang.integration import served_model as served
from flexkv_sglang.integration.kv_settings import kv_settings
from flexkv_sglang.integration.served_model import model_identity
from models.checkpoints import write_checkpoint
from sglang_bed.weight_updater import forget_updates

pytestmark = pytest.mark.sglang

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(served, "_started_with", {})  # as in a process that has just started
    forget_updates()
    yield
    forget_updates()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


def served_as(model: Path | str, **arguments: Any) -> str:
    served._started_with.clear()
    boot(model, **{"load_format": "auto", **arguments})
    return model_identity(None, Epoch())


def resolved_to(model: Path, **resolved: Any) -> None:
    """Publish resolved arguments, as SGLang does for ModelScope and for a GGUF file of the hub."""
    from sglang.srt.arg_groups.overrides import declare_resolution
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import ServerArgs

    boot(model, load_format="auto")  # a world of one rank
    args = ServerArgs(model_path=str(model), device="cpu", load_format="auto")
    args.resolve_once()
    declare_resolution(args, "test", **resolved)
    publish(args, role="scheduler", ranks=_one_rank())


def _one_rank() -> Any:
    from sglang.srt.runtime_context import SpawnRanks

    return SpawnRanks(world_rank=0)


def in_cache(cache: Path, fill: int) -> None:
    """A hub model as ``huggingface_hub`` keeps it."""
    home = cache / "models--some--model"
    write_checkpoint(_made(home / "snapshots" / COMMIT), fill)
    _made(home / "refs").joinpath("main").write_text(COMMIT)


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True)
    return directory


def test_the_path_that_sglang_resolved_is_fingerprinted_not_the_one_that_was_given(
    model: Path, tmp_path: Path
) -> None:
    given = served_as(model)
    other = write_checkpoint(tmp_path / "other", fill=2)
    expected = served_as(other)
    served._started_with.clear()
    resolved_to(model, model_path=str(other))
    assert model_identity(None, Epoch()) == expected != given


def test_a_setting_that_sglang_resolved_counts(model: Path) -> None:
    resolved_to(model, enable_decoder_swa_bounded_replay=True)
    assert kv_settings()["enable_decoder_swa_bounded_replay"] == "True"


def test_two_gguf_files_in_one_directory_are_two_models(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {}
    for kind, fill in (("Q4_K", 4), ("Q8_0", 8)):
        (model / f"m-{kind}.gguf").write_bytes(bytes([fill]) * 9000)
    for kind in ("Q4_K", "Q8_0"):
        resolved_to(model, model_path=str(model / f"m-{kind}.gguf"))
        names[kind] = model_identity(None, Epoch())
    assert names["Q4_K"] != names["Q8_0"]
    served._started_with.clear()
    (model / "m-Q5_K.gguf").write_bytes(b"5" * 9000)  # fetched later: nothing to those that run
    resolved_to(model, model_path=str(model / "m-Q4_K.gguf"))
    assert model_identity(None, Epoch()) == names["Q4_K"]


def test_all_parts_of_a_split_gguf_file_count(model: Path) -> None:
    parts = [model / f"m-Q4-0000{n}-of-00002.gguf" for n in (1, 2)]
    for part in parts:
        part.write_bytes(b"4" * 9000)
    resolved_to(model, model_path=str(parts[0]))
    before = model_identity(None, Epoch())
    parts[1].write_bytes(b"5" * 9000)
    served._started_with.clear()
    assert model_identity(None, Epoch()) != before


def test_weights_are_read_where_sglang_downloads_them(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The usual cache may hold another commit."""
    in_cache(tmp_path / "usual", fill=1)
    in_cache(tmp_path / "mine", fill=2)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "usual"))
    resolved_to(model, model_path="some/model")
    usual = model_identity(None, Epoch())
    served._started_with.clear()
    resolved_to(model, model_path="some/model", download_dir=str(tmp_path / "mine"))
    mine = model_identity(None, Epoch())
    assert mine != usual
    assert mine.split()[0] == usual.split()[0]  # the same configuration
    served._started_with.clear()
    resolved_to(model, model_path="some/model", download_dir=str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="there are no local files of 'some/model'"):
        model_identity(None, Epoch())


def test_weights_from_a_cache_process_may_be_older_than_the_files(model: Path) -> None:
    resolved_to(model, weight_cache_mode="client")
    with pytest.raises(ConfigError, match=r"model_id: not set.*weight_cache_mode"):
        model_identity(None, Epoch())


ENVIRONMENTS = {
    "SGLANG_DSV4_KV_LAYOUT": ("v41", "v41_new"),
    "SGLANG_DSV4_COMPRESSED_KV_LAYOUT": ("fp4", "fp8"),
    "SGLANG_DSA_HIP_DISABLE_PRESHUFFLE": ("0", "1"),
    "SGLANG_FP8_IGNORED_LAYERS": ("", "lm_head"),
    "SGLANG_OPT_MINIMAX_M3_FP8_INDEX_CACHE": ("1", "0"),
    "SGLANG_SKIP_SOFTMAX_PREFILL_THRESHOLD_SCALE_FACTOR": ("10.0", "20.0"),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_switches_of_the_environment_that_change_bytes_count(
    model: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    boot(model, load_format="auto")
    plain = kv_settings()
    assert not any(key.startswith("SGLANG_") for key in plain)
    seen = []
    for value in ENVIRONMENTS[name]:
        monkeypatch.setenv(name, value)
        seen.append(kv_settings().get(name))
    assert seen[0] != seen[1]
    monkeypatch.delenv(name)
    assert kv_settings() == plain


def test_every_switch_is_one_of_sglangs() -> None:
    """In the installed release; older ones have fewer."""
    from sglang.srt.environ import envs

    names = settings_module.KV_ENVIRONMENT + settings_module.VALUE_ENVIRONMENT
    assert [name for name in names if not hasattr(envs, name)] == []


RESOLVED = {
    "forward_hooks": [{"name": "steer", "target_modules": ["layers.1"], "hook_factory": "m:f"}],
    "dllm_algorithm": "LowConfidence",
    "enable_precise_embedding_interpolation": True,
    "prefill_kv_cache_dequant_dtype": "fp8_e4m3",
    "flashinfer_mxfp4_moe_precision": "bf16",
    "enable_quant_communications": True,
    "model_config_parser": "mistral",
}


@pytest.mark.parametrize("name", RESOLVED)
def test_arguments_that_change_activations_count(model: Path, name: str) -> None:
    boot(model, load_format="auto")
    assert name not in kv_settings()
    resolved_to(model, **{name: RESOLVED[name]})
    assert kv_settings()[name] == str(RESOLVED[name])


@pytest.mark.parametrize("name", ["speculative_draft_sink_size", "speculative_draft_window_size"])
def test_settings_of_a_draft_count_for_its_pages_only(model: Path, name: str) -> None:
    resolved_to(model, **{name: 64})
    assert kv_settings(draft=True)[name] == "64"
    assert name not in kv_settings()


def test_expert_weights_of_another_path_count_by_content(model: Path, tmp_path: Path) -> None:
    seen = set()
    for fill in (1, 2):
        experts = write_checkpoint(tmp_path / f"experts{fill}", fill)
        resolved_to(model, kt_weight_path=str(experts), kt_method="AMXINT4", kt_num_gpu_experts=0)
        settings = kv_settings()
        seen.add(settings["kt_weight_path"])
        assert (settings["kt_method"], settings["kt_num_gpu_experts"]) == ("AMXINT4", "0")
        assert str(tmp_path) not in str(settings)
    assert len(seen) == 2
    resolved_to(model, kt_weight_path=os.fspath(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"kt_weight_path: .*no local files"):
        kv_settings()


def test_a_draft_inside_the_checkpoint_is_updated_with_it(model: Path, tmp_path: Path) -> None:
    """So servers that were started on the new checkpoint share its draft pages as well."""
    other = write_checkpoint(tmp_path / "other", fill=2)
    resolved_to(other, speculative_draft_model_path=str(other))
    started = model_identity(None, Epoch(), draft=True)
    content = served.loaded_content(str(other), "auto")
    for path in (None, str(model)):
        served._started_with.clear()
        resolved_to(model, speculative_draft_model_path=path)
        assert model_identity(None, Epoch(content), draft=True) == started


def test_a_draft_of_its_own_is_no_longer_that_draft_after_an_update(
    model: Path, tmp_path: Path
) -> None:
    draft = write_checkpoint(tmp_path / "draft", fill=3)
    resolved_to(model, speculative_draft_model_path=str(draft))
    content = served.loaded_content(str(model), "auto")
    before = model_identity(None, Epoch(), draft=True)
    assert model_identity(None, Epoch(content)) == model_identity(None, Epoch())
    assert model_identity(None, Epoch(content), draft=True) != before


def test_a_trainers_state_beside_the_weights_is_no_configuration(model: Path) -> None:
    before = served_as(model)
    (model / "trainer_state.json").write_text('{"step": 100}')
    assert served_as(model) == before
