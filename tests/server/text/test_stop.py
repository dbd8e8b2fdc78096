from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold_server.text.answer import AnswerText
from kvfold_server.text.detokenizer import make_detokenizer
from kvfold_server.text.stop import StopScanner

if TYPE_CHECKING:
    from kvfold_server.text.tokenizer import Tokenizer


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Looks at ever longer beginnings of the text; the first that ends with a stop string decides, the longest wins."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def scan(chunks: list[str], stops: list[str]) -> tuple[str, str | None]:
    scanner = StopScanner(stops)
    out = []
    for chunk in chunks:
        scanned = scanner.add(chunk)
        out.append(scanned.text)
        if scanned.matched is not None:
            return "".join(out), scanned.matched
    return "".join([*out, scanner.finish()]), None


@settings(max_examples=1000, deadline=None)
@given(
    chunks=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4),
)
def test_the_cut_is_that_of_a_naive_search_however_the_text_is_cut_up(chunks: list[str], stops: list[str]) -> None:
    assert scan(chunks, stops) == naive("".join(chunks), stops)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_only_what_may_become_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    scanner = StopScanner(stops)
    given_out = ""
    for index, character in enumerate(text):
        scanned = scanner.add(character)
        given_out += scanned.text
        if scanned.matched is not None:
            return
        held = text[: index + 1][len(given_out) :]
        assert given_out + held == text[: index + 1]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_a_stop_string_is_found_across_token_borders_and_the_tokens_up_to_it_count(
    byte_level_tokenizer: Tokenizer,
) -> None:
    tokens = byte_level_tokenizer.encode("Hello world, the END of it", add_special_tokens=False)
    answer = AnswerText(make_detokenizer(byte_level_tokenizer, []), ["END"])
    text, count = "", 0
    for token in tokens:
        piece = answer.add([token])
        text += piece.text
        count += piece.token_count
        if piece.matched is not None:
            break
    assert (text, piece.matched) == ("Hello world, the ", "END")
    shortest = next(
        n for n in range(len(tokens)) if "END" in byte_level_tokenizer.decode(tokens[:n], skip_special_tokens=True)
    )
    assert count == shortest


def test_text_that_was_held_back_is_given_out_at_the_end(byte_level_tokenizer: Tokenizer) -> None:
    tokens = byte_level_tokenizer.encode("the EN", add_special_tokens=False)
    answer = AnswerText(make_detokenizer(byte_level_tokenizer, []), ["END"])
    assert answer.add(tokens).text == "the "
    assert answer.finish().text == "EN"


def test_sixteen_long_stop_strings_cost_little() -> None:
    scanner = StopScanner(["a" * 255 + chr(ord("b") + index) for index in range(16)])
    assert scanner.add("a" * 20_000).text == "a" * (20_000 - 255)
