from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from kvfold_server.text.byte_detokenizer import ByteDetokenizer
from kvfold_server.text.byte_pieces import BYTES
from kvfold_server.text.detokenizer import make_detokenizer
from kvfold_server.text.window_detokenizer import REPLACEMENT, WindowDetokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    import tokenizers

    from kvfold_server.text.detokenizer import Detokenizer
    from kvfold_server.text.tokenizer import Tokenizer

    Make = Callable[..., Detokenizer]

SENTENCES = [
    "Hello world, the lazy dog jumps.",
    "Wörter: äöüß und 日本語のテキスト",
    "👩‍👩‍👧‍👦 family, flag 🇩🇪, and 🎉🎉 again",
    "  two  leading spaces and\nnew\n\nlines\t.",
    "\U0001d518\U0001d52b\U0001d526 ﷽ क्षि",
]


@pytest.fixture(scope="session", params=[make_detokenizer, WindowDetokenizer], ids=["quickest", "window"])
def make(request: pytest.FixtureRequest) -> Make:
    """The detokenizer that a tokenizer gets, and the one that is right for all."""
    return request.param  # type: ignore[no-any-return]


def pieces(
    make: Make, tokenizer: Tokenizer, answer: list[int], prompt: list[int] | None = None, skip: bool = True
) -> list[str]:
    detokenizer = make(tokenizer, prompt or [], skip_special_tokens=skip)
    return [*(detokenizer.add(token) for token in answer), detokenizer.finish()]


@pytest.mark.parametrize("sentence", SENTENCES)
def test_pieces_join_to_the_text_of_the_whole_answer(
    make: Make, tokenizer: Tokenizer, backend: tokenizers.Tokenizer, sentence: str
) -> None:
    answer = backend.encode(sentence).ids
    assert "".join(pieces(make, tokenizer, answer)) == backend.decode(answer)


@pytest.mark.parametrize("sentence", SENTENCES)
@pytest.mark.parametrize("split", [1, 2, 3, 5, 8])
def test_an_answer_continues_its_prompt_with_the_right_space(
    make: Make, tokenizer: Tokenizer, backend: tokenizers.Tokenizer, sentence: str, split: int
) -> None:
    tokens = backend.encode(sentence).ids
    prompt, answer = tokens[:split], tokens[split:]
    # A character that the prompt began and the answer completes belongs to the answer.
    texts = [backend.decode(prompt[: len(prompt) - count]) for count in range(4)]
    before = next(text for text in texts if not text.endswith(REPLACEMENT))
    assert before + "".join(pieces(make, tokenizer, answer, prompt)) == backend.decode(tokens)


@pytest.mark.parametrize("sentence", SENTENCES)
def test_no_piece_splits_a_character(
    make: Make, tokenizer: Tokenizer, backend: tokenizers.Tokenizer, sentence: str
) -> None:
    answer = backend.encode(sentence).ids
    assert not any(REPLACEMENT in piece for piece in pieces(make, tokenizer, answer))


def test_special_tokens_leave_no_trace_when_they_are_skipped(
    make: Make, tokenizer: Tokenizer, backend: tokenizers.Tokenizer
) -> None:
    one, two = backend.encode("Hello world").ids, backend.encode("the dog").ids
    answer = [*one, *tokenizer.special_ids, *two]
    assert "".join(pieces(make, tokenizer, answer)) == backend.decode(one + two, skip_special_tokens=True)


def test_special_tokens_are_text_when_they_are_not_skipped(make: Make, byte_level_tokenizer: Tokenizer) -> None:
    answer = byte_level_tokenizer.encode("Hello<|im_end|>world", add_special_tokens=False)
    assert "".join(pieces(make, byte_level_tokenizer, answer, skip=False)) == "Hello<|im_end|>world"
    assert "".join(pieces(make, byte_level_tokenizer, answer, skip=True)) == "Helloworld"


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_tokens_of_a_byte_level_vocabulary_decode_as_a_whole_does(
    make: Make, byte_level_tokenizer: Tokenizer, data: st.DataObject
) -> None:
    answer = data.draw(st.lists(st.integers(0, 399), max_size=60))
    whole = byte_level_tokenizer.decode(answer, skip_special_tokens=True)
    assert "".join(pieces(make, byte_level_tokenizer, answer)) == whole


def test_bytes_that_form_no_character_are_not_held_for_ever(make: Make, byte_level_tokenizer: Tokenizer) -> None:
    token = byte_level_tokenizer.encode("🎉", add_special_tokens=False)[0]
    parts = pieces(make, byte_level_tokenizer, [token] * 100)
    assert "".join(parts) == byte_level_tokenizer.decode([token] * 100, skip_special_tokens=True)
    assert sum(map(bool, parts)) > 10


def test_ids_without_a_token_have_no_text(make: Make, tokenizer: Tokenizer, backend: tokenizers.Tokenizer) -> None:
    hello, world = backend.encode("Hello").ids, backend.encode("world").ids
    unknown = backend.get_vocab_size() + 10
    text = "".join(pieces(make, tokenizer, [*hello, *[unknown] * 20, *world]))
    assert text == backend.decode(hello + world)


def test_the_work_of_a_token_does_not_grow_with_the_answer(make: Make, byte_level_tokenizer: Tokenizer) -> None:
    rng = random.Random(1)  # noqa: S311
    tokens = [rng.randrange(4, 400) for _ in range(20_000)]
    detokenizer = make(byte_level_tokenizer, [])
    seconds = []
    for start in range(0, 20_000, 5_000):
        began = time.perf_counter()
        for token in tokens[start : start + 5_000]:
            detokenizer.add(token)
        seconds.append(time.perf_counter() - began)
    assert seconds[-1] < 5 * seconds[0]


def test_every_byte_has_a_symbol_that_the_tokenizer_knows(byte_level_tokenizer: Tokenizer) -> None:
    symbols = pre_tokenizers.ByteLevel.alphabet()
    assert set(BYTES) == set(symbols)
    assert sorted(BYTES.values()) == list(range(256))


def test_a_vocabulary_of_bytes_is_joined_and_any_other_decoded(tokenizer: Tokenizer) -> None:
    detokenizer = make_detokenizer(tokenizer, [])
    if tokenizer.byte_pieces is None:
        assert isinstance(detokenizer, WindowDetokenizer)
        with pytest.raises(ValueError, match="not a byte-level vocabulary"):
            ByteDetokenizer(tokenizer, [])
    else:
        assert isinstance(detokenizer, ByteDetokenizer)
