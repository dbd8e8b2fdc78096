"""Calibration text: token sequences of one length, written by the model itself or cut from a file.

A model's own text needs no data set, and it is what the cache of a serving model holds. Sequences begin with varied
starts (chat turns where the model has a chat template, openings of prose) and go on with another start whenever the
model ends one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections import deque
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from kvfold_server.calibration.starts import chat_questions, prose_openings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEMPERATURES = (0.7, 0.85, 1.0)
"""From what a careful service uses to the model's own distribution; sequences take them in turn."""

TOP_P = 0.95
"""Cuts the tail that small models stumble over: one odd token makes nonsense of all that follows."""


class CalibrationTextError(ValueError):
    """The text cannot serve for calibration; the message says why."""


@dataclass(frozen=True, slots=True)
class GeneratedTextParameters:
    """Everything beside the model that determines generated text."""

    sequences: int
    tokens: int
    seed: int
    temperatures: tuple[float, ...] = TEMPERATURES
    top_p: float = TOP_P


def text_from_file(path: Path, tokenizer: PreTrainedTokenizerBase, sequences: int, tokens: int) -> torch.Tensor:
    """The first `sequences` windows of `tokens` tokens of a UTF-8 file: int64 [sequences, tokens].

    Raises CalibrationTextError if the file cannot be read or is too short.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationTextError(f"cannot read {path}: {error}") from error
    # A prefix long enough for the windows: encoding megabytes to use a few thousand tokens takes seconds.
    ids: list[int] = []
    for characters in (sequences * tokens * 8, len(text)):
        ids = tokenizer(text[:characters], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) > sequences * tokens:
            break
    if len(ids) < sequences * tokens:
        raise CalibrationTextError(f"{path} holds {len(ids)} tokens; {sequences} x {tokens} are needed")
    return torch.tensor(ids[: sequences * tokens]).view(sequences, tokens)


def generated_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    parameters: GeneratedTextParameters,
    *,
    cache_folder: Path | None = None,
    model_key: str = "",
    progress: Callable[[int], None] = lambda _: None,
) -> torch.Tensor:
    """Sequences that `model` writes: int64 [sequences, tokens], the same for the same model and parameters.

    With a `cache_folder`, the text is kept there under `model_key` (a hash of the model) and the parameters, and read
    from there the next time. `progress` is told the number of tokens per sequence so far.
    """
    file = None
    if cache_folder is not None:
        key = json.dumps([model_key, str(model.dtype), asdict(parameters)], sort_keys=True)
        file = cache_folder / f"text-{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
        if file.exists():
            progress(parameters.tokens)
            return load_file(file)["tokens"]
    starts = _starts(tokenizer, random.Random(parameters.seed))  # noqa: S311 - text, not secrets
    tokens = write_text(model, starts, _end_tokens(model, tokenizer), parameters, progress)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        save_file({"tokens": tokens}, partial)
        partial.rename(file)
    return tokens


def write_text(
    model: PreTrainedModel,
    starts: Iterator[Sequence[int]],
    end_tokens: frozenset[int],
    parameters: GeneratedTextParameters,
    progress: Callable[[int], None] = lambda _: None,
) -> torch.Tensor:
    """Samples all sequences side by side, one token a step. A row whose model ends its text goes on with the next
    start."""
    generator = torch.Generator().manual_seed(parameters.seed)
    rows = parameters.sequences
    pending = [deque(next(starts)) for _ in range(rows)]
    temperatures = torch.tensor(list(itertools.islice(itertools.cycle(parameters.temperatures), rows)))[:, None]
    written: list[torch.Tensor] = []
    cache: Any = None
    sampled: list[int] = []
    with torch.inference_mode():
        for step in range(parameters.tokens):
            for row, token in enumerate(sampled):
                if not pending[row] and token in end_tokens:
                    pending[row].extend((token, *next(starts)))
            column = torch.tensor([queue.popleft() if queue else sampled[row] for row, queue in enumerate(pending)])
            written.append(column)
            if step + 1 == parameters.tokens:
                break
            output = model(
                input_ids=column[:, None].to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            cache = output.past_key_values
            sampled = _sample(output.logits[:, -1].float().cpu(), temperatures, parameters.top_p, generator)
            progress(step + 1)
    progress(parameters.tokens)
    return torch.stack(written, dim=1)


def _sample(logits: torch.Tensor, temperatures: torch.Tensor, top_p: float, generator: torch.Generator) -> list[int]:
    probabilities, tokens = (logits / temperatures).softmax(dim=-1).topk(min(1024, logits.shape[-1]), dim=-1)
    # A token stays if the mass before it is below top_p, so at least one always does.
    probabilities[probabilities.cumsum(dim=-1) - probabilities >= top_p] = 0.0
    choice = torch.multinomial(probabilities, 1, generator=generator)
    return [int(token) for token in tokens.gather(1, choice)[:, 0]]


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    ends: set[int] = set()
    for end in (tokenizer.eos_token_id, model.generation_config.eos_token_id if model.generation_config else None):
        if end is not None:
            ends.update(end if isinstance(end, list) else [end])
    return frozenset(ends)


def _starts(tokenizer: PreTrainedTokenizerBase, order: random.Random) -> Iterator[Sequence[int]]:
    """Endless starts; chat turns and prose in turn where the model has a chat template."""
    questions, openings = chat_questions(order), prose_openings(order)
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    # Where the start token opens a chat turn, prose begins without one.
    prose_first = [] if tokenizer.chat_template and tokenizer.bos_token in str(tokenizer.chat_template) else first
    while True:
        if tokenizer.chat_template:
            turn = [{"role": "user", "content": next(questions)}]
            text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            yield tokenizer(text, add_special_tokens=False)["input_ids"]
        yield [*prose_first, *tokenizer(next(openings), add_special_tokens=False)["input_ids"]]
