from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold_server.engine.fake import GEOMETRY, PLAN
from kvfold_server.generation.draft import GenerationDraft, SamplingDraft, StoppingDraft
from kvfold_server.generation.errors import InvalidRequestError, UnmetPreconditionError
from kvfold_server.generation.model_info import ModelInfo
from kvfold_server.generation.request import GenerationRequest, RequestId
from kvfold_server.generation.validation import MAX_LOGPROB_ENTRIES, validate

INFO = ModelInfo(
    architecture="Fake",
    dtype="bfloat16",
    weights="bfloat16",
    context_length=100_000,
    vocabulary_size=300,
    geometry=GEOMETRY,
    plan=PLAN,
    plan_strategy="",
    plan_quality=(),
    attention_backend="fake",
    eos_token_ids=frozenset({2, 3}),
    tokenizer_folder=Path(),
    pool_bytes=2**20,
)


def complete(draft: GenerationDraft, prompt: list[int] | None = None, info: ModelInfo = INFO) -> GenerationRequest:
    return validate(draft, prompt or [5, 6], prompt_field="prompt", info=info, request_id=RequestId(1), default_seed=77)


def test_every_default_is_filled_in() -> None:
    request = complete(GenerationDraft())
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (1.0, 0, 1.0, 0.0)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.0, 0.0, 0.0)
    assert sampling.seed == 77
    assert request.max_tokens == 256
    assert request.stop_token_ids == {2, 3}
    assert request.shared_layers == 0
    assert request.logprobs is None
    assert request.prompt_logprobs is None


def test_zero_is_a_value_and_no_default() -> None:
    draft = GenerationDraft(SamplingDraft(temperature=0.0, seed=0), logprobs=0, prompt_logprobs=0, shared_layers=0)
    request = complete(draft)
    assert request.sampling.greedy
    assert request.sampling.seed == 0
    assert (request.logprobs, request.prompt_logprobs) == (0, 0)


def test_an_answer_takes_what_is_left_of_the_context() -> None:
    info = dataclasses.replace(INFO, context_length=100)
    assert complete(GenerationDraft(), [5] * 60, info).max_tokens == 40
    assert complete(GenerationDraft(stopping=StoppingDraft(max_tokens=1)), [5] * 99, info).max_tokens == 1
    with pytest.raises(InvalidRequestError) as caught:
        complete(GenerationDraft(), [5] * 100, info)
    assert caught.value.field == "prompt"


def test_ignoring_the_end_of_sequence_leaves_the_requests_own_stop_tokens() -> None:
    draft = GenerationDraft(stopping=StoppingDraft(stop_token_ids=(9,), ignore_eos=True))
    assert complete(draft).stop_token_ids == {9}


def test_more_log_probabilities_than_a_message_holds_are_refused() -> None:
    most = MAX_LOGPROB_ENTRIES // 21
    allowed = GenerationDraft(stopping=StoppingDraft(max_tokens=most), logprobs=20)
    assert complete(allowed).logprobs == 20
    for draft, prompt, field in (
        (GenerationDraft(stopping=StoppingDraft(max_tokens=most + 1), logprobs=20), [5], "options.logprobs"),
        (GenerationDraft(prompt_logprobs=20), [5] * (most + 1), "options.prompt_logprobs"),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            complete(draft, prompt)
        assert caught.value.field == field


def test_a_plan_without_entries_allows_depth_zero_only() -> None:
    info = dataclasses.replace(INFO, plan=dataclasses.replace(PLAN, entries=()))
    assert complete(GenerationDraft(shared_layers=0), info=info).shared_layers == 0
    with pytest.raises(UnmetPreconditionError):
        complete(GenerationDraft(shared_layers=1), info=info)


numbers = st.none() | st.floats(width=32) | st.sampled_from([-2.0, 0.0, 1.0, 2.0, 100.0])
whole = st.none() | st.integers(-5, 2**64)


@given(
    sampling=st.builds(
        SamplingDraft,
        *[numbers, whole, numbers, numbers, numbers, numbers, numbers, whole],
        st.dictionaries(st.integers(-1, 400), st.floats(width=32), max_size=2),
    ),
    stopping=st.builds(
        StoppingDraft,
        whole,
        st.lists(st.text(max_size=3), max_size=3).map(tuple),
        st.lists(st.integers(-1, 400), max_size=3).map(tuple),
        st.booleans(),
    ),
    rest=st.tuples(whole, whole, whole),
    prompt=st.lists(st.integers(-1, 310), min_size=1, max_size=5),
)
def test_what_passes_is_in_range(
    sampling: SamplingDraft, stopping: StoppingDraft, rest: tuple[int | None, ...], prompt: list[int]
) -> None:
    try:
        request = complete(GenerationDraft(sampling, stopping, *rest), prompt)
    except (InvalidRequestError, UnmetPreconditionError):
        return
    chosen = request.sampling
    assert 0 <= chosen.temperature <= 100
    assert chosen.top_k >= 0
    assert 0 < chosen.top_p <= 1
    assert 0 <= chosen.min_p <= 1
    assert 0 < chosen.repetition_penalty <= 100
    assert -2 <= chosen.presence_penalty <= 2
    assert -2 <= chosen.frequency_penalty <= 2
    assert 0 <= chosen.seed < 2**64
    assert all(0 <= token < 300 and -100 <= bias <= 100 for token, bias in chosen.logit_bias.items())
    assert all(0 <= token < 300 for token in (*request.prompt_token_ids, *request.stop_token_ids))
    assert len(prompt) + request.max_tokens <= INFO.context_length
    assert 0 <= request.shared_layers <= PLAN.max_depth
    assert all(count is None or 0 <= count <= 20 for count in (request.logprobs, request.prompt_logprobs))
