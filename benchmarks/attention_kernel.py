"""Attention alone, against what the memory and torch's own attention can do.

    python benchmarks/attention_kernel.py [--json FILE] [--repeats 7] [--path avx512_bf16] [--shapes 9/3/64]

Decode: KV bytes read per second, beside a plain read of the same memory; each repeat measures both, one after the
other, on the same threads: torch's maximum over all pages in order, which was seen to be as fast as hand-written loops
over several streams (within 4%; where huge pages are off, those are 20% faster). The bytes counted are those of the K
and V rows of each sequence. The step cycles through the pages of so many layers that nothing stays in cache. The pages
lie as a pool hands them out to prompts that are computed in chunks of 512 tokens (`prompts`), to sequences that grow
together, one page a layer at a time (`grown`), or in any order, as in a pool that has served for long (`random`).
Scattered pages cannot be read as fast as memory in order, whatever reads them. Prefill: time of one chunk at
the end of a context, beside torch's scaled_dot_product_attention on contiguous tensors of the same shape. Medians over
the repeats, and the spread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from attention_setting import DTYPES, Setting, make_batch, make_settings
from kvfold_server.kv.arena import Arena
from kvfold_server.kv.backends.base import AttentionCall
from kvfold_server.kv.backends.native import NativeBackend
from kvfold_server.kv.native.library import SimdPath

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

POOL_BYTES = 512 << 20
"""Pages that a decode measurement cycles through: many times the last-level cache of the machines this runs on."""

ORDERS = ("prompts", "grown", "random")

CHUNK_PAGES = 32
"""Pages that a layer of a prompt takes at once: 512 tokens at 16 a page."""


@dataclass(frozen=True, slots=True)
class DecodeFigure:
    """GB/s are 10^9 bytes a second; `ratio` is attention over plain reading, within one repeat."""

    shape: str
    dtype: str
    order: str
    batch: int
    context: int
    layers: int
    microseconds_per_layer: float
    attention_gb_s: float
    read_gb_s: float
    ratio_median: float
    ratio_min: float
    ratio_max: float


@dataclass(frozen=True, slots=True)
class PrefillFigure:
    """Milliseconds for one layer; `ratio` is torch's time over ours, within one repeat."""

    shape: str
    dtype: str
    chunk: int
    context: int
    attention_ms: float
    torch_ms: float
    ratio_median: float
    ratio_min: float
    ratio_max: float


def make_backend(
    setting: Setting, path: SimdPath | None, order: str, *, batch: int, context: int, layers: int
) -> NativeBackend:
    """A backend whose tables hold `context` tokens of `batch` sequences at each layer; `path`: None is the best."""
    geometry = setting.geometry(layers)
    blocks = geometry.blocks_for(context)
    arena = Arena(geometry, batch * layers * blocks, setting.dtype, torch.device("cpu"))
    arena.rows.normal_()
    if order == "random":
        pages = torch.randperm(arena.block_count).view(batch, layers, blocks)
    else:
        # In a fresh pool, the pages of one allocation lie side by side, the last one first.
        run = min(CHUNK_PAGES, blocks) if order == "prompts" else 1
        runs = torch.arange(arena.block_count).view(blocks // run, batch, layers, run).flip(3)
        pages = runs.permute(1, 2, 0, 3).reshape(batch, layers, blocks)
    return NativeBackend(arena, (1 + pages).int().contiguous(), path=path)


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure_decode(
    setting: Setting, path: SimdPath | None, order: str, *, batch: int, context: int, repeats: int
) -> DecodeFigure:
    """Decode of `batch` sequences over all layers of a pool."""
    layer_bytes = batch * context * setting.token_bytes
    layers = max(2, -(-POOL_BYTES // layer_bytes))
    backend = make_backend(setting, path, order, batch=batch, context=context, layers=layers)
    backend.begin(make_batch(batch, context, 1, layers))
    query = torch.randn(batch, setting.heads, setting.dim).to(setting.dtype)
    words = backend.arena.rows.view(torch.int32)

    def attend() -> None:
        for layer in range(layers):
            backend.attend(AttentionCall(layer, setting.dim**-0.5), query)

    attend()
    attention, reading = [], []
    for _ in range(repeats):
        attention.append(layers * layer_bytes / seconds(attend) / 1e9)
        reading.append(words.nbytes / seconds(words.max) / 1e9)
    ratios = [ours / plain for ours, plain in zip(attention, reading, strict=True)]
    rate = statistics.median(attention)
    return DecodeFigure(
        shape=setting.shape,
        dtype=setting.dtype_name,
        order=order,
        batch=batch,
        context=context,
        layers=layers,
        microseconds_per_layer=layer_bytes / rate / 1e3,
        attention_gb_s=rate,
        read_gb_s=statistics.median(reading),
        ratio_median=statistics.median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
    )


def measure_prefill(setting: Setting, path: SimdPath | None, chunk: int, context: int, repeats: int) -> PrefillFigure:
    """One sequence's chunk at the end of its context, in turn with torch on the same amount of work."""
    backend = make_backend(setting, path, "grown", batch=1, context=context, layers=2)
    backend.begin(make_batch(1, context, chunk, 2))
    query = torch.randn(chunk, setting.heads, setting.dim).to(setting.dtype)
    dense_query = query.transpose(0, 1)[None].contiguous()
    keys, values = torch.randn(2, 1, setting.kv_heads, context, setting.dim).to(setting.dtype)
    # torch's causal mask starts at the first key; a chunk at the end of a longer context needs a mask of its own.
    mask = None if chunk == context else torch.ones(chunk, context, dtype=torch.bool).tril(context - chunk)

    def dense() -> None:
        torch.nn.functional.scaled_dot_product_attention(
            dense_query, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )

    def ours() -> None:
        backend.attend(AttentionCall(1, setting.dim**-0.5), query)

    ours()
    dense()
    pairs = [(seconds(ours), seconds(dense)) for _ in range(repeats)]
    ratios = [theirs / mine for mine, theirs in pairs]
    return PrefillFigure(
        shape=setting.shape,
        dtype=setting.dtype_name,
        chunk=chunk,
        context=context,
        attention_ms=1e3 * statistics.median(mine for mine, _ in pairs),
        torch_ms=1e3 * statistics.median(theirs for _, theirs in pairs),
        ratio_median=statistics.median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--shapes", nargs="+", default=["9/3/64", "32/8/128"], help="heads/KV heads/head dimension")
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=DTYPES)
    parser.add_argument("--orders", nargs="+", default=ORDERS, choices=ORDERS)
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 64])
    parser.add_argument("--contexts", nargs="*", type=int, default=[1024, 8192])
    parser.add_argument("--chunks", nargs="*", type=int, default=[128, 512])
    parser.add_argument("--path", type=lambda name: SimdPath[name.upper()], help="force an instruction set")
    return parser.parse_args()


def main() -> int:
    """Measures, prints two tables, writes JSON."""
    arguments = parse_arguments()
    settings = make_settings(arguments.shapes, arguments.dtypes)
    sys.stdout.write(f"threads: {torch.get_num_threads()}\n")

    decodes: list[DecodeFigure] = []
    for setting, order, batch, context in product(settings, arguments.orders, arguments.batches, arguments.contexts):
        decodes.append(
            measure_decode(setting, arguments.path, order, batch=batch, context=context, repeats=arguments.repeats)
        )
        print_row(decodes)

    prefills: list[PrefillFigure] = []
    for setting, chunk in product(settings, arguments.chunks):
        for context in sorted({chunk, 2048}):
            prefills.append(measure_prefill(setting, arguments.path, chunk, context, arguments.repeats))
            print_row(prefills)

    if arguments.json is not None:
        document = {
            "decode": [asdict(figure) for figure in decodes],
            "prefill": [asdict(figure) for figure in prefills],
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0


def print_row(figures: Sequence[DecodeFigure | PrefillFigure]) -> None:
    """Prints the last figure as a line of a table; the first one has the heading above it."""
    figure = asdict(figures[-1])
    if len(figures) == 1:
        sys.stdout.write("\n" + "  ".join(name.rjust(9) for name in figure) + "\n")
    cells = (f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in figure.values())
    sys.stdout.write("  ".join(cell.rjust(max(9, len(name))) for name, cell in zip(figure, cells, strict=True)) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
