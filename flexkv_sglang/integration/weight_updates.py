"""Hooks on SGLang's weight updates and cache flushes, which drive ``epochs.WEIGHTS``.

SGLang's scheduler hands each update request to one method per kind, on each rank, in the same order. The hooks go
around those, and around the controller's ``reset``: after it, host memory and queues hold nothing of a flushed cache.
They raise nothing of their own and change no result.

Ranks must agree where they store: an update may fail on one rank only, and then pages that a rank with the right
weights computes from a broken rank's activations are wrong. So after an update the ranks of a tensor-parallel group
exchange their results, over the group that SGLang uses for its barriers there.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from typing import Any

from flexkv_sglang.identity.epochs import WEIGHTS, Epoch
from flexkv_sglang.integration.compat import (
    RESET,
    UNKNOWN,
    WEIGHT_UPDATERS,
    first_there,
    server_args,
)
from flexkv_sglang.integration.served_model import loaded_content

logger = logging.getLogger(__name__)

_NOT_NOW = (
    "update_weights_from_tensor must run between ",
    "update_weights_from_distributed must run between ",
    "a weight-update session is already open",
    "no weight-update session is open",
)
"""The beginnings of SGLang's messages when it refuses a request before it touches a weight."""

_NO_FILES = "Failed to get "
"""The same from one model runner: no such checkpoint. Runners before it in the list have loaded theirs."""

_NOT_FLUSHED = "Weights were updated, but "
"""The same when weights are loaded and requests keep SGLang from flushing. It may hide a failure of the draft."""

_AS_BEFORE = "as before"

_installed = False


def hooks() -> Iterator[tuple[str, Callable[..., Any]]]:
    """(target, hook around it) for the targets that this release of SGLang has. Imports SGLang."""
    around = {
        "update_weights_from_disk": around_disk,
        "update_weights_from_tensor": around_update,
        "update_weights_from_distributed": around_update,
        "update_weights_from_ipc": around_update,
        "begin_weight_update": around_begin,
        "end_weight_update": around_end,
        "release_memory_occupation": around_release,
    }
    for home in WEIGHT_UPDATERS:
        found = [(f"{home}.{name}", hook) for name, hook in around.items()]
        found = [(target, hook) for target, hook in found if first_there(target)]
        if found:
            yield from found
            break
    if first_there(RESET):
        yield RESET, around_reset


def install() -> bool:
    """Register the hooks with SGLang's plug-in framework, once. False if it has no method to hook."""
    global _installed
    if _installed:
        return True
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    found = list(hooks())
    for target, hook in found:
        HookRegistry.register(target, hook, HookType.AROUND)
    _installed = any(target != RESET for target, _ in found)
    return _installed


def install_now() -> None:
    """Install and patch at once, for use without the plug-in. It is late for a server that already runs."""
    if _installed:
        return
    try:
        from sglang.srt.plugins.hook_registry import HookRegistry

        if install():
            HookRegistry.apply_hooks()
            logger.info(
                "flexkv: the plug-in is not loaded, weight updates are hooked now. If the server was "
                "already running, detach the storage backend before you update weights"
            )
            return
    except (ImportError, AttributeError) as exc:
        logger.debug("flexkv: no plug-in framework: %s", exc)
    logger.warning(
        "flexkv: this SGLang offers no way to notice weight updates: detach the storage backend before one"
    )


def around_disk(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """A new checkpoint from disk: its files identify the weights."""
    path, load_format = getattr(request, "model_path", ""), getattr(request, "load_format", None)
    before = _content(path, load_format)
    result = _changing(original, manager, request)
    message = str(getattr(result, "message", ""))
    kept = message.startswith(_NOT_FLUSHED) and _one_runner(manager)
    changed = getattr(result, "success", True)
    after = _content(path, load_format) if changed or kept else ""
    _guarded(lambda: _finish(manager, result, before if before == after else ""))
    return result


def around_update(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Weights from tensors, another process or a checkpoint engine: nothing identifies them."""
    result = _changing(original, manager, request)
    _guarded(lambda: _finish(manager, result))
    return result


def around_begin(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """A session of updates begins: until its end, weights are in parts."""
    result = _changing(original, manager, request, session=True)
    _guarded(lambda: _finish(manager, result))
    return result


def around_end(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """A session of updates ends: the weights are complete."""
    result = _changing(original, manager, request)
    _guarded(WEIGHTS.end_session)
    _guarded(lambda: _finish(manager, result))
    return result


def around_release(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """The memory of the weights is released: without a copy, they come back with arbitrary content."""
    args, tags = server_args(), getattr(request, "tags", None)
    lost = getattr(args, "enable_memory_saver", False) and not getattr(
        args, "enable_weights_cpu_backup", False
    )
    if lost and (not tags or "weights" in tags):
        return around_update(original, manager, request)
    return original(manager, request)


def around_reset(original: Callable[..., Any], controller: Any, *args: Any, **kwargs: Any) -> Any:
    """The controller has stopped its threads and emptied its queues."""
    result = original(controller, *args, **kwargs)
    _guarded(WEIGHTS.flushed)
    return result


def agree(group: Any, content: str, clean: bool) -> tuple[Epoch, bool]:
    """The epoch that all ranks of ``group`` agree on, and whether all of them are ``clean``.

    Each rank calls it at the same point. ``content`` counts only if all ranks have the same, and if there is one
    pipeline stage: other stages cannot be asked (their turn comes later). Otherwise the first rank's nonce counts.
    """
    import torch.distributed as dist

    mine = (content, secrets.token_hex(16), clean)
    everyone: list[Any] = [mine]
    if group is not None and dist.is_initialized() and dist.get_world_size(group) > 1:
        everyone = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, mine, group=group)
    contents = {item[0] for item in everyone}
    shared = content if len(contents) == 1 and _pipeline_stages() == 1 else ""
    epoch = Epoch(shared, "" if shared else everyone[0][1], agreed=True)
    return epoch, all(item[2] for item in everyone)


def agree_before_attach() -> None:
    """Let the ranks agree if weights changed before the first store.

    SGLang attaches on all of them; steps that may fail on one rank come later.
    """
    WEIGHTS.wanted = True
    if not WEIGHTS.epoch.agreed:
        WEIGHTS.epoch, _ = agree(_group(), WEIGHTS.epoch.content, clean=False)


def _group() -> Any:
    """The group of SGLang's barriers after an update; None outside a server."""
    try:
        from sglang.srt.runtime_context import get_parallel

        return get_parallel().tp_group.cpu_group
    except UNKNOWN:
        return None


def _changing(
    original: Callable[..., Any], manager: Any, request: Any, *, session: bool = False
) -> Any:
    _guarded(lambda: WEIGHTS.begin(session=session))
    try:
        return original(manager, request)
    except BaseException:
        _guarded(lambda: WEIGHTS.finish(WEIGHTS.epoch, clean=False))
        raise


def _finish(manager: Any, result: Any, content: str = "") -> None:
    message = "" if getattr(result, "success", True) else str(getattr(result, "message", ""))
    if message.startswith(_NOT_NOW) or (message.startswith(_NO_FILES) and _one_runner(manager)):
        _refused(manager)
        return
    clean = _holds_no_cache(manager)
    if WEIGHTS.wanted:
        epoch, clean = agree(getattr(manager, "tp_cpu_group", None), content, clean)
    else:
        epoch = Epoch(content, "" if content else secrets.token_hex(16), agreed=False)
    WEIGHTS.finish(epoch, clean=clean)
    logger.info(
        "flexkv: weights changed: %s%s",
        f"content {epoch.content}" if epoch.content else "unknown to others",
        "" if WEIGHTS.settled else "; pages are stored again after the cache is flushed",
    )


def _refused(manager: Any) -> None:
    """SGLang refused the update on this rank. The ranks exchange whether all of them did."""
    if not WEIGHTS.wanted:
        WEIGHTS.unchanged()
        return
    group = getattr(manager, "tp_cpu_group", None)
    epoch, _ = agree(group, _AS_BEFORE, clean=False)
    if epoch.content == _AS_BEFORE:
        WEIGHTS.unchanged()
    else:
        WEIGHTS.finish(epoch, clean=False)


def _one_runner(manager: Any) -> bool:
    """True if there is no draft model, which would be loaded after the target."""
    if getattr(manager, "draft_worker", None) is not None:
        return False
    runners = getattr(manager.tp_worker, "weight_update_runners", None)
    return runners is None or len(runners()) == 1


def _holds_no_cache(manager: Any) -> bool:
    """True if nothing is computed and device and host memory hold no KV cache, as after a flush."""
    try:
        scheduler = getattr(manager, "scheduler", None) or manager
        slots = scheduler.token_to_kv_pool_allocator
        host = scheduler.tree_cache.cache_controller.mem_pool_host
        paused = bool(getattr(scheduler, "_engine_paused", False))
        return bool(
            scheduler.is_fully_idle(ignore_waiting=paused)
            and slots.available_size() == slots.size
            and host.available_size() == host.size
        )
    except (AttributeError, TypeError, NotImplementedError):
        return False


def _pipeline_stages() -> int:
    return int(getattr(server_args(), "pp_size", 1) or 1)


def _content(path: Any, load_format: str | None) -> str:
    try:
        return loaded_content(str(path), load_format)
    except Exception as exc:  # a boundary to SGLang
        logger.error("flexkv: fingerprinting %r failed", path, exc_info=exc)
        return ""


def _guarded(step: Callable[[], None]) -> None:
    """Raise nothing of ours into an update. Stores are suspended by then, so pages miss."""
    try:
        step()
    except Exception as exc:  # a boundary to SGLang
        logger.error("flexkv: following a weight update failed", exc_info=exc)
