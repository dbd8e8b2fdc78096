"""The engine on tiny models: what a request gets, whatever happens to others."""

from __future__ import annotations

import random

import pytest
import torch
from support.engines import EnginePair, collect, generate, make_request, new_outcomes, run_to_end, tiny_engine
from support.tiny_models import VOCABULARY, random_prompt

from kvfold_server.generation.events import FinishCause
from kvfold_server.generation.request import RequestId, SamplingParameters


@pytest.fixture
def pair() -> EnginePair:
    return tiny_engine()


def test_a_greedy_request_at_depth_0_gets_the_tokens_of_transformers(pair: EnginePair) -> None:
    prompts = [random_prompt(length, seed) for seed, length in enumerate((1, 50, 17, 33))]
    outcomes = run_to_end(pair.engine, [make_request(index, prompt) for index, prompt in enumerate(prompts)])
    assert [outcomes[index].tokens for index in range(4)] == [generate(pair.original, prompt, 8) for prompt in prompts]


def test_a_preempted_request_gets_the_same_tokens(pair: EnginePair) -> None:
    geometry = pair.engine.scheduler.geometry
    small = tiny_engine(kv_memory_bytes=geometry.block_bytes * geometry.layer_count * 9)
    prompts = [random_prompt(30, seed) for seed in range(6)]
    requests = [make_request(index, prompt, max_tokens=80) for index, prompt in enumerate(prompts)]
    outcomes = run_to_end(small.engine, requests)
    assert sum(outcome.finished.memory.preemptions for outcome in outcomes.values()) > 0
    assert [outcomes[index].tokens for index in range(6)] == [generate(pair.original, prompt, 80) for prompt in prompts]


def test_the_pages_held_fall_by_exactly_n_of_l(pair: EnginePair) -> None:
    engine = pair.engine
    layers = engine.info.geometry.layer_count
    for depth in range(engine.info.plan.max_depth + 1):
        held = []
        for shared in (0, depth):
            engine.submit(make_request(1, random_prompt(40, 3), max_tokens=100, shared_layers=shared))
            for _ in range(5):
                engine.step()
            held.append(engine.scheduler.pool.held_count)
            engine.cancel(RequestId(1))
        assert held[1] * layers == held[0] * (layers - depth)


def test_a_report_counts_allocated_blocks(pair: EnginePair) -> None:
    engine = pair.engine
    engine.submit(make_request(1, random_prompt(40, 3), max_tokens=100, shared_layers=1))
    for _ in range(6):
        engine.step()
    held = engine.scheduler.pool.held_count * engine.info.geometry.block_bytes
    full = engine.snapshot().kv_bytes_full
    (finished,) = engine.cancel(RequestId(1))
    assert finished.memory.kv_bytes_held == held == finished.memory.kv_bytes_held_peak
    assert finished.memory.kv_bytes_full == full
    assert full % engine.info.geometry.bytes_per_token == 0
    assert finished.memory.kv_bytes_saved == full - held


def test_a_cancelled_request_has_no_blocks_left_before_the_next_step(pair: EnginePair) -> None:
    pair.engine.submit(make_request(1, random_prompt(40, 3), max_tokens=100))
    pair.engine.step()
    assert pair.engine.scheduler.pool.held_count > 0
    (finished,) = pair.engine.cancel(RequestId(1))
    assert finished.cause is FinishCause.CANCELLED
    assert pair.engine.scheduler.pool.held_count == 0
    assert pair.engine.cancel(RequestId(1)) == []


def test_after_1000_requests_with_random_cancels_no_block_is_held() -> None:
    engine = tiny_engine(kv_memory_bytes=1 << 20, max_waiting=1000).engine
    source = random.Random(5)  # noqa: S311 - a seeded choice of tests
    waiting = [
        make_request(
            index,
            random_prompt(source.randint(1, 60), index),
            max_tokens=source.randint(1, 12),
            shared_layers=source.randint(0, engine.info.plan.max_depth),
            sampling=SamplingParameters(seed=index),
        )
        for index in range(1000)
    ]
    outcomes = new_outcomes()
    running: list[int] = []
    cancelled = 0
    while waiting or engine.has_work:
        for _ in range(min(len(waiting), source.randint(0, 12))):
            request = waiting.pop()
            collect(engine.submit(request), outcomes)
            running.append(request.request_id)
        if running and source.random() < 0.5:
            events = engine.cancel(RequestId(running.pop(source.randrange(len(running)))))
            cancelled += len(events)
            collect(events, outcomes)
        collect(engine.step(), outcomes)
        engine.scheduler.check_integrity()
    assert cancelled > 50
    assert len(outcomes) == 1000
    assert all(outcome.finished is not None for outcome in outcomes.values())
    assert engine.scheduler.pool.held_count == 0
    assert engine.snapshot().free_bytes == engine.info.pool_bytes


def test_a_stop_token_ends_a_request(pair: EnginePair) -> None:
    prompt = random_prompt(20, 1)
    expected = generate(pair.original, prompt, 8)
    stop = expected[3]
    outcome = run_to_end(pair.engine, [make_request(1, prompt, stop_token_ids=frozenset({stop}))])[1]
    assert outcome.tokens == expected[: expected.index(stop) + 1]
    assert outcome.finished.cause is FinishCause.STOP_TOKEN


def test_logprobs_are_those_of_a_full_forward(pair: EnginePair) -> None:
    prompt = random_prompt(45, 2)
    outcome = run_to_end(pair.engine, [make_request(1, prompt, logprobs=3, prompt_logprobs=2)])[1]
    with torch.inference_mode():
        logits = pair.original(input_ids=torch.tensor([prompt + outcome.tokens])).logits[0]
    logprobs = logits.log_softmax(-1)
    entries = [*outcome.prompt.logprobs, *(token.logprobs for token in outcome.generated)]
    followers = [*prompt[1:], *outcome.tokens]
    assert [entry.token.token_id for entry in entries] == followers
    for position, entry in enumerate(entries):
        assert entry.token.logprob == pytest.approx(logprobs[position, followers[position]].item(), abs=1e-4)
        top = logprobs[position].topk(len(entry.top))
        assert [other.token_id for other in entry.top] == top.indices.tolist()
        assert [other.logprob for other in entry.top] == pytest.approx(top.values.tolist(), abs=1e-4)
    assert {len(entry.top) for entry in outcome.prompt.logprobs} == {2}
    assert {len(token.logprobs.top) for token in outcome.generated} == {3}


def test_sampling_does_not_depend_on_batch_mates(pair: EnginePair) -> None:
    def request(index: int) -> object:
        parameters = SamplingParameters(temperature=1.2, top_p=0.9, seed=index, frequency_penalty=0.5)
        return make_request(index, random_prompt(10 + 7 * index, index), sampling=parameters)

    together = run_to_end(pair.engine, [request(index) for index in range(6)])
    alone = [run_to_end(pair.engine, [request(index)])[index].tokens for index in range(6)]
    assert [together[index].tokens for index in range(6)] == alone


def test_a_request_that_cannot_be_computed_ends_alone(pair: EnginePair) -> None:
    prompts = [random_prompt(20 + index, index) for index in range(5)]
    requests = [make_request(index, prompt) for index, prompt in enumerate(prompts)]
    # The front end lets no such token pass; here it makes the embedding raise, whatever batch it is part of.
    culprit = make_request(5, [1, 2, VOCABULARY + 7, 3])
    outcomes = run_to_end(pair.engine, [*requests[:2], culprit, *requests[2:]])
    assert outcomes[5].finished.cause is FinishCause.INTERNAL_ERROR
    assert outcomes[5].finished.error_id
    assert outcomes[5].tokens == []
    assert [outcomes[index].tokens for index in range(5)] == [generate(pair.original, prompt, 8) for prompt in prompts]


def test_a_request_that_can_never_fit_is_refused_with_what_it_needs(pair: EnginePair) -> None:
    geometry = pair.engine.scheduler.geometry
    small = tiny_engine(kv_memory_bytes=geometry.block_bytes * geometry.layer_count * 2)
    outcome = run_to_end(small.engine, [make_request(1, random_prompt(100, 1), max_tokens=100)])[1]
    assert outcome.finished.cause is FinishCause.TOO_LARGE
    needed = geometry.blocks_for(200) * geometry.layer_count * geometry.block_bytes
    assert outcome.finished.bytes_needed == needed > small.engine.info.pool_bytes


def test_a_full_queue_refuses_and_disturbs_nobody() -> None:
    pair = tiny_engine(max_waiting=8, max_running=8)
    prompts = [random_prompt(20, index) for index in range(12)]
    outcomes = run_to_end(pair.engine, [make_request(index, prompt) for index, prompt in enumerate(prompts)])
    refused = [index for index in range(12) if outcomes[index].finished.cause is FinishCause.QUEUE_FULL]
    assert refused == [8, 9, 10, 11]
    assert all(outcomes[index].tokens == generate(pair.original, prompts[index], 8) for index in range(8))


def test_a_snapshot_adds_up_to_the_pool(pair: EnginePair) -> None:
    for index in range(6):
        pair.engine.submit(make_request(index, random_prompt(50, index), max_tokens=30))
    while pair.engine.has_work:
        pair.engine.step()
        snapshot = pair.engine.snapshot()
        states = snapshot.free_bytes + snapshot.prefill_bytes + snapshot.decode_bytes
        assert states == snapshot.pool_bytes == pair.engine.info.pool_bytes
        assert snapshot.kv_bytes_held == pair.engine.scheduler.pool.held_count * pair.engine.info.geometry.block_bytes
