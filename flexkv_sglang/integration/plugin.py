"""The SGLang plug-in: makes ``flexkv`` a valid name for ``--hicache-storage-backend`` and for
``--unified-cache-external-linker-backend``.

SGLang loads the entry-point group ``sglang.srt.plugins`` in each process before it parses arguments. It knows its
backends by hard-coded lists of names, so ``register`` sets hooks. None changes a file of SGLang, or its behaviour for
anybody who does not ask for ``flexkv``:

accept_name            the command line accepts the name
refuse_early           what cannot work is refused before a model is loaded
attach                 attaching ``flexkv`` (at start or over HTTP) is attaching ``dynamic`` with our class and the
                       zero-copy interface; afterwards the controller has the name that the user knows
create_linker          the same for making a linker
pass_prefix_keys       the hashes of the pages before a batch come along, so eviction sees the whole chain
set_prefetch_timeout   the store learns how long SGLang waits for a prefetch

``weight_updates`` adds up to eight hooks that notice weight updates and cache flushes.

If a target is missing or has other parameters, one clear error refuses ``flexkv``: it never runs without storage.
Importing this module costs nothing: no torch, no store.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexkv_sglang.config.settings import FlexKVConfig
from flexkv_sglang.errors import ConfigError
from flexkv_sglang.integration.compat import (
    ADD_CLI_ARGS,
    ATTACH,
    CREATE_LINKER,
    RESOLVE,
    RUNTIME_CONFIG,
    first_there,
    resolve,
)
from flexkv_sglang.integration.page_hash import refuse_adapters

NAME = "flexkv"
MODULE, CLASS = "flexkv_sglang", "FlexKVStorage"

LINKER_MODULE, LINKER_CLASS = "flexkv_sglang.linker", "FlexKVLinker"

_ATTACH_PARAMETERS = ("storage_backend", "storage_backend_extra_config")

_LINKER_PARAMETERS = ("backend", "config")
_FLAGS = ("hicache_storage_backend", "unified_cache_external_linker_backend")

HELP = (
    "'--hicache-storage-backend dynamic' with module_path 'flexkv_sglang', class_name 'FlexKVStorage', "
    "backend_name 'flexkv' and interface_v1 1 in the extra config needs no hooks"
)

LINKER_HELP = (
    "'--unified-cache-external-linker-backend dynamic' with linker 'FlexKVLinker' and linker_module_path "
    "'flexkv_sglang.linker' in the config needs no hooks"
)


def register() -> None:
    """Entry point: register the hooks with SGLang's plug-in framework (0.5.11 and later)."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from flexkv_sglang.integration import weight_updates

    HookRegistry.register(ADD_CLI_ARGS, accept_name, HookType.AFTER)
    resolution = first_there(*RESOLVE)
    if resolution is not None:
        HookRegistry.register(resolution, refuse_early, HookType.BEFORE)
    HookRegistry.register(ATTACH, attach, HookType.AROUND)
    if linker_misfit() is None:
        HookRegistry.register(CREATE_LINKER, create_linker, HookType.AROUND)
    weight_updates.install()
    if first_there(RUNTIME_CONFIG):  # an optimisation: without it each batch is a chain of its own
        HookRegistry.register(RUNTIME_CONFIG, pass_prefix_keys, HookType.BEFORE)
        HookRegistry.register(RUNTIME_CONFIG, set_prefetch_timeout, HookType.BEFORE)


def misfit() -> str | None:
    """The reason why this SGLang cannot be hooked, or None. Imports the class that attaches storage backends."""
    return _misfit(ATTACH, _ATTACH_PARAMETERS)


def linker_misfit() -> str | None:
    """The reason why ``flexkv`` cannot name a linker in this SGLang, or None. Older releases have no linkers."""
    return _misfit(CREATE_LINKER, _LINKER_PARAMETERS)


def _misfit(path: str, wanted: tuple[str, ...]) -> str | None:
    try:
        target = resolve(path)
    except (ImportError, AttributeError) as exc:
        return f"{path} cannot be reached ({type(exc).__name__}: {exc})"
    parameters = inspect.signature(inspect.unwrap(target)).parameters
    missing = [name for name in wanted if name not in parameters]
    return f"{path} has no parameter {', '.join(missing)}" if missing else None


def accept_name(result: Any, parser: argparse.ArgumentParser, *_args: Any, **_kwargs: Any) -> Any:
    """After ``ServerArgs.add_cli_args``: add the name to the choices of two flags."""
    for action in parser._actions:
        if action.dest in _FLAGS and action.choices is not None and NAME not in action.choices:
            action.choices = [*action.choices, NAME]
    return result


def refuse_early(server_args: Any, *_args: Any, **_kwargs: Any) -> None:
    """Before the server's arguments are resolved, from the command line or ``Engine(...)``: check the settings.

    So an error comes before a model is loaded.
    """
    if NAME in (getattr(server_args, flag, None) for flag in _FLAGS):
        refuse_adapters(server_args)
    if getattr(server_args, "hicache_storage_backend", None) == NAME:
        _refuse_misfit()
        _check_settings(getattr(server_args, "hicache_storage_backend_extra_config", None))
    if getattr(server_args, "unified_cache_external_linker_backend", None) == NAME:
        _refuse("unified_cache_external_linker_backend", linker_misfit(), LINKER_HELP)
        config = getattr(server_args, "unified_cache_external_linker_config", None)
        if isinstance(config, dict):  # SGLang refuses other types
            FlexKVConfig.parse(config)


def attach(original: Callable[..., Any], controller: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``HiCacheController.attach_storage_backend``: ``flexkv`` is ``dynamic`` plus our class."""
    bound = inspect.signature(inspect.unwrap(original)).bind(controller, *args, **kwargs)
    if bound.arguments.get("storage_backend") != NAME:
        return original(controller, *args, **kwargs)
    _refuse_misfit()
    extra = dict(bound.arguments.get("storage_backend_extra_config") or {})
    extra.update(backend_name=NAME, module_path=MODULE, class_name=CLASS, interface_v1=1)
    bound.arguments["storage_backend"] = "dynamic"
    bound.arguments["storage_backend_extra_config"] = extra
    result = original(*bound.args, **bound.kwargs)
    # The zero-copy functions are chosen by now. A second attach compares this with the name that it was given.
    controller.storage_backend_type = NAME
    return result


def create_linker(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around the function that makes linkers: ``flexkv`` is ``dynamic`` plus our class."""
    bound = inspect.signature(inspect.unwrap(original)).bind(*args, **kwargs)
    if bound.arguments.get("backend") == NAME:
        bound.arguments["backend"] = "dynamic"
        bound.arguments["config"] = {
            "linker": LINKER_CLASS,
            "linker_module_path": LINKER_MODULE,
            "linker_extra_config": dict(bound.arguments.get("config") or {}),
        }
    return original(*bound.args, **bound.kwargs)


def pass_prefix_keys(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before the tree takes over the storage settings: with ``flexkv``, it passes prefix keys along."""
    if kwargs.get("storage_backend") == NAME and "hicache_storage_pass_prefix_keys" in kwargs:
        kwargs = {**kwargs, "hicache_storage_pass_prefix_keys": True}
    return args, kwargs


def set_prefetch_timeout(attachment: Any, *_args: Any, **kwargs: Any) -> None:
    """Before the tree takes over the storage settings, at start and at each attach: tell our store the prefetch
    timeout, which SGLang takes out of the extra config. The backend may have any name."""
    controller = getattr(getattr(attachment, "_cache", None), "cache_controller", None)
    store: Any = getattr(controller, "storage_backend", None)
    timeout = [kwargs.get(f"prefetch_timeout_{part}") for part in ("base", "per_ki_token")]
    if type(store).__name__ == CLASS and all(isinstance(part, int | float) for part in timeout):
        store.set_prefetch_timeout(*timeout)


def _refuse_misfit() -> None:
    _refuse("hicache_storage_backend", misfit(), HELP)


def _refuse(flag: str, reason: str | None, instead: str) -> None:
    if reason is not None:
        import sglang

        raise ConfigError(
            f"{flag}: 'flexkv' does not fit SGLang {sglang.__version__}: {reason}. "
            f"Valid: another release of flexkv-sglang or SGLang; {instead}"
        )


def _check_settings(text: str | None) -> None:
    """Refuse wrong keys and values. JSON only: SGLang reads the other forms later."""
    if not text:
        return
    if text.startswith("@"):
        path = Path(text[1:])
        if path.suffix != ".json" or not path.is_file():
            return
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError):  # SGLang says so
            return
    try:
        given = json.loads(text)
    except ValueError as exc:
        raise ConfigError(
            f"hicache_storage_backend_extra_config: {text!r} is not JSON: {exc}"
        ) from exc
    if not isinstance(given, dict):
        raise ConfigError(f"hicache_storage_backend_extra_config: {text!r}. Valid: a JSON object")
    FlexKVConfig.parse(given)
