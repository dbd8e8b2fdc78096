"""Triton attention on a GPU: first whether it is right, then how fast, against the memory and torch's own attention.

    python benchmarks/gpu_attention.py [--json FILE] [--check-only] [--shapes 32/8/128] [--dtypes bf16]

Checks: every kind of attention against the reference backend, with any wait for the GPU an error. Decode: KV bytes read
per second, beside a plain copy (bytes read and written), and the time of scaled_dot_product_attention on K and V that
were gathered before. Prefill: one chunk at the end of a context, beside the same function. Steps go through so many
layers that nothing stays in the GPU's cache. Medians over repeats that take each side in turn. `host_us` is what a
layer costs the host, `begin_ms` what a step does: the GPU waits for them only if it has nothing left to do.

Ends with code 1 if a check fails, with 2 if there is no GPU; checks alone also run under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from attention_setting import DTYPES, Setting, make_batch, make_settings
from gpu_checks import Check, run_check, variants
from kvfold_server.kv.arena import Arena
from kvfold_server.kv.backends.base import AttentionCall
from kvfold_server.kv.backends.triton import TritonBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from _typeshed import DataclassInstance

POOL_BYTES = 512 << 20
"""KV that a measurement goes through: several times the cache of any GPU."""

COPIED_BYTES = 1 << 30

GPU_CHECK = Check("plain", 0, 0, 0, torch.bfloat16, (1, 700, 4100, 33, 5000, 300), (1, 1, 1, 33, 200, 2))
INTERPRETED_CHECK = Check("plain", 0, 0, 0, torch.bfloat16, (1, 300, 33), (1, 1, 33))


@dataclass(frozen=True, slots=True)
class Figure:
    """One measurement; times are of one layer. GB/s are 10^9 bytes a second; ratios are above 1 if triton is faster.

    `kv_gb_s` counts each byte of KV once; `of_copy` is that over the rate of the copy.
    """

    shape: str
    dtype: str
    batch: int
    context: int
    chunk: int
    triton_us: float
    sdpa_us: float
    of_sdpa: float
    kv_gb_s: float
    copy_gb_s: float
    of_copy: float
    tflop_s: float
    host_us: float
    begin_ms: float


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """Time of one call on the device; on CPU, wall time."""
    if device.type != "cuda":
        start = time.perf_counter()
        action()
        return time.perf_counter() - start
    event: Callable[..., torch.cuda.Event] = torch.cuda.Event  # its constructor has no types of its own
    begin, end = event(enable_timing=True), event(enable_timing=True)
    begin.record()
    action()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def measure(setting: Setting, batch: int, context: int, chunk: int, *, repeats: int, device: torch.device) -> Figure:
    """`chunk` queries at the end of each of `batch` contexts, over all layers of a pool."""
    layer_bytes = batch * context * setting.token_bytes
    layers = max(2, -(-POOL_BYTES // layer_bytes)) if device.type == "cuda" else 2
    geometry = setting.geometry(layers)
    blocks = geometry.blocks_for(context)
    arena = Arena(geometry, batch * layers * blocks, setting.dtype, device)
    arena.rows.normal_()
    tables = 1 + torch.randperm(arena.block_count).int().view(batch, layers, blocks)
    backend = TritonBackend(arena, tables)
    step = make_batch(batch, context, chunk, layers)
    step = replace(step, positions=step.positions.to(device))
    query = torch.randn(step.token_count, setting.heads, setting.dim, device=device).to(setting.dtype)
    dense_query = query.view(batch, chunk, setting.heads, setting.dim).transpose(1, 2).contiguous()
    gathered = torch.randn(layers, 2, batch, setting.kv_heads, context, setting.dim, dtype=setting.dtype, device=device)
    source = torch.empty(COPIED_BYTES if device.type == "cuda" else 1 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def ours() -> None:
        for layer in range(layers):
            backend.attend(AttentionCall(layer, setting.dim**-0.5), query)

    def dense() -> None:
        for keys, values in gathered:
            mask = causal_lower_right(chunk, context) if chunk > 1 else None
            scaled_dot_product_attention(dense_query, keys, values, attn_mask=mask, enable_gqa=True)

    begin_seconds, host_seconds, rows = [], [], []
    for repeat in range(repeats + 1):
        began = time.perf_counter()
        backend.begin(step)
        begin_seconds.append(time.perf_counter() - began)
        launched = 0.0

        def launch() -> None:
            nonlocal launched
            start = time.perf_counter()
            ours()
            launched = time.perf_counter() - start

        row = (seconds(launch, device), seconds(dense, device), seconds(lambda: target.copy_(source), device))
        if repeat > 0:  # the first compiles
            rows.append(row)
            host_seconds.append(launched)
    rates = [(layers * layer_bytes / mine, 2 * source.nbytes / copy) for mine, _, copy in rows]
    # Two products of 2 FLOP an element, for each query and each key that it sees.
    operations = 4 * setting.heads * setting.dim * batch * layers * (chunk * context - chunk * (chunk - 1) // 2)
    return Figure(
        shape=setting.shape,
        dtype=setting.dtype_name,
        batch=batch,
        context=context,
        chunk=chunk,
        triton_us=1e6 * statistics.median(mine for mine, _, _ in rows) / layers,
        sdpa_us=1e6 * statistics.median(theirs for _, theirs, _ in rows) / layers,
        of_sdpa=statistics.median(theirs / mine for mine, theirs, _ in rows),
        kv_gb_s=statistics.median(kv for kv, _ in rates) / 1e9,
        copy_gb_s=statistics.median(copy for _, copy in rates) / 1e9,
        of_copy=statistics.median(kv / copy for kv, copy in rates),
        tflop_s=operations / statistics.median(mine for mine, _, _ in rows) / 1e12,
        host_us=1e6 * statistics.median(host_seconds) / layers,
        begin_ms=1e3 * statistics.median(begin_seconds[1:]),
    )


def fits(setting: Setting, batch: int, context: int) -> bool:
    """Whether the GPU holds the pool and the gathered copy of it, with a little room for the rest."""
    needed = 2 * max(POOL_BYTES, 2 * batch * context * setting.token_bytes) + 4 * COPIED_BYTES
    return needed < torch.cuda.mem_get_info()[0]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write checks and figures here")
    parser.add_argument("--check-only", action="store_true", help="measure nothing")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--shapes", nargs="+", default=["9/3/64", "32/8/128"], help="heads/KV heads/head dimension")
    parser.add_argument(
        "--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES, help="to check; measured: the first"
    )
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--contexts", nargs="*", type=int, default=[1024, 4096, 32768])
    parser.add_argument("--chunks", nargs="*", type=int, default=[512])
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks, measures, prints tables, writes JSON."""
    options = parse_arguments(arguments)
    interpreted = options.check_only and os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and not interpreted:
        sys.stderr.write("gpu_attention: there is no CUDA device; checks alone run with TRITON_INTERPRET=1 too\n")
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = make_settings(options.shapes, options.dtypes)

    base = GPU_CHECK if device.type == "cuda" else INTERPRETED_CHECK
    checks = []
    for setting in settings:
        shaped = replace(base, heads=setting.heads, kv_heads=setting.kv_heads, dim=setting.dim, dtype=setting.dtype)
        for check in variants(shaped):
            checks.append(run_check(check, device))
            print_row(checks)
    passed = all(check.passed for check in checks)

    figures: list[Figure] = []
    if passed and not options.check_only:
        measured = [setting for setting in settings if setting.dtype_name == options.dtypes[0]]
        decodes = list(product(options.batches, options.contexts, [1]))
        prefills = [
            (1, max(chunk, context), chunk) for chunk, context in product(options.chunks, [0, *options.contexts])
        ]
        for setting, (batch, context, chunk) in product(measured, decodes + prefills):
            if fits(setting, batch, context):
                figures.append(measure(setting, batch, context, chunk, repeats=options.repeats, device=device))
                print_row(figures)
            else:
                sys.stdout.write(f"left out for lack of memory: {setting.shape}, batch {batch}, context {context}\n")

    if options.json is not None:
        document = {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu, interpreted",
            "torch": torch.__version__,
            "triton": version("triton"),
            "checks": [asdict(check) for check in checks],
            "figures": [asdict(figure) for figure in figures],
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0 if passed else 1


def print_row(rows: Sequence[DataclassInstance]) -> None:
    """Prints the last one as a line of a table; the first one has the heading above it."""
    row = asdict(rows[-1])
    if len(rows) == 1:
        sys.stdout.write("\n" + "  ".join(name.rjust(9) for name in row) + "\n")
    cells = (f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row.values())
    sys.stdout.write("  ".join(cell.rjust(max(9, len(name))) for name, cell in zip(row, cells, strict=True)) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
