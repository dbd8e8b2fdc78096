"""kvfold's engine and a peer's, in turn, in one run.

    python benchmarks/compare.py vllm                       64 x (128 + 64) and other sizes, ample KV memory
    python benchmarks/compare.py vllm-limited               KV memory of 32 and 64 MiB
    python benchmarks/compare.py generate                   transformers' generate on an equal batch
    python benchmarks/compare.py continuous                 transformers' continuous batching
    python benchmarks/compare.py trace --trace FILE.csv     recorded arrivals, against vllm

Each engine is loaded once, in a process of its own; the peer's environment is made when it is first needed. Both run
each workload once to warm up, then --rounds times in turn, on the same random prompts, greedily and to the full
length; every other round the peer begins. The one that waits is stopped. The results are JSON and a picture.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from comparisons import COMPARISONS
from environments import environment_python
from figures import RESULTS, Rounds, table_row, write_comparisons
from kvfold_server.models.source import resolve_model
from peers.protocol import PeerOptions, PeerRequest
from plot import plot_comparisons
from worker import Worker
from workloads import (
    ReplayFigures,
    batch_requests,
    label,
    read_trace,
    replay_figures,
    replay_requests,
    with_new_prompts,
)

if TYPE_CHECKING:
    from comparisons import Pairing

REPLAY_UNITS = {
    "tokens_per_second": "tokens/s",
    "good_tokens_per_second": "tokens/s",
    "first_token_p50_s": "s",
    "first_token_p99_s": "s",
}

WARM_UP_REQUESTS = 16


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=COMPARISONS)
    parser.add_argument("-o", "--output", type=Path, help="the JSON file (default: benchmarks/results/NAME.json)")
    parser.add_argument("--rounds", type=int, default=5, help="(5)")
    parser.add_argument("--only", default="", metavar="TEXT", help='workloads whose name has this, such as "64 x (128"')
    parser.add_argument("--model", default="default", help="as of `kvfold serve` (default)")
    parser.add_argument("--attention-backend", default="native", help="kvfold's (native)")
    parser.add_argument("--trace", type=Path, help="a CSV file with TIMESTAMP, ContextTokens and GeneratedTokens")
    parser.add_argument("--trace-seconds", type=float, default=90, help="length of the replay (90)")
    parser.add_argument("--speed", type=float, default=1, help="recorded seconds that pass in one second (1)")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.trace_seconds <= 0 or arguments.speed <= 0:
        parser.error("--rounds, --trace-seconds and --speed are above 0")
    if arguments.name == "trace" and arguments.trace is None:
        parser.error("trace needs --trace FILE")
    return arguments


def main() -> int:
    """Measures, prints a table, writes JSON and a picture."""
    arguments = parse_arguments()
    # A worker that stands still would outlive a comparison that ends without closing it.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    output: Path = arguments.output or RESULTS / f"{arguments.name}.json"
    run = Run(resolve_model(arguments.model), arguments)
    for pairing in COMPARISONS[arguments.name]:
        run.measure(pairing)
    if not run.rounds:
        sys.stderr.write(f"no workload of {arguments.name} is called {arguments.only}\n")
        return 2
    write_comparisons(output, run.rounds, run.about)
    plot_comparisons(output)
    for entry in run.rounds:
        sys.stdout.write(table_row(entry.comparison()) + "\n")
    return 0


class Run:
    """Collects `rounds`, and what is worth knowing `about` them."""

    def __init__(self, model_folder: Path, arguments: argparse.Namespace) -> None:
        self.rounds: list[Rounds] = []
        self.about: dict[str, object] = {"model": arguments.model}
        self._model_folder = model_folder
        self._vocabulary: int = json.loads((model_folder / "config.json").read_text())["vocab_size"]
        self._arguments = arguments
        self._random = random.Random(0)

    def measure(self, pairing: Pairing) -> None:
        """All rounds of a pairing."""
        jobs = self._jobs(pairing)
        if not jobs:
            return
        longest = max(len(request.prompt) + request.new_tokens for job in jobs.values() for request in job)
        options = PeerOptions(
            str(self._model_folder), pairing.kv_memory_bytes, longest, self._arguments.attention_backend
        )
        peer_python = environment_python(pairing.environment)
        with (
            Worker(Path(sys.executable), "kvfold", options) as ours,
            Worker(peer_python, pairing.module, options) as peer,
        ):
            self.about["kvfold"] = asdict(ours.info)
            self.about[pairing.module] = asdict(peer.info)
            for name, requests in jobs.items():
                measure = self._batches if pairing.workloads else self._replays
                measure(f"{pairing.title}: {name}", requests, (ours, peer))

    def _jobs(self, pairing: Pairing) -> dict[str, list[PeerRequest]]:
        if pairing.workloads:
            return {
                label(workload): batch_requests(workload, self._vocabulary, self._random)
                for workload in pairing.workloads
                if self._arguments.only in label(workload)
            }
        seconds, speed = self._arguments.trace_seconds, self._arguments.speed
        arrivals = read_trace(self._arguments.trace)
        self.about["trace"] = {"seconds": seconds, "speed": speed}
        return {"trace": replay_requests(arrivals, seconds, speed, self._vocabulary, self._random)}

    def _batches(self, name: str, requests: list[PeerRequest], subjects: tuple[Worker, Worker]) -> None:
        """Rounds of one batch."""
        rounds = Rounds(name, "tokens/s", [], [])
        tokens = sum(request.new_tokens for request in requests)
        for subject in subjects:
            subject.run_batch(requests)
        for number in range(self._arguments.rounds):
            fresh = with_new_prompts(requests, self._vocabulary, self._random)
            for index in _turns(number):
                (rounds.ours, rounds.peer)[index].append(tokens / subjects[index].run_batch(fresh))
            _report(rounds)
        self.rounds.append(rounds)

    def _replays(self, name: str, requests: list[PeerRequest], subjects: tuple[Worker, Worker]) -> None:
        """Rounds of a replay, each of which gives several figures."""
        found: tuple[list[ReplayFigures], list[ReplayFigures]] = ([], [])
        for subject in subjects:
            subject.replay(requests[:WARM_UP_REQUESTS])
        for number in range(self._arguments.rounds):
            fresh = with_new_prompts(requests, self._vocabulary, self._random)
            for index in _turns(number):
                found[index].append(replay_figures(fresh, subjects[index].replay(fresh)))
                sys.stderr.write(f"{name}, round {number + 1}, {('kvfold', 'peer')[index]}: {found[index][-1]}\n")
        for figure, unit in REPLAY_UNITS.items():
            ours, peer = ([getattr(figures, figure) for figures in side] for side in found)
            self.rounds.append(Rounds(f"{name}, {figure}", unit, ours, peer))


def _turns(number: int) -> tuple[int, int]:
    """Who begins changes from round to round: 0 is kvfold, 1 the peer."""
    return (0, 1) if number % 2 == 0 else (1, 0)


def _report(rounds: Rounds) -> None:
    sys.stderr.write(
        f"{rounds.name}, round {len(rounds.ours)}: {rounds.ours[-1]:.4g} and {rounds.peer[-1]:.4g} {rounds.unit}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
