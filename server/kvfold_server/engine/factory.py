"""Builds an engine from its options."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvfold_scheduler.scheduler import Scheduler, SchedulerLimits
from kvfold_scheduler.sharing import SharingPlan
from kvfold_server.engine.core import EngineCore
from kvfold_server.engine.memory_size import default_kv_bytes
from kvfold_server.engine.options import WEIGHT_FORMS
from kvfold_server.engine.runner import Runner
from kvfold_server.engine.stages import Stages
from kvfold_server.generation.model_info import DepthQuality, ModelInfo
from kvfold_server.kv.arena import Arena
from kvfold_server.kv.backends.base import BackendUnavailableError
from kvfold_server.kv.backends.native import NativeBackend
from kvfold_server.kv.backends.registry import BACKENDS, best_backend
from kvfold_server.kv.native.layer_ops import LayerOps
from kvfold_server.models.int8_weight import int8_refusal
from kvfold_server.models.loading import DTYPES, load_model
from kvfold_server.models.patching import patch_model
from kvfold_server.models.source import resolve_model
from kvfold_server.sharing.fingerprint import fingerprint
from kvfold_server.sharing.plan_file import find_shipped_plan, load_plan

if TYPE_CHECKING:
    from kvfold_scheduler.geometry import CacheGeometry
    from kvfold_server.engine.options import EngineOptions
    from kvfold_server.models.patched import PatchedModel
    from kvfold_server.sharing.plan_file import PlanFile


class EngineOptionsError(ValueError):
    """An option asks for something that is not there; the message says which, in words for an operator."""


def build_engine(options: EngineOptions, stages: Stages | None = None) -> EngineCore:
    """Loads the model and builds its engine. Takes seconds; the first time, a model may be fetched and converted.

    Tells `stages` where it is. Raises EngineOptionsError, ModelSourceError, UnsupportedModelError or
    PlanMismatchError, all with words for an operator.
    """
    stages = stages or Stages()
    stages.begin("model")
    if options.dtype not in DTYPES:
        raise EngineOptionsError(f"dtype is one of {', '.join(DTYPES)}, not {options.dtype}")
    if options.attention_backend is not None and options.attention_backend not in BACKENDS:
        names = ", ".join(BACKENDS)
        raise EngineOptionsError(f"the attention backend is one of {names}, not {options.attention_backend}")
    device = choose_device(options.device)
    if options.weights not in WEIGHT_FORMS:
        raise EngineOptionsError(f"weights is one of {', '.join(WEIGHT_FORMS)}, not {options.weights}")
    int8_weights = options.weights == "int8"
    if int8_weights and (reason := int8_refusal(device.type)) is not None:
        raise EngineOptionsError(reason)
    options = dataclasses.replace(options, attention_backend=options.attention_backend or best_backend(device))
    folder = resolve_model(options.model)
    stages.begin("weights")
    loaded = load_model(folder, DTYPES[options.dtype], device)
    stages.begin("probe and check")
    ops = LayerOps() if options.attention_backend == NativeBackend.name else None
    model = patch_model(loaded, ops, int8_weights=int8_weights)
    stages.begin("plan")
    plan_file = find_plan(options.plan, folder, model.geometry)
    stages.begin("pool")
    if plan_file is None:
        return assemble_engine(model, folder, SharingPlan(model.geometry.layer_count), options)
    return assemble_engine(
        model,
        folder,
        plan_file.plan,
        options,
        plan_strategy=plan_file.search.strategy,
        plan_quality=plan_file.depth_quality,
    )


def find_plan(path: str | None, folder: Path, geometry: CacheGeometry) -> PlanFile | None:
    """The named plan, else the one that ships for the model, if there is one. Raises PlanFileError or
    PlanMismatchError."""
    identity = fingerprint(folder)
    return load_plan(Path(path), identity, geometry) if path is not None else find_shipped_plan(identity)


def assemble_engine(
    model: PatchedModel,
    folder: Path,
    plan: SharingPlan,
    options: EngineOptions,
    *,
    plan_strategy: str = "",
    plan_quality: tuple[DepthQuality, ...] = (),
) -> EngineCore:
    """An engine for a model that is loaded already, with a pool of its own. An empty plan has depth 0 only."""
    geometry = model.geometry
    blocks_at_most = options.max_running * geometry.blocks_for(model.context_length) * geometry.layer_count
    full_bytes = blocks_at_most * geometry.block_bytes
    kv_bytes = options.kv_memory_bytes or min(full_bytes, default_kv_bytes(model.device))
    block_count = kv_bytes // geometry.block_bytes
    if block_count < geometry.layer_count:
        raise EngineOptionsError(
            f"a KV memory of {kv_bytes:,} bytes holds {block_count} layer-blocks, "
            f"and each of the {geometry.layer_count} layers needs at least one"
        )
    limits = SchedulerLimits(options.max_running, options.max_waiting, options.step_tokens)
    scheduler = Scheduler(geometry, plan, block_count, model.context_length, limits)
    arena = Arena(geometry, block_count, model.dtype, model.device)
    tables = torch.frombuffer(scheduler.tables.entries, dtype=torch.int32).view(
        limits.max_running, geometry.layer_count, scheduler.tables.blocks_per_layer
    )
    try:
        backend = BACKENDS[options.attention_backend or best_backend(model.device)](arena, tables)
    except BackendUnavailableError as error:
        raise EngineOptionsError(str(error)) from error
    model.attach(backend)
    info = ModelInfo(
        architecture=model.architecture,
        dtype=options.dtype,
        weights=options.weight_dtype,
        context_length=model.context_length,
        vocabulary_size=model.vocabulary_size,
        geometry=geometry,
        plan=plan,
        plan_strategy=plan_strategy,
        plan_quality=plan_quality,
        attention_backend=backend.name,
        eos_token_ids=model.eos_token_ids,
        tokenizer_folder=folder,
        pool_bytes=arena.byte_count,
    )
    return EngineCore(info, scheduler, Runner(model, plan, model.device))


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or the best at hand. Raises EngineOptionsError if it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EngineOptionsError(f"{name} is not a device: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EngineOptionsError("no CUDA device is at hand")
    return device
