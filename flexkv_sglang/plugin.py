"""Makes ``flexkv`` a valid name for SGLang's ``--hicache-storage-backend``. The only file that bridges SGLang.

SGLang loads the entry-point group ``sglang.srt.plugins`` in every process before it parses arguments.
SGLang knows its storage backends by three hard-coded name lists, so three small hooks are needed; none
changes a file or a behaviour of SGLang for anybody who does not ask for ``flexkv``:

1. the command line accepts the name;
2. attaching a backend called ``flexkv`` (at start, or over HTTP) is attaching ``dynamic`` with our module
   and class and the zero-copy interface; afterwards the controller is told the name the user knows;
3. the hashes of the pages before a batch are passed along, which gives eviction the whole chain, and
   the store is told how long SGLang waits for a prefetch.

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

from flexkv_sglang.compat import (
    ADD_CLI_ARGS,
    ATTACH,
    RESOLVE,
    RUNTIME_CONFIG,
    first_there,
    resolve,
)
from flexkv_sglang.config import FlexKVConfig
from flexkv_sglang.errors import ConfigError

NAME = "flexkv"
MODULE, CLASS = "flexkv_sglang", "FlexKVStorage"

_ATTACH_PARAMETERS = ("storage_backend", "storage_backend_extra_config")

HELP = (
    "'--hicache-storage-backend dynamic' with module_path 'flexkv_sglang', class_name 'FlexKVStorage', "
    "backend_name 'flexkv' and interface_v1 1 in the extra config needs no hooks"
)


def register() -> None:
    """Entry point: register the hooks with SGLang's plug-in framework (0.5.11 and later)."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from flexkv_sglang import weight_updates

    HookRegistry.register(ADD_CLI_ARGS, accept_name, HookType.AFTER)
    resolution = first_there(*RESOLVE)
    if resolution is not None:
        HookRegistry.register(resolution, refuse_early, HookType.BEFORE)
    HookRegistry.register(ATTACH, attach, HookType.AROUND)
    weight_updates.install()
    if first_there(RUNTIME_CONFIG):  # an optimisation: without it each batch is a chain of its own
        HookRegistry.register(RUNTIME_CONFIG, pass_prefix_keys, HookType.BEFORE)
        HookRegistry.register(RUNTIME_CONFIG, tell_prefetch_timeout, HookType.BEFORE)


def misfit() -> str | None:
    """Why this SGLang cannot be bridged, or None. Resolves the class that attaches storage backends."""
    try:
        target = resolve(ATTACH)
    except (ImportError, AttributeError) as exc:
        return f"{ATTACH} cannot be reached ({type(exc).__name__}: {exc})"
    parameters = inspect.signature(inspect.unwrap(target)).parameters
    missing = [name for name in _ATTACH_PARAMETERS if name not in parameters]
    if missing:
        return f"{ATTACH} has no parameter {', '.join(missing)}"
    return None


def accept_name(result: Any, parser: argparse.ArgumentParser, *_args: Any, **_kwargs: Any) -> Any:
    """After ``ServerArgs.add_cli_args``: the finished action gets a new list of choices."""
    for action in parser._actions:
        if (
            action.dest == "hicache_storage_backend"
            and action.choices is not None
            and NAME not in action.choices
        ):
            action.choices = [*action.choices, NAME]
    return result


def refuse_early(server_args: Any, *_args: Any, **_kwargs: Any) -> None:
    """Before the server's arguments are resolved, whether from the command line or ``Engine(...)``:
    what cannot work is said before a model is loaded."""
    if getattr(server_args, "hicache_storage_backend", None) == NAME:
        _refuse_misfit()
        _check_settings(getattr(server_args, "hicache_storage_backend_extra_config", None))


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
    reason = misfit()
    if reason is not None:
        import sglang

        raise ConfigError(
            f"hicache_storage_backend: 'flexkv' does not fit SGLang {sglang.__version__}: {reason}. "
            f"Valid: another release of flexkv-sglang or SGLang; {HELP}"
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
