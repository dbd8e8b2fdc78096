from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold_server.text.detokenizer import REPLACEMENT, Detokenizer

if TYPE_CHECKING:
    import tokenizers

    from kvfold_server.text.tokenizer import Tokenizer

SENTENCES = [
    "Hello world, the lazy dog jumps.",
    "Wörter: äöüß und 日本語のテキスト",
    "👩‍👩‍👧‍👦 family, flag 🇩🇪, and 🎉🎉 again",
    "  two  leading spaces and\nnew\n\nlines\t.",
    "\U0001d518\U0001d52b\U0001d526 ﷽ क्षि",
]


def pieces(tokenizer: Tokenizer, answer: list[int], prompt: list[int] | None = None, skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt or [], skip_special_tokens=skip)
    return [*(detokenizer.add(token) for token in answer), detokenizer.finish()]


@pytest.mark.parametrize("sentence", SENTENCES)
def test_pieces_join_to_the_text_of_the_whole_answer(
    tokenizer: Tokenizer, backend: tokenizers.Tokenizer, sentence: str
) -> None:
    answer = backend.encode(sentence).ids
    assert "".join(pieces(tokenizer, answer)) == backend.decode(answer)


@pytest.mark.parametrize("sentence", SENTENCES)
@pytest.mark.parametrize("split", [1, 2, 3, 5, 8])
def test_an_answer_continues_its_prompt_with_the_right_space(
    tokenizer: Tokenizer, backend: tokenizers.Tokenizer, sentence: str, split: int
) -> None:
    tokens = backend.encode(sentence).ids
    prompt, answer = tokens[:split], tokens[split:]
    # A character that the prompt began and the answer completes belongs to the answer.
    texts = [backend.decode(prompt[: len(prompt) - count]) for count in range(4)]
    before = next(text for text in texts if not text.endswith(REPLACEMENT))
    assert before + "".join(pieces(tokenizer, answer, prompt)) == backend.decode(tokens)


@pytest.mark.parametrize("sentence", SENTENCES)
def test_no_piece_splits_a_character(tokenizer: Tokenizer, backend: tokenizers.Tokenizer, sentence: str) -> None:
    answer = backend.encode(sentence).ids
    assert not any(REPLACEMENT in piece for piece in pieces(tokenizer, answer))


def test_special_tokens_leave_no_trace_when_they_are_skipped(
    tokenizer: Tokenizer, backend: tokenizers.Tokenizer
) -> None:
    one, two = backend.encode("Hello world").ids, backend.encode("the dog").ids
    answer = [*one, *tokenizer.special_ids, *two]
    assert "".join(pieces(tokenizer, answer)) == backend.decode(one + two, skip_special_tokens=True)


def test_special_tokens_are_text_when_they_are_not_skipped(byte_level_tokenizer: Tokenizer) -> None:
    answer = byte_level_tokenizer.encode("Hello<|im_end|>world", add_special_tokens=False)
    assert "".join(pieces(byte_level_tokenizer, answer, skip=False)) == "Hello<|im_end|>world"
    assert "".join(pieces(byte_level_tokenizer, answer, skip=True)) == "Helloworld"


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_tokens_of_a_byte_level_vocabulary_decode_as_a_whole_does(
    byte_level_tokenizer: Tokenizer, data: st.DataObject
) -> None:
    answer = data.draw(st.lists(st.integers(0, 399), max_size=60))
    whole = byte_level_tokenizer.decode(answer, skip_special_tokens=True)
    assert "".join(pieces(byte_level_tokenizer, answer)) == whole


def test_bytes_that_form_no_character_are_not_held_for_ever(byte_level_tokenizer: Tokenizer) -> None:
    token = byte_level_tokenizer.encode("🎉", add_special_tokens=False)[0]
    parts = pieces(byte_level_tokenizer, [token] * 100)
    assert "".join(parts) == byte_level_tokenizer.decode([token] * 100, skip_special_tokens=True)
    assert sum(map(bool, parts)) > 10


def test_ids_without_a_token_have_no_text(tokenizer: Tokenizer, backend: tokenizers.Tokenizer) -> None:
    hello, world = backend.encode("Hello").ids, backend.encode("world").ids
    unknown = backend.get_vocab_size() + 10
    text = "".join(pieces(tokenizer, [*hello, *[unknown] * 20, *world]))
    assert text == backend.decode(hello + world)


def test_the_work_of_a_token_does_not_grow_with_the_answer(byte_level_tokenizer: Tokenizer) -> None:
    rng = random.Random(1)  # noqa: S311
    tokens = [rng.randrange(4, 400) for _ in range(20_000)]
    detokenizer = Detokenizer(byte_level_tokenizer, [])
    seconds = []
    for start in range(0, 20_000, 5_000):
        began = time.perf_counter()
        for token in tokens[start : start + 5_000]:
            detokenizer.add(token)
        seconds.append(time.perf_counter() - began)
    assert seconds[-1] < 5 * seconds[0]
