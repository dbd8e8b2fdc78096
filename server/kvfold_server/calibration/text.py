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
import tempfile
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save

from kvfold_server.calibration.starts import chat_questions, prose_openings
from kvfold_server.generation.draft import ChatMessage
from kvfold_server.text.chat import ChatTemplate
from kvfold_server.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedModel

TEMPERATURES = (1.0,)
"""Sequences take them in turn. Text at the model's own distribution ranked plans most like text by people."""

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


def text_from_file(path: Path, tokenizer: Tokenizer, sequences: int, tokens: int) -> torch.Tensor:
    """The first `sequences` windows of `tokens` tokens of a UTF-8 file, as it is: int64 [sequences, tokens].

    Raises CalibrationTextError if the file cannot be read or is too short.
    """
    try:
        ids = tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False)
    except OSError as error:
        raise CalibrationTextError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CalibrationTextError(f"{path} is not UTF-8 text (byte {error.start})") from error
    if len(ids) < sequences * tokens:
        raise CalibrationTextError(f"{path} holds {len(ids)} tokens; {sequences} x {tokens} are needed")
    return torch.tensor(ids[: sequences * tokens]).view(sequences, tokens)


def generated_text(
    model: PreTrainedModel,
    folder: Path,
    parameters: GeneratedTextParameters,
    *,
    cache_file: Path | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> torch.Tensor:
    """Sequences that `model` writes: int64 [sequences, tokens], the same for the same model and parameters.

    `folder` is the model's, with its tokenizer and chat template. The text is kept in `cache_file` (see
    `generated_text_name`) and read from there the next time. `progress` is told the number of tokens per sequence so
    far. Raises TokenizerError or ChatTemplateError.
    """
    if cache_file is not None and cache_file.exists():
        progress(parameters.tokens)
        return load_file(cache_file)["tokens"]
    starts = _starts(folder, random.Random(parameters.seed))  # noqa: S311 - text, not secrets
    tokens = write_text(model, starts, _end_tokens(model), parameters, progress)
    if cache_file is not None:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        # Under a name of its own until it is whole, as another calibration may be writing the same text.
        with tempfile.NamedTemporaryFile(dir=cache_file.parent, delete=False) as partial:
            partial.write(save({"tokens": tokens}))
        Path(partial.name).rename(cache_file)
    return tokens


def generated_text_name(model_hash: str, dtype: torch.dtype, parameters: GeneratedTextParameters) -> str:
    """A file name for generated text, by everything that determines it. `model_hash` identifies the weights."""
    key = json.dumps([model_hash, str(dtype), asdict(parameters)], sort_keys=True)
    return f"text-{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"


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


def _end_tokens(model: PreTrainedModel) -> frozenset[int]:
    ends: set[int] = set()
    for config in (model.config, model.generation_config):
        end = getattr(config, "eos_token_id", None)
        ends.update(end if isinstance(end, list) else [] if end is None else [end])
    return frozenset(ends)


def _starts(folder: Path, order: random.Random) -> Iterator[Sequence[int]]:
    """Endless starts; chat turns and prose in turn where the model has a chat template."""
    tokenizer = Tokenizer.load(folder)
    template = ChatTemplate.load(folder, tokenizer.special_tokens)
    questions, openings = chat_questions(order), prose_openings(order)
    while True:
        if template is not None:
            yield tokenizer.encode(template.render([ChatMessage("user", next(questions))]), add_special_tokens=False)
        yield tokenizer.encode(next(openings), add_special_tokens=True)
