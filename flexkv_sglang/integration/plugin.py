"""Makes ``flexkv`` a valid name for SGLang's ``--hicache-storage-backend`` and
``--unified-cache-external-linker-backend``. The only file that bridges SGLang.

SGLang loads the entry-point group ``sglang.srt.plugins`` in every process before it parses arguments.
SGLang knows its storage backends by three hard-coded name lists, so three small hooks are needed; none
changes a file or a behaviour of SGLang for anybody who does not ask for ``flexkv``:

1. the command line accepts the name;
2. attaching a backend called ``flexkv`` (at start, or over HTTP) is attaching ``dynamic`` with our module
   and class and the zero-copy interface; afterwards the controller is told the name the user knows;
3. the hashes of the pages before a batch are passed along, which gives eviction the whole chain, and
   the store is told how long SGLang waits for a prefetch.

For the linker, a fourth: making a linker called ``flexkv`` is making ``dynamic`` with our module and class.
``weight_updates`` adds hooks that notice weight updates and cache flushes.

If a target is not there or has other parameters, ``flexkv`` is refused with one clear error instead of
running without storage. Importing this module costs nothing: no torch, no store.
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
    resolve_function,
)

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
        HookRegistry.register(RUNTIME_CONFIG, tell_prefetch_timeout, HookType.BEFORE)


def misfit() -> str | None:
    """Why this SGLang cannot be bridged, or None. Resolves the class that attaches storage backends."""
    return _misfit(ATTACH, resolve, _ATTACH_PARAMETERS)


def linker_misfit() -> str | None:
    """Why the linker of this SGLang has no shorthand, or None. Older releases have no linkers."""
    return _misfit(CREATE_LINKER, resolve_function, _LINKER_PARAMETERS)


def _misfit(path: str, find: Callable[[str], Any], wanted: tuple[str, ...]) -> str | None:
    try:
        target = find(path)
    except (ImportError, AttributeError) as exc:
        return f"{path} cannot be reached ({type(exc).__name__}: {exc})"
    parameters = inspect.signature(inspect.unwrap(target)).parameters
    missing = [name for name in wanted if name not in parameters]
    return f"{path} has no parameter {', '.join(missing)}" if missing else None


def accept_name(result: Any, parser: argparse.ArgumentParser, *_args: Any, **_kwargs: Any) -> Any:
    """After ``ServerArgs.add_cli_args``: the finished actions get a new list of choices."""
    for action in parser._actions:
        if action.dest in _FLAGS and action.choices is not None and NAME not in action.choices:
            action.choices = [*action.choices, NAME]
    return result


def refuse_early(server_args: Any, *_args: Any, **_kwargs: Any) -> None:
    """Before the server's arguments are resolved, whether from the command line or ``Engine(...)``:
    what cannot work is said before a model is loaded."""
    if getattr(server_args, "hicache_storage_backend", None) == NAME:
        _refuse_misfit()
        _check_settings(getattr(server_args, "hicache_storage_backend_extra_config", None))
    if getattr(server_args, "unified_cache_external_linker_backend", None) == NAME:
        _refuse("unified_cache_external_linker_backend", linker_misfit(), LINKER_HELP)
        config = getattr(server_args, "unified_cache_external_linker_config", None)
        if isinstance(config, dict):  # SGLang says what is wrong with another type
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
    # The zero-copy functions are chosen by now. A second attach compares this with the name it was asked for.
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
    """Before the tree takes over the storage settings: with ``flexkv``, prefix keys are passed along."""
    if kwargs.get("storage_backend") == NAME and "hicache_storage_pass_prefix_keys" in kwargs:
        kwargs = {**kwargs, "hicache_storage_pass_prefix_keys": True}
    return args, kwargs


def tell_prefetch_timeout(attachment: Any, *_args: Any, **kwargs: Any) -> None:
    """Before the tree takes over the storage settings, at start and at every attach: our store (under
    whichever name) learns the prefetch timeout, which SGLang takes out of the extra config."""
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
    """Wrong keys and values are said by the launcher already. Only JSON: SGLang reads the other forms."""
    if not text:
        return
    if text.startswith("@"):
        path = Path(text[1:])
        if path.suffix != ".json" or not path.is_file():
            return
        text = path.read_text()
    try:
        given = json.loads(text)
    except ValueError as exc:
        raise ConfigError(
            f"hicache_storage_backend_extra_config: {text!r} is not JSON: {exc}"
        ) from exc
    if not isinstance(given, dict):
        raise ConfigError(f"hicache_storage_backend_extra_config: {text!r}. Valid: a JSON object")
    FlexKVConfig.parse(given)
