"""One federated round against pure forward and backward passes over the same examples at the best batch size.

python scripts/bench_round.py [--cycles N] [--json] [--quick]      about 10 minutes; --quick: a tiny model, seconds

MiniLM with a classifier's head, 1000 clients of 4 snippets of 40 tokens, a Poisson cohort of 50. A round is `Federation.stage2_round` as a
run does it: guard, ledger on disk, cohort, shared batches, code, clip, noise, messages packed, checked and summed, decoding, server step,
checkpoint, TensorBoard; held-out evaluation is cut to one example, and the codec is fitted before (the first round, with its public
gradients and the fit, stands apart). Four ways: the code of configs/classify.yaml (kronecker, Adam in its numbers), a dense basis of 64
numbers, no codec with noise on every message, no codec with a trusted server. The pure passes take the same cohort's examples, mean loss,
gradients summed, no optimiser; their batch size is searched first and given to the round too. All in one process in turn, the order
rotating; ratios are taken cycle by cycle, their median stands with the 95 % interval of order statistics.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import tiny_model  # noqa: E402

from fedllm.bench.measure import alternate, ratios, timed  # noqa: E402

LIMIT = 1.15
EXAMPLES, TOKENS = 4, 40  # of a client, of an example
CLIENTS, COHORT, COHORT_QUICK = 1000, 50, 10
CASES = {
    "kronecker": ["codec.family=kronecker", "federation.server.space=code"],
    "linear": ["codec.family=linear", "codec.code_size=64", "codec.public_examples=100"],
    "identity": ["codec.family=identity", "codec.code_size=null"],
    "identity, central": ["codec.family=identity", "codec.code_size=null", "privacy.noise=central"],
}
COMMON = ["codec.refresh=0", "task.monitor_examples=1", "task.eval_examples=20", f"federation.expected_cohort={COHORT}"]
COMMON += ["task.public=newsgroups", "codec.public_labels=random", "federation.warm_start.steps=0"]  # a round is the same with any text


class Bench:
    """The model, its clients, and a cohort for each cycle."""

    def __init__(self, config_path: Path, overrides: list[str], cycles: int, folder: Path):
        import numpy as np

        from fedllm.config import load_config
        from fedllm.data.partition import make_partition
        from fedllm.privacy.noise import Noise
        from fedllm.run import resolve
        from fedllm.setting import build
        from fedllm.training.engine import Encoded

        def config_of(name: str):
            settings = [*overrides, *CASES[name], f"federation.rounds={cycles + 2}", f"output_dir={folder / name.replace(', ', '-')}"]
            return resolve(load_config(config_path, settings))

        self.configs = {name: config_of(name) for name in CASES}
        config = self.configs["identity"]
        setting = build(config, 0)
        clients = config.federation.clients
        tokens = cut([token for record in setting.train.tokens for token in record], TOKENS, clients * EXAMPLES)
        train = Encoded(tokens, np.resize(setting.train.targets, len(tokens)))
        partition = make_partition("iid", records=len(train), clients=clients)
        self.setting = dataclasses.replace(setting, train=train, partition=partition)
        self.engine = setting.engine
        rate, most = config.federation.expected_cohort / clients, config.federation.max_cohort
        self.cohorts = [Noise().sample_cohort(clients, rate, most, stage=2, round=number) for number in range(cycles + 2)]

    def pure(self, cohort, batch_size: int) -> None:
        """Gradients of the cohort's examples, as plain training would take them."""
        import numpy as np
        import torch

        from fedllm.data.batches import make_batches

        examples = np.concatenate([self.setting.partition.records(client) for client in cohort])
        tokens = [self.setting.train.tokens[i] for i in examples]
        for batch in make_batches(tokens, batch_tokens=batch_size * TOKENS):
            targets = torch.from_numpy(self.setting.train.targets[examples[batch.index]])
            losses, _ = self.engine.objective(self.engine.model, batch, targets)
            (losses.sum() / len(examples)).backward()
        for value in self.engine.parameters.values():
            value.grad = None

    def use_batch(self, batch_size: int) -> None:
        """Let the rounds train in batches of this size too."""
        from fedllm.training.engine import TorchEngine

        config = self.configs["identity"]
        side = "right" if config.task.kind == "classify" else "left"
        self.engine = TorchEngine(self.engine.model, self.engine.objective, 0, batch_size * TOKENS, side)
        self.setting = dataclasses.replace(self.setting, engine=self.engine)

    def search(self, sizes: list[int]) -> dict[int, float]:
        """Seconds of the pure passes at each batch size: the better of two, in two sweeps."""
        seconds = {size: [] for size in sizes}
        for _ in range(2):
            for size in sizes:
                seconds[size].append(timed(lambda size=size: self.pure(self.cohorts[0], size)).wall)
        return {size: min(taken) for size, taken in seconds.items()}

    def federation(self, name: str):
        """A run of one case before its first round; round by round it takes the planned cohorts."""
        from fedllm.checkpoint import Checkpoints
        from fedllm.federation import Federation
        from fedllm.monitor import Monitor
        from fedllm.privacy.ledger import Ledger
        from fedllm.run import calibrate, ledger_header, new_run_id
        from fedllm.stopwatch import Stopwatch

        config = self.configs[name]
        folder = Path(config.output_dir)
        folder.mkdir(parents=True)
        header = ledger_header(config, new_run_id(config), self.setting, calibrate(config, self.setting.partition.unit_count, 1))
        ledger = Ledger.create(folder / "ledger.jsonl", header)
        monitor = Monitor(folder, config.federation.rounds, quiet=True)
        federation = Federation(config, self.setting, ledger, Checkpoints(folder / "checkpoints"), monitor, Stopwatch())
        draw, cohorts = federation.noise.sample_cohort, iter(self.cohorts)

        def planned(*arguments, **key):
            draw(*arguments, **key)  # for its time
            return next(cohorts)

        federation.noise.sample_cohort = planned
        return federation


def bench(config_path: Path, overrides: list[str], cycles: int, sizes: list[int], folder: Path) -> dict[str, Any]:
    """The whole answer but for the verdict."""
    setup = Bench(config_path, overrides, cycles, folder)
    search = setup.search(sizes)
    best = min(search, key=search.get)
    say(f"best batch size {best}: " + ", ".join(f"{size} {seconds:.2f} s" for size, seconds in search.items()))
    setup.use_batch(best)
    federations, first = {}, {}
    for name in CASES:
        federations[name] = setup.federation(name)
        first[name] = timed(lambda name=name: play(federations[name])).wall
    before = {name: federation.watch.total() for name, federation in federations.items()}
    cohorts = iter(setup.cohorts[1:])
    steps: dict[str, Callable[[], Any]] = {name: lambda name=name: play(federations[name]) for name in CASES}
    steps["pure"] = lambda: setup.pure(next(cohorts), best)
    taken = []
    for cycle, seconds in enumerate(alternate(steps, cycles), 1):
        taken.append(seconds)
        say(f"cycle {cycle} of {cycles}: " + ", ".join(f"{name} {seconds[name].wall:.2f} s" for name in steps))
    rows = []
    for name, federation in federations.items():
        phases = {phase: seconds - before[name][phase] for phase, seconds in federation.watch.total().items() if phase != "total"}
        rows.append(
            {"case": name, "seconds": statistics.median(seconds[name].wall for seconds in taken)}
            | {f"{kind}_ratio": found for kind, found in ratios(taken, name, "pure").items()}
            | {
                "first_round_seconds": first[name],
                "phase_seconds": {phase: round(took / (cycles + 1), 4) for phase, took in phases.items()},
            }
        )
        federation.monitor.close()
        federation.ledger.close()
    config = setup.configs["linear"]
    return {
        "rows": rows,
        "pure": {"seconds": statistics.median(seconds["pure"].wall for seconds in taken), "batch_size": best, "search_seconds": search},
        "model": config.model.name,
        "clients": config.federation.clients,
        "expected_cohort": config.federation.expected_cohort,
        "examples_per_client": EXAMPLES,
        "tokens": TOKENS,
        "cycles": cycles,
    }


def play(federation) -> None:
    """One round; the budget was planned for it."""
    if not federation.stage2_round():
        raise SystemExit(f"bench_round: {federation.progress.stopped}")


def say(text: str) -> None:
    print(f"bench_round: {text}", file=sys.stderr, flush=True)


def cut(stream: list[int], length: int, count: int) -> list[list[int]]:
    """`count` examples of exactly `length` tokens from a stream, begun again where it ends."""
    pieces = [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]
    return [pieces[place % len(pieces)] for place in range(count)]


def table(answer: dict[str, Any]) -> str:
    """Markdown, the ratios with their intervals."""
    pure = answer["pure"]
    lines = [
        f"{answer['model']}, {answer['clients']} clients, cohort {answer['expected_cohort']}; "
        f"pure passes {pure['seconds']:.3f} s a round, in batches of {pure['batch_size']}",
        "",
        "| round | seconds | time ratio (95 %) | processor time ratio (95 %) | first round, with the codec's fit, s |",
        "|---|---:|---|---|---:|",
    ]
    for row in answer["rows"]:
        shown = ("{median:.3f} ({low:.3f} - {high:.3f})".format(**row[f"{kind}_ratio"]) for kind in ("wall", "processor"))
        lines.append(f"| {row['case']} | {row['seconds']:.3f} | {' | '.join(shown)} | {row['first_round_seconds']:.3f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--quick", action="store_true", help="a tiny random model, 3 cycles: shows that all runs, measures nothing")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if given.quick:
            tiny_model.write(folder / "tiny", public=120)
            overrides = [*COMMON, f"federation.expected_cohort={COHORT_QUICK}", "lora.r=8"]
            answer = bench(folder / "tiny" / "config.yaml", overrides, 3, [8, 40], folder)
        else:
            overrides = [*COMMON, f"federation.clients={CLIENTS}"]
            answer = bench(ROOT / "configs" / "classify.yaml", overrides, given.cycles, [4, 8, 16, 32, 50, 64, 100, 200], folder)
    held = None if given.quick else all(row["wall_ratio"]["median"] <= LIMIT for row in answer["rows"])
    answer |= {"limits": {"time_ratio": LIMIT}, "held": held, "threads": torch.get_num_threads()}
    print(json.dumps(answer, indent=2) if given.json else table(answer))
    return 1 if held is False else 0


if __name__ == "__main__":
    sys.exit(main())
