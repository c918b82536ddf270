"""Several finished runs side by side: one table (Markdown and JSON) and two figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm.errors import UserError
from fedllm.formats import bytes_text, claim_meaning, claim_text, delta_text, epsilon_text, percent_text, seconds_text, times_text, why_text

Results = Mapping[str, Any]

# What table.json keeps of each run's results.
KEPT = (
    "method",
    "task",
    "model",
    "rounds",
    "accuracy_before",
    "accuracy",
    "loss_before",
    "loss",
    "epsilon",
    "uplink_bytes_per_client_round",
    "downlink_bytes_per_client_round",
    "update_bytes",
    "compression_ratio",
    "parameters",
    "code_size",
    "codec_bytes",
    "clients",
    "expected_cohort",
    "diagnostics",
    "seconds",
    "peak_memory_bytes",
    "seed",
)


def compare(run_dirs: Sequence[str | Path], out: str | Path) -> dict[str, Any]:
    """Write table.md, table.json, rounds.png and accuracy.png for these runs into `out`.

    Returns what table.json holds: `{"runs": [{"run", "folder", ...}], "files": [...]}`.
    Raises UserError where a folder has no results.
    """
    from fedllm.plots import bytes_figure, rounds_figure

    runs = load_runs(run_dirs)
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made ({error.strerror}); expected a folder") from None
    files = [out / "table.md", out / "table.json", rounds_figure(runs, out / "rounds.png")]
    files.append(bytes_figure(runs, out / "accuracy.png"))
    table = {
        "runs": [
            {"run": name, "folder": str(folder)} | {key: results.get(key) for key in KEPT}
            for (name, results), folder in zip(runs.items(), run_dirs, strict=True)
        ],
        "files": [str(file) for file in files],
    }
    files[0].write_text(markdown(runs))
    files[1].write_text(json.dumps(table, indent=2, allow_nan=False) + "\n")
    return table


def load_runs(run_dirs: Sequence[str | Path]) -> dict[str, Results]:
    """Name -> results of each run; the name is as much of the folder's path as tells the runs apart."""
    folders = [Path(folder) for folder in run_dirs]
    names = _names(folders)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{twice}: named twice; expected different run folders")
    return {name: load_results(folder) for name, folder in zip(names, folders, strict=True)}


def load_results(run_dir: str | Path) -> Results:
    """The results of one finished run.

    Raises UserError for a folder that is no run, or a run that is not finished.
    """
    run_dir = Path(run_dir)
    path = run_dir / "results.json"
    if not path.is_file():
        if (run_dir / "config.yaml").is_file():
            raise UserError(f"{run_dir}: not finished; continue it with: fedllm resume {run_dir}")
        raise UserError(f"{run_dir}: expected the folder of a finished run; there is no results.json")
    try:
        results = json.loads(path.read_text())
        results["epsilon"]["release"], results["history"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: damaged; restore it, or run again into another output_dir") from None
    return results


def rows(runs: Mapping[str, Results]) -> list[list[str]]:
    """The comparison as text: first the header, then one row a quantity, one column a run."""
    some_accuracy = any(results["accuracy"] is not None for results in runs.values())
    some_claim = any(results["epsilon"].get("claimed") for results in runs.values())
    columns = [_column(results, some_accuracy, some_claim) for results in runs.values()]
    quantities = list(columns[0])
    return [["", *runs], *([quantity, *(column[quantity] for column in columns)] for quantity in quantities)]


def markdown(runs: Mapping[str, Results]) -> str:
    """The comparison as a Markdown table, with what the epsilons mean below it."""
    header, *body = rows(runs)
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * len(runs)]
    lines += ["| " + " | ".join(row) + " |" for row in body]
    return "\n".join([*lines, "", *(f"{note}  " for note in notes(runs))]) + "\n"


def notes(runs: Mapping[str, Results]) -> list[str]:
    """What the rows mean: one line for each adversary and meaning of epsilon that occurs, bytes, overhead."""
    found: dict[str, None] = {}
    for results in runs.values():
        for adversary in ("release", "server"):
            answer = results["epsilon"][adversary]
            if answer["epsilon"] is not None:
                found[f"ε {adversary}: {epsilon_meaning(results['epsilon'], adversary)}."] = None
        if results["epsilon"].get("claimed") is not None:
            found[f"ε claimed by {results['method']}: {claim_meaning(results['epsilon']['claimed'])}."] = None
    return [
        *found,
        "bytes: per client and round, the whole message up; down the new adapter, and the codec where its copy travels.",
        "overhead: codec, privacy, messages and server, of the time without setup and evaluation.",
    ]


def epsilon_meaning(epsilon: Mapping[str, Any], adversary: str) -> str:
    """What one epsilon of results.json stands for: kind, unit, relation, delta, accountant, remark."""
    answer = epsilon[adversary]
    parts = [f"{answer['kind']} for one {epsilon['unit']}", answer["relation"], f"δ {delta_text(epsilon['delta'])}"]
    parts += [answer["accountant"]] + ([answer["reason"]] if answer.get("reason") else [])
    return ", ".join(parts)


def overhead(seconds: Mapping[str, float]) -> float | None:
    """Share of codec, privacy, messages and server in the time without setup and evaluation."""
    work = seconds["total"] - seconds["setup"] - seconds["evaluation"]
    spent = sum(seconds[phase] for phase in ("codec", "privacy", "messages", "server"))
    return spent / work if work > 0 else None


def _column(results: Results, with_accuracy: bool, with_claim: bool) -> dict[str, str]:
    epsilon, before, after = results["epsilon"], results["accuracy_before"], results["accuracy"]
    column = {"method": str(results["method"]), "rounds": str(results["rounds"])}
    if with_accuracy:
        column["accuracy before"] = percent_text(before)
        column["accuracy after"] = percent_text(after)
        column["gain, points"] = "-" if after is None else f"{100 * (after - before):+.1f}"
    column |= {"loss before": f"{results['loss_before']:.3f}", "loss after": f"{results['loss']:.3f}"}
    if with_claim:
        column["ε claimed"] = claim_text(epsilon.get("claimed"))
    return column | {
        "ε release": _epsilon(epsilon["release"]),
        "ε server": _epsilon(epsilon["server"]),
        "private": "yes" if epsilon["private"] else f"no: {why_text(epsilon['why_not_private'])}",
        "bytes up": bytes_text(results["uplink_bytes_per_client_round"]),
        "bytes down": bytes_text(results["downlink_bytes_per_client_round"]),
        "compression": times_text(results["compression_ratio"]),
        "numbers sent": f"{results['code_size'] or 0:,}",
        "time": seconds_text(results["seconds"]["total"]),
        "memory": bytes_text(results["peak_memory_bytes"]),
        "overhead": percent_text(overhead(results["seconds"])),
    }


def _epsilon(answer: Mapping[str, Any]) -> str:
    if answer["epsilon"] is None:
        return answer["reason"] if answer["reason"].startswith("none") else f"none: {answer['reason']}"
    return epsilon_text(answer["epsilon"]) + (" (estimate)" if answer["kind"] == "estimate" else "")


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest tails of the paths that differ; whole paths where none do."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]
