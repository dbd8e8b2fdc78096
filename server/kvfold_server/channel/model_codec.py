"""The description of a loaded model, as the engine sends it once."""

from __future__ import annotations

from pathlib import Path

from kvfold.engine.v1 import engine_pb2
from kvfold_scheduler.geometry import CacheGeometry, LayerKind
from kvfold_scheduler.sharing import SharingEntry, SharingPlan
from kvfold_server.generation.model_info import DepthQuality, ModelInfo
from kvfold_server.wire import describe_model


def encode_ready(info: ModelInfo) -> engine_pb2.Ready:
    """The message that says an engine has loaded this model."""
    return engine_pb2.Ready(
        model=describe_model(info),
        layer_ropes=[kind.rope for kind in info.geometry.layers],
        value_bytes=info.geometry.value_bytes,
        tokenizer_folder=str(info.tokenizer_folder),
        eos_token_ids=sorted(info.eos_token_ids),
        pool_bytes=info.pool_bytes,
        block_bytes=info.geometry.block_bytes,
        tokens_per_block=info.geometry.tokens_per_block,
    )


def decode_ready(ready: engine_pb2.Ready) -> ModelInfo:
    """Reads what `encode_ready` wrote."""
    model = ready.model
    layers = tuple(
        LayerKind(layer.window or None, rope, layer.kv_heads, layer.key_dim, layer.value_dim)
        for layer, rope in zip(model.layers, ready.layer_ropes, strict=True)
    )
    entries = tuple(SharingEntry(entry.sharer, entry.owner) for entry in model.plan.entries)
    return ModelInfo(
        architecture=model.architecture,
        dtype=model.dtype,
        weights=model.weights,
        context_length=model.context_length,
        vocabulary_size=model.vocabulary_size,
        geometry=CacheGeometry(layers, ready.value_bytes),
        plan=SharingPlan(len(layers), entries),
        plan_strategy=model.plan.strategy,
        plan_quality=tuple(
            DepthQuality(depth.shared_layers, depth.kv_bytes_per_token, depth.perplexity, depth.kl, depth.quality_cost)
            for depth in model.plan.depths
        ),
        attention_backend=model.attention_backend,
        eos_token_ids=frozenset(ready.eos_token_ids),
        tokenizer_folder=Path(ready.tokenizer_folder),
        pool_bytes=ready.pool_bytes,
    )
