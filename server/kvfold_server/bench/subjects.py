"""What a benchmark can measure: the engine in this process, transformers in this process, a server beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import AutoConfig

from kvfold_server.bench.comparison import Prompts, Subject
from kvfold_server.bench.engine_run import run_engine
from kvfold_server.bench.grpc_load import run_grpc
from kvfold_server.bench.server_process import running_server
from kvfold_server.bench.transformers_run import run_generate
from kvfold_server.engine.factory import build_engine, choose_device
from kvfold_server.models.loading import DTYPES, load_model
from kvfold_server.models.source import resolve_model

if TYPE_CHECKING:
    from contextlib import ExitStack

    from kvfold_server.bench.measurement import Measurement, Workload
    from kvfold_server.engine.options import EngineOptions


def engine_subject(options: EngineOptions, _stack: ExitStack) -> Subject:
    """The engine alone."""
    engine = build_engine(options)

    def run(workload: Workload, prompts: Prompts) -> Measurement:
        return run_engine(engine, workload, prompts, "kvfold-engine")

    return Subject(run, engine.info.vocabulary_size)


def generate_subject(options: EngineOptions, _stack: ExitStack) -> Subject:
    """transformers' `generate` with its default attention, on the same weights in the same data type."""
    model = load_model(resolve_model(options.model), DTYPES[options.dtype], choose_device(options.device))
    model.set_attn_implementation("sdpa")

    def run(workload: Workload, prompts: Prompts) -> Measurement:
        return run_generate(model, workload, prompts)

    return Subject(run, model.config.vocab_size)


def grpc_subject(options: EngineOptions, stack: ExitStack) -> Subject:
    """A server with an engine of the same options, streamed from over gRPC."""
    arguments = ["--model", f"bench={options.model}", "--dtype", options.dtype, "--weights", options.weights]
    for flag, value in (
        ("--device", options.device),
        ("--attention-backend", options.attention_backend),
        ("--plan", options.plan),
        ("--kv-memory", options.kv_memory_bytes),
    ):
        if value is not None:
            arguments += [flag, str(value)]
    server = stack.enter_context(running_server(arguments))

    def run(workload: Workload, prompts: Prompts) -> Measurement:
        return run_grpc(server, "bench", workload, prompts)

    vocabulary_size: int = AutoConfig.from_pretrained(resolve_model(options.model), local_files_only=True).vocab_size
    return Subject(run, vocabulary_size)
