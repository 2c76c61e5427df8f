"""Server arguments and switches of SGLang that change the bytes of a page, as a part of its namespace.

Not here: settings that change the shape of a page (the host pool shows it), settings that only choose between kernels
of the same precision (the composition of a batch changes such last bits, too), and the seed (SGLang fills dummy
weights from one of its own).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexkv_sglang.errors import ConfigError
from flexkv_sglang.identity.fingerprint import checkpoint, file_digest
from flexkv_sglang.integration.compat import UNKNOWN, as_text, server_args
from flexkv_sglang.integration.model_files import ServedModel, directory_of
from flexkv_sglang.integration.page_hash import refuse_adapters

KV_SETTINGS = (
    "load_format",
    "model_loader_extra_config",
    "custom_weight_loader",
    "model_impl",
    "json_model_override_args",
    "context_length",  # some models scale their rotary embedding by it
    "dtype",
    "quantization",
    "quantization_param_path",  # scaling factors of an fp8 KV cache
    "kv_cache_dtype",  # host pools of both fp8 types say uint8
    "qsa_indexer_dtype",
    "enable_deepseek_v4_fp4_indexer",
    "mamba_ssm_dtype",
    "enable_int8_mamba_checkpoint",
    "modelopt_quant",
    "modelopt_checkpoint_restore_path",
    "quantize_and_serve",
    "torchao_config",
    "rl_quant_profile",
    "decrypted_config_file",
    "enable_page_major_kv_layout",
    "model_config_parser",
    "forward_hooks",  # may replace any activation
    "dllm_algorithm",  # attention inside a block is not causal
    "dllm_algorithm_config",
    "enable_precise_embedding_interpolation",  # images: other embeddings under the same hash
    "enable_encoder_swa_bounded_replay",
    "enable_decoder_swa_bounded_replay",  # SGLang: not equivalent to a full prefill
    "prefill_kv_cache_dequant_dtype",
    "flashinfer_mxfp4_moe_precision",
    "enable_w4a4_mxfp4_megamoe",
    "enable_quant_communications",
)
"""For pools of either model."""

DRAFT_SETTINGS = (
    "speculative_algorithm",
    "speculative_draft_load_format",
    "speculative_draft_model_quantization",
    "speculative_draft_kv_cache_dtype",
    "speculative_draft_window_size",
    "speculative_draft_sink_size",
    "speculative_enable_w4a4_mxfp4_megamoe",
    "decrypted_draft_config_file",
    "uno_lora_path",
)
"""Further ones for pools of the draft model."""

KTRANSFORMERS_SETTINGS = (
    "kt_method",
    "kt_num_gpu_experts",
    "kt_max_deferred_experts_per_token",
)
"""The experts that run on the CPU, beside their weights (``kt_weight_path``)."""

KV_ENVIRONMENT = (
    "SGLANG_USE_HND_KVCACHE",
    "SGLANG_AITER_KV_CACHE_LAYOUT",
    "SGLANG_DSV4_KV_LAYOUT",  # v41 and v41_new: the same bytes in another order
    "SGLANG_DSV4_COMPRESSED_KV_LAYOUT",
    "SGLANG_DSV4_UNIFIED_KV_FP8",
    "SGLANG_DSV4_COMPRESS_STATE_DTYPE",
    "SGLANG_OPT_USE_ONLINE_COMPRESS",
    "SGLANG_OPT_SM120_DIRECT_SWA_KV",
    "SGLANG_HIP_DSV41_INDEX_K_PAGE8",
    "SGLANG_DSA_HIP_DISABLE_PRESHUFFLE",
    "SGLANG_OPT_MINIMAX_M3_FP8_INDEX_CACHE",
)
"""Switches in the environment that change the byte order in device memory, which the host pool has, too."""

VALUE_ENVIRONMENT = (
    "SGLANG_EXTERNAL_MODEL_PACKAGE",
    "SGLANG_DSV4_USE_BF16_KV_QUANT_SOURCE",
    "SGLANG_DSV4_FP4_EXPERTS",
    "SGLANG_CPU_QUANTIZATION",
    "SGLANG_FP8_IGNORED_LAYERS",
    "SGLANG_FP4_IGNORED_LAYERS",
    "SGLANG_HUMMING_ONLINE_QUANT_CONFIG",
    "SGLANG_HUMMING_INPUT_QUANT_CONFIG",
    "SGLANG_NVFP4_CKPT_FP8_GEMM_IN_ATTN",
    "SGLANG_NVFP4_CKPT_FP8_NEXTN_MOE",
    "SGLANG_FORCE_MXFP8_BLOCK_CONVERT_DENSE",
    "SGLANG_QUANT_ALLOW_DOWNCASTING",
    "SGLANG_SKIP_SOFTMAX_PREFILL_THRESHOLD_SCALE_FACTOR",
    "SGLANG_SKIP_SOFTMAX_DECODE_THRESHOLD_SCALE_FACTOR",
    "SGLANG_ROPE_CACHE_FP32",
)
"""Switches in the environment that change model code, quantisation or approximations."""

_FILES = (
    "quantization_param_path",
    "decrypted_config_file",
    "decrypted_draft_config_file",
    "rl_quant_profile",
    "dllm_algorithm_config",
)
_USUAL: Mapping[str, str] = {
    "model_config_parser": "auto",
    "prefill_kv_cache_dequant_dtype": "auto",
    "flashinfer_mxfp4_moe_precision": "default",
}
"""Values that mean the same as none."""

_started_with: dict[tuple[str, str], str] = {}
"""(argument, path) -> content at its first use. Files may be replaced later, while what was loaded stays."""


def kv_settings(*, draft: bool = False) -> dict[str, str]:
    """The server arguments that are set and change page bytes. A file counts by its content, not its name.

    ``draft``: for a pool of the draft model. Raises ``ConfigError`` if a file cannot be read.
    """
    args = server_args()
    names = KV_SETTINGS + (DRAFT_SETTINGS if draft else ())
    experts = getattr(args, "kt_weight_path", None)
    names += KTRANSFORMERS_SETTINGS if experts else ()
    found = {name: getattr(args, name, None) for name in names}
    settings = {name: _text(name, value) for name, value in found.items() if _is_set(name, value)}
    settings.update(_environment())
    if experts:
        settings["kt_weight_path"] = _weights_at("kt_weight_path", experts)
    refuse_adapters(args)
    adapters = _adapters(getattr(args, "lora_paths", None))
    if adapters:
        settings["lora_paths"] = adapters
    return settings


def _is_set(name: str, value: Any) -> bool:
    if value is None or value is False:
        return False
    return value not in ("", "{}", [], {}, _USUAL.get(name))


def _text(name: str, value: Any) -> str:
    if name == "uno_lora_path":
        return _weights_at(name, value)
    if name not in _FILES:
        return as_text(value)
    if (name, value) not in _started_with:
        try:
            _started_with[name, value] = f"file:{file_digest(Path(value))}"
        except OSError as exc:
            raise ConfigError(f"{name}: {value!r} cannot be read: {exc}. Valid: a file") from exc
    return _started_with[name, value]


def _environment() -> dict[str, str]:
    try:
        from sglang.srt.environ import envs
    except UNKNOWN:
        return {}
    found = {}
    for name in (*KV_ENVIRONMENT, *VALUE_ENVIRONMENT):
        switch = getattr(envs, name, None)
        if switch is not None:
            usual = switch.default() if callable(switch.default) else switch.default
            value = switch.get()
            if value != usual:
                found[name] = str(value)
    return found


def _adapters(given: Any) -> str:
    """Digest of the LoRA adapters of the command line.

    SGLang's page hash contains their names and paths, which stay when their content changes. Adapters that are loaded
    later get a random id.
    """
    if not given:
        return ""
    named = given.items() if isinstance(given, Mapping) else (_adapter(item) for item in given)
    parts = []
    for name, path in sorted(named):
        parts.append(f"{name}={_weights_at('lora_paths', path)}")
    return " ".join(parts)


def _weights_at(argument: str, path: str) -> str:
    """Digest of weights beside the model's own, at their first use; an argument gives their path."""
    if (argument, path) not in _started_with:
        _started_with[argument, path] = _digest_at(argument, path)
    return _started_with[argument, path]


def _digest_at(argument: str, path: str) -> str:
    directory = directory_of(ServedModel(path, None, ""))
    try:
        found = None if directory is None else checkpoint(directory)
    except OSError as exc:
        raise ConfigError(f"{argument}: {path!r} cannot be read: {exc}") from exc
    if found is None or found.weights is None:
        raise ConfigError(
            f"{argument}: {path!r} has no local files to tell it from others of that name. "
            "Valid: a directory with weight files"
            + (", or an adapter loaded at run time" if argument == "lora_paths" else "")
        )
    return f"{found.config}/{found.weights}"


def _adapter(item: Any) -> tuple[str, str]:
    if isinstance(item, str):
        name, found, path = item.partition("=")
        return name, path if found else name
    if isinstance(item, Mapping):
        return str(item["lora_name"]), str(item["lora_path"])
    return str(item.lora_name), str(item.lora_path)
