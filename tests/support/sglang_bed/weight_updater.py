"""SGLang's own weight updater, hooked by the plug-in, over a controller without a model."""

from __future__ import annotations

import types
import warnings
from pathlib import Path
from typing import Any

from flexkv_bed.controller import Rig
from flexkv_sglang.identity.epochs import WEIGHTS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # tests run with warnings as errors; these are not ours
    from sglang.srt.managers.io_struct import (
        BeginWeightUpdateReqInput,
        EndWeightUpdateReqInput,
        ReleaseMemoryOccupationReqInput,
        UpdateWeightFromDiskReqInput,
        UpdateWeightsFromIPCReqInput,
        UpdateWeightsFromTensorReqInput,
    )
    from sglang.srt.managers.scheduler_components.weight_updater import (
        SchedulerWeightUpdaterManager,
    )
    from sglang.srt.utils import MultiprocessingSerializer


class Runner:
    """A model runner without weights; ``answer`` is the result of a load, ``meanwhile`` runs during it."""

    def __init__(self) -> None:
        self.answer: tuple[bool, str] = (True, "done")
        self.meanwhile = lambda: None
        self.weight_updater = self
        self.model = types.SimpleNamespace(named_buffers=list)

    def _load(self, *_args: Any, **_kwargs: Any) -> tuple[bool, str]:
        self.meanwhile()
        return self.answer

    update_weights_from_disk = update_weights_from_tensor = update_weights_from_ipc = _load

    def begin_weight_update(self) -> None:
        """Weights are taken apart."""

    def end_weight_update(self, *, run_post_load: bool) -> None:
        """And put together."""


class Updates:
    """A scheduler that gets weight update requests. ``busy``: requests run, so no flush is possible."""

    def __init__(self, rig: Rig, draft: Runner | None = None) -> None:
        self.rig, self.runner, self.busy = rig, Runner(), False
        cache = types.SimpleNamespace(cache_controller=rig.controller)
        rig.controller.mem_pool_host = rig.host
        scheduler = types.SimpleNamespace(
            record_weight_version_change=lambda **_: None,
            is_fully_idle=lambda ignore_waiting: not self.busy,
            token_to_kv_pool_allocator=rig.slots,
            tree_cache=cache,
            disaggregation_mode=None,
            _engine_paused=False,
        )
        worker = types.SimpleNamespace(
            weight_update_runners=lambda: [("target", self.runner)],
            model_runner=self.runner,
            deserialize_own_rank=lambda data: MultiprocessingSerializer.deserialize(data[0]),
        )
        manager = object.__new__(SchedulerWeightUpdaterManager)  # its group needs a parallel world
        for name, value in {
            "tp_worker": worker,
            "draft_worker": draft
            and types.SimpleNamespace(weight_update_runners=lambda: [("draft", draft)]),
            "memory_saver_adapter": types.SimpleNamespace(pause=lambda _tag: None),
            "flush_cache": self.flush,
            "is_fully_idle": scheduler.is_fully_idle,
            "scheduler": scheduler,
            "metrics_collector": None,
            "offload_tags": set(),
            "_session": None,
            "tp_cpu_group": None,
        }.items():
            setattr(manager, name, value)
        self.manager: Any = manager

    def flush(self, empty_cache: bool = True) -> bool:
        """As ``Scheduler.flush_cache``, for the controller and the pools."""
        if self.busy:
            return False
        self.rig.controller.reset()
        self.rig.host.clear()
        self.rig.slots.clear()
        return True

    def disk(self, path: Path, *, flush: bool = True) -> Any:
        """``update_weights_from_disk``."""
        request = UpdateWeightFromDiskReqInput(
            model_path=str(path), load_format="auto", flush_cache=flush
        )
        return self.manager.update_weights_from_disk(request)

    def tensor(self, *, flush: bool = True) -> Any:
        """One bucket of ``update_weights_from_tensor``."""
        data = [MultiprocessingSerializer.serialize([])]
        request = UpdateWeightsFromTensorReqInput(serialized_named_tensors=data, flush_cache=flush)
        return self.manager.update_weights_from_tensor(request)

    def ipc(self) -> Any:
        """``update_weights_from_ipc``."""
        return self.manager.update_weights_from_ipc(UpdateWeightsFromIPCReqInput(zmq_handles={}))

    def begin(self) -> Any:
        """``begin_weight_update``."""
        return self.manager.begin_weight_update(BeginWeightUpdateReqInput())

    def end(self) -> Any:
        """``end_weight_update``."""
        return self.manager.end_weight_update(EndWeightUpdateReqInput())

    def release(self, *tags: str) -> Any:
        """``release_memory_occupation``."""
        return self.manager.release_memory_occupation(
            ReleaseMemoryOccupationReqInput(tags=list(tags))
        )


def forget_updates() -> None:
    """As in a process that has just started."""
    for store in list(WEIGHTS._stores):
        WEIGHTS.detach(store)
    type(WEIGHTS).__init__(WEIGHTS)
