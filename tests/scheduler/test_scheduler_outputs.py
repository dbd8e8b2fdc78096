"""Whatever else runs, each sequence's answer is that of its solo run; a naive model without blocks says what that is.

The runner's next token is a hash of the KV that it reads through the block tables, so an aliased block or a stale
table changes an answer.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvfold_scheduler.geometry import CacheGeometry, LayerKind
from kvfold_scheduler.hash_runner import HashRunner
from kvfold_scheduler.scheduler import Admission, Scheduler, SchedulerLimits
from kvfold_scheduler.sequence import FinishReason, SequenceId, SequenceRequest
from kvfold_scheduler.sharing import SharingEntry, SharingPlan
from kvfold_scheduler.step_plan import StepPlan, StepResult

WINDOWS: tuple[int | None, ...] = (None, 20, None, 20, 7, None)
PAIRS = ((5, 0), (3, 1), (2, 0))
GEOMETRY = CacheGeometry(tuple(LayerKind(window, "default", 1, 64, 64) for window in WINDOWS), 2)
PLAN = SharingPlan(len(WINDOWS), tuple(SharingEntry(*pair) for pair in PAIRS))
CONTEXT = 160


def stops(token: int) -> bool:
    """Whether a token ends an answer: about one in two hundred does."""
    return token % 200 == 0


def solo_answer(prompt: list[int], depth: int, max_new: int) -> list[int]:
    """The answer to a prompt that has the model for itself: one token at a time, KV in plain lists."""
    owner = dict(PAIRS[:depth])
    kv: dict[int, list[int]] = {layer: [] for layer in range(len(WINDOWS)) if layer not in owner}
    known = list(prompt)
    position = 0
    while True:
        state = hash((position, known[position]))
        for layer, window in enumerate(WINDOWS):
            if layer in kv:
                kv[layer].append(hash((layer, state)))
            seen = kv[owner.get(layer, layer)]
            state = hash((state, *(seen if window is None else seen[-window:])))
        position += 1
        if position == len(known):
            known.append(state)
            if stops(state) or len(known) - len(prompt) == max_new:
                return known[len(prompt) :]


@dataclass
class Request:
    """What was asked for, and the tokens so far."""

    prompt: list[int]
    depth: int
    max_new: int
    tokens: list[int] = field(default_factory=list)

    @property
    def answer(self) -> list[int]:
        return self.tokens[len(self.prompt) :]


class Service:
    """A scheduler and its runner, driven as an engine does, with every promise about a step checked."""

    def __init__(self, block_count: int, limits: SchedulerLimits) -> None:
        self.scheduler = Scheduler(GEOMETRY, PLAN, block_count, CONTEXT, limits)
        self.runner = HashRunner(GEOMETRY, PLAN, self.scheduler.pool, self.scheduler.tables)
        self.live: dict[SequenceId, Request] = {}
        self.count = 0
        self.steps = 0
        self.tokens_owed = 0
        self.last_admission = -CONTEXT
        self.seen = {"preempted": 0, "cancelled": 0, "failed": 0, "stopped": 0, "length": 0, "refused": 0}

    def submit(self, prompt_tokens: int, max_new: int, depth: int) -> Admission:
        self.count += 1
        number = SequenceId(self.count)
        admission = self.scheduler.add(SequenceRequest(number, prompt_tokens, max_new, depth))
        if admission is Admission.WAITING:
            # Prompts differ in their first token only, so equal tables would be noticed by nothing but the contents.
            request = Request([self.count, *range(1, prompt_tokens)], depth, max_new)
            request.tokens = list(request.prompt)
            self.live[number] = request
            self.tokens_owed += prompt_tokens + max_new
        else:
            self.seen["refused"] += 1
        return admission

    def end(self, number: SequenceId, cancel: bool) -> None:
        """Cancels a sequence or fails it; what it has generated so far is the beginning of its solo answer."""
        finished = self.scheduler.cancel(number) if cancel else self.scheduler.fail(number)
        assert finished is not None
        assert finished.reason is (FinishReason.CANCELLED if cancel else FinishReason.FAILED)
        self.seen[finished.reason.value] += 1
        request = self.live.pop(number)
        solo = solo_answer(request.prompt, request.depth, request.max_new)
        assert request.answer == solo[: len(request.answer)]

    def plan(self) -> StepPlan:
        before = {number: self.scheduler.report(number).preemptions for number in self.live}
        plan = self.scheduler.step()
        self.scheduler.check_integrity()
        self.steps += 1
        preempted = {number for number in before if self.scheduler.report(number).preemptions > before[number]}
        self.seen["preempted"] += len(preempted)
        numbers = [chunk.sequence_id for chunk in plan.chunks]
        assert len(set(numbers)) == len(numbers)
        assert plan.token_count <= self.scheduler.limits.step_tokens
        assert [chunk.depth for chunk in plan.chunks] == sorted(chunk.depth for chunk in plan.chunks)
        assert not preempted & set(numbers), "who gave way takes no part in the step"
        if self.live:
            assert min(self.live) in numbers, "the oldest advances in every step"
        for chunk in plan.chunks:
            known = len(self.live[chunk.sequence_id].tokens)
            assert chunk.samples == (chunk.start + chunk.count == known)
        if preempted:
            assert self.steps - self.last_admission > GEOMETRY.tokens_per_block, "an admission lasts"
        if any(chunk.start == 0 for chunk in plan.chunks):
            self.last_admission = self.steps
        return plan

    def finish(self, plan: StepPlan) -> None:
        """Computes and commits a plan; answers that end are equal to the solo ones."""
        chosen = self.runner.execute(plan, {number: request.tokens for number, request in self.live.items()})
        for number, token in chosen.items():
            self.live[number].tokens.append(token)
        stopped = frozenset(number for number, token in chosen.items() if stops(token))
        for end in self.scheduler.commit(plan, StepResult(stopped)):
            request = self.live.pop(end.sequence_id)
            assert request.answer == solo_answer(request.prompt, request.depth, request.max_new)
            assert end.reason is (FinishReason.STOPPED if stops(request.answer[-1]) else FinishReason.LENGTH)
            assert end.report.kv_bytes_full == (len(request.tokens) - 1) * GEOMETRY.bytes_per_token
            self.seen[end.reason.value] += 1
        self.scheduler.check_integrity()

    def drain(self) -> None:
        """Runs until nobody is left, then nothing is held."""
        owed = sum(len(request.prompt) + request.max_new for request in self.live.values())
        for _ in range(owed):
            if self.live:
                self.finish(self.plan())
        assert not self.scheduler.has_work, "every sequence ends within as many steps as all have tokens"
        assert self.scheduler.step() == StepPlan(())
        use = self.scheduler.use()
        assert (use.free_blocks, use.running, use.waiting) == (self.scheduler.pool.block_count, 0, 0)
        assert self.scheduler.tables.free_row_count == self.scheduler.limits.max_running
        self.scheduler.check_integrity()


class SchedulerOutputs(RuleBasedStateMachine):
    """Arrivals, steps, cancels, failures and steps that are computed in parts or never, in any order."""

    @initialize(blocks=st.integers(25, 75), running=st.integers(1, 6), extra=st.integers(0, 60))
    def build(self, blocks: int, running: int, extra: int) -> None:
        limits = SchedulerLimits(max_running=running, max_waiting=5, step_tokens=running + extra)
        self.service = Service(blocks, limits)

    @rule(prompt=st.integers(1, 80), new=st.integers(1, 30), depth=st.integers(0, len(PAIRS)))
    def submit(self, prompt: int, new: int, depth: int) -> None:
        self.service.submit(prompt, new, depth)

    @rule(prompts=st.lists(st.integers(1, 30), min_size=2, max_size=4), depth=st.integers(0, len(PAIRS)))
    def submit_long_answers(self, prompts: list[int], depth: int) -> None:
        """Sequences that are small when they start and then outgrow the pool together."""
        for prompt in prompts:
            self.service.submit(prompt, 120, depth)

    @precondition(lambda self: self.service.live)
    @rule(count=st.integers(1, 40))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.service.finish(self.service.plan())

    @precondition(lambda self: self.service.live)
    @rule(cancel=st.booleans(), data=st.data())
    def end(self, cancel: bool, data: st.DataObject) -> None:
        self.service.end(data.draw(st.sampled_from(sorted(self.service.live))), cancel)

    @precondition(lambda self: self.service.live)
    @rule(data=st.data())
    def step_in_parts(self, data: st.DataObject) -> None:
        """Some of a plan is computed first, some later; some fails or is cancelled, some waits for the next step."""
        plan = self.service.plan()
        numbers = [chunk.sequence_id for chunk in plan.chunks]
        fates = data.draw(st.lists(st.integers(0, 3), min_size=len(numbers), max_size=len(numbers)))
        groups = [{number for number, fate in zip(numbers, fates, strict=True) if fate == part} for part in range(4)]
        self.service.finish(plan.subset(groups[0]))
        for number in groups[1]:
            self.service.end(number, cancel=data.draw(st.booleans()))
        self.service.finish(plan.subset(groups[2]))

    @invariant()
    def nothing_is_held_by_the_dead(self) -> None:
        assert self.service.scheduler.has_work == bool(self.service.live)

    def teardown(self) -> None:
        if hasattr(self, "service"):
            self.service.drain()


TestSchedulerOutputs = SchedulerOutputs.TestCase


def test_thousands_of_requests_with_cancels_and_failures_leave_nothing_behind() -> None:
    """A long life under more load than the pool has room for; the number grows with SIMULATED_REQUESTS."""
    requests = int(os.environ.get("SIMULATED_REQUESTS", "1500"))
    chance = random.Random(7)  # noqa: S311
    service = Service(block_count=56, limits=SchedulerLimits(max_running=12, max_waiting=12, step_tokens=48))
    while service.count < requests:
        for _ in range(chance.choice((0,) * 15 + (1, 3))):
            service.submit(chance.randint(1, 30), chance.randint(1, 120), chance.randrange(len(PAIRS) + 1))
        plan = service.plan()
        numbers = [chunk.sequence_id for chunk in plan.chunks]
        if numbers and chance.random() < 0.02:
            service.end(chance.choice(numbers), cancel=chance.random() < 0.5)
        done = [number for number in numbers if number in service.live and chance.random() > 0.02]
        service.finish(plan.subset(done))
        if service.live and chance.random() < 0.03:
            service.end(chance.choice(sorted(service.live)), cancel=True)
    service.drain()
    # The run shows nothing unless all of this has happened, again and again.
    assert min(service.seen.values()) >= requests // 100, service.seen
