"""One and the same seeded run in one process and on several ranks: final adapters, ledgers and epsilons side by side.

python scripts/check_ranks.py [KEY=VALUE ...] [--json] [--quick]      SmolLM2, some minutes; --quick: a tiny random model

The server's step is plain SGD: Adam divides by the root of what it has seen and blows rounding up. Adapters agree where no number is
further off than SHARE of the way that training moved B, which began at zero (A's numbers are LoRA's random start, large beside that):
clients' gradients are summed in other batches, and every codec is fitted to gradients that may differ in their last bits. So may clip
norms, which are taken from such codes, and with them what the ledger says of clip, codec and prior: see `same_ledger`. Exit status 1
where a case is further off, or its ledger or epsilon is another.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import tiny_model  # noqa: E402
from ranks import train  # noqa: E402

SHARE = 1e-3
CLIP_RTOL = 1e-5
ALONE = "1 process"
DEEPSPEED = ROOT / "configs" / "deepspeed"
CASES: dict[str, tuple[int, list[str]]] = {  # name -> how many ranks, config
    ALONE: (1, []),
    "2 ranks, clients": (2, ["parallel.mode=clients"]),
} | {
    f"2 ranks, data, ZeRO {stage}": (2, ["parallel.mode=data", "engine.name=deepspeed", f"engine.deepspeed={DEEPSPEED}/zero{stage}.json"])
    for stage in range(4)
}
COMMON = ["seed=1", "federation.server.optimizer=sgd", "federation.server.lr=1", "federation.rounds=2", "model.dtype=float32"]
SMALL = ["federation.expected_cohort=16", "codec.public_examples=40", "codec.code_size=16"]
SMALL += ["task.eval_examples=40", "task.monitor_examples=20"]


def same_ledger(one: Path, other: Path) -> bool:
    """Whether two ledgers say the same: all but the fingerprints of what was fitted, and clip norms up to CLIP_RTOL."""
    lines = [[json.loads(line) for line in path.read_text().splitlines()] for path in (one, other)]
    return len(lines[0]) == len(lines[1]) and all(_same_entry(*pair) for pair in zip(*lines, strict=True))


def _same_entry(one: dict[str, Any], other: dict[str, Any]) -> bool:
    clips = [entry.pop("clip", None) for entry in (one, other)]
    for entry in (one, other):
        if "codec" in entry:
            entry |= {"codec": len(entry["codec"]), "prior": entry["prior"].partition(":")[0]}
    close = None not in clips and math.isclose(*clips, rel_tol=CLIP_RTOL)
    return one == other and (clips[0] == clips[1] or close)


def compared(folder: Path, alone: Path, results: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """A case's figures beside those of one process."""
    from safetensors.torch import load_file

    found, expected = (load_file(place / "adapter" / "adapter_model.safetensors") for place in (folder, alone))
    pairs = [(found[name].double(), expected[name].double()) for name in expected]
    off = max(float((one - other).abs().max()) for one, other in pairs)
    moved = max(float(value.abs().max()) for name, value in expected.items() if "lora_B" in name)
    close = moved > 0 and found.keys() == expected.keys() and all(bool(((a - b).abs() <= SHARE * moved).all()) for a, b in pairs)
    ledgers = [place / "ledger.jsonl" for place in (folder, alone)]
    return {
        "largest_difference": off,
        "largest_change": moved,
        "adapters_agree": close,
        "same_ledger": same_ledger(*ledgers),
        "same_bytes": ledgers[0].read_bytes() == ledgers[1].read_bytes(),
        "same_epsilon": results["epsilon"] == reference["epsilon"],
        "loss": results["loss"],
        "epsilon_release": results["epsilon"]["release"]["epsilon"],
        "seconds": results["seconds"]["total"],
    }


def check(config: Path, overrides: list[str], folder: Path, threads: int) -> dict[str, Any]:
    """The whole answer."""
    rows, reference = [], {}
    for number, (name, (ranks, parts)) in enumerate(CASES.items()):
        print(f"check_ranks: {name}", file=sys.stderr, flush=True)
        results = train(config, folder / f"case{number}", ranks, threads, [*COMMON, *overrides, *parts])
        reference = reference or results
        rows.append({"case": name, "ranks": ranks} | compared(folder / f"case{number}", folder / "case0", results, reference))
    held = all(row["adapters_agree"] and row["same_ledger"] and row["same_epsilon"] for row in rows)
    return {
        "rows": rows,
        "model": reference["model"],
        "parameters": reference["parameters"],
        "rounds": reference["rounds"],
        "tolerance": {"share_of_change": SHARE},
        "threads": threads,
        "held": held,
    }


def table(answer: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"{answer['model']}, {answer['parameters']:,} trained numbers; "
        f"{answer['rounds']} rounds, plain SGD; {answer['threads']} thread a rank",
        "",
        "| run | largest difference | of a change of | adapters agree | same ledger | to the byte | same ε | ε | loss | seconds |",
        "|---|---:|---:|---|---|---|---|---:|---:|---:|",
    ]
    for row in answer["rows"]:
        marks = " | ".join("yes" if row[key] else "NO" for key in ("adapters_agree", "same_ledger", "same_bytes", "same_epsilon"))
        figures = f"{row['epsilon_release']:.2f} | {row['loss']:.6f} | {row['seconds']:.0f}"
        lines.append(f"| {row['case']} | {row['largest_difference']:.1e} | {row['largest_change']:.1e} | {marks} | {figures} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--threads", type=int, default=1, help="of each rank, and of the one process")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--quick", action="store_true", help="a tiny random model")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if given.quick:
            tiny_model.write(folder / "tiny")
            answer = check(folder / "tiny" / "config.yaml", given.overrides, folder, given.threads)
        else:
            answer = check(ROOT / "configs" / "quickstart.yaml", [*SMALL, *given.overrides], folder, given.threads)
    print(json.dumps(answer, indent=2) if given.json else table(answer))
    return 0 if answer["held"] else 1


if __name__ == "__main__":
    sys.exit(main())
