"""Kill a run with SIGKILL at random moments and resume it: does the same come out, and is all noise accounted for?

python scripts/kill_and_resume.py [CONFIG] [KEY=VALUE ...] [--kills 10] [--json]      without CONFIG a tiny model made on the fly

Fixed seed: each killed and resumed run must end with the adapter of an uninterrupted run, bit for bit. Real noise: each must end within
its target, and every draw of noise (the child processes log them) must have its ledger entry. Ten kills of the tiny model take about six
minutes on two idle cores. Exit status 0 where everything held.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tiny_model

ROOT = Path(__file__).resolve().parent.parent
SEED = "seed=11"
# The command line itself, with every draw logged (unbuffered, before it is made) as `process stage/round`.
CHILD = """
import os, sys
from fedllm.cli import main
from fedllm.privacy.noise import Noise

log = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

def logged(real):
    def draw(self, *args, stage, round, **key):
        os.write(log, f"{os.getpid()} stage{stage}/round{round}\\n".encode())
        return real(self, *args, stage=stage, round=round, **key)
    return draw

for name in ("gaussian", "uniform", "binomial", "choice"):
    setattr(Noise, name, logged(getattr(Noise, name)))
main()
"""


def start(log: Path, *arguments: str) -> subprocess.Popen:
    """`fedllm ...` as a process of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", CHILD, str(log), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    """Wait for the end; returns what was written to standard error, or raises where the command failed."""
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"fedllm failed with status {process.returncode}: {said.strip().splitlines()[-1] if said.strip() else 'no word'}")
    return said


def lines_of(ledger: Path) -> int:
    return ledger.read_bytes().count(b"\n") if ledger.exists() else 0


def uninterrupted(config: Path, overrides: list[str], run_dir: Path) -> tuple[int, float, float]:
    """Run to the end; returns the number of ledger lines, the mean seconds between two, and the seconds after the last."""
    ledger, lines, first, last = run_dir / "ledger.jsonl", 0, 0.0, 0.0
    process = start(run_dir.with_suffix(".draws"), "train", str(config), *overrides, f"output_dir={run_dir}")
    while process.poll() is None:
        if lines_of(ledger) > lines:
            lines, last = lines_of(ledger), time.monotonic()
            first = first or last
        time.sleep(0.005)
    finish(process)
    return lines, (last - first) / max(1, lines - 1), time.monotonic() - last


def killed_and_resumed(config: Path, overrides: list[str], run_dir: Path, lines: int, delay: float) -> dict[str, Any]:
    """Kill `delay` seconds after the ledger has so many lines, then go on until the run is finished; returns what there is to check."""
    log, ledger = run_dir.with_suffix(".draws"), run_dir / "ledger.jsonl"
    train = ["train", str(config), *overrides, f"output_dir={run_dir}"]
    process = start(log, *train)
    while process.poll() is None and lines_of(ledger) < lines:
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)  # does nothing where it has ended
    process.communicate()
    lines_then = lines_of(ledger)
    if not (run_dir / "results.json").exists():
        # Killed before its ledger stood, a run has released nothing and the same command begins it again.
        finish(start(log, *(["resume", str(run_dir)] if ledger.exists() else train)))
    results = json.loads((run_dir / "results.json").read_text())
    return {
        "ledger_lines_when_killed": lines_then,
        "seconds_after_that_line": round(delay, 3),
        "rounds": results["rounds"],
        "ledger_entries": len(entries_of(run_dir)),
        "unaccounted_draws": unaccounted(run_dir, log),
        "epsilon": results["epsilon"]["release"]["epsilon"],
        "within_target": within_target(run_dir, results),
    }


def entries_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()[1:]]


def unaccounted(run_dir: Path, log: Path) -> int:
    """Attempts (a process at a round) that drew randomness without a ledger entry of their own."""
    attempts = set(log.read_text().splitlines()) if log.exists() else set()
    entered = [entry["id"] for entry in entries_of(run_dir)]
    drawn = [attempt.split()[1] for attempt in attempts]
    return sum(max(0, drawn.count(name) - entered.count(name)) for name in set(drawn))


def within_target(run_dir: Path, results: dict[str, Any]) -> bool:
    header = json.loads((run_dir / "ledger.jsonl").read_text().splitlines()[0])
    spent = results["epsilon"][header["target"]["adversary"]]["epsilon"]
    return spent is None or spent <= header["target"]["epsilon"]


def adapter_of(run_dir: Path) -> bytes:
    return (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()


def moments(kills: int, lines: int, between: float, after: float, draw: random.Random) -> list[tuple[int, float]]:
    """Random moments as (ledger lines, seconds after that line), so that they fall into the run however loaded the machine is.

    Line 1 is the ledger's header; after the last come evaluation, adapter and results. What comes earlier is only Python being loaded.
    """
    found = [(draw.randint(1, lines), draw.random()) for _ in range(kills)]
    return sorted((line, share * (between if line < lines else after)) for line, share in found)


def check_all(config: Path, overrides: list[str], kills: int, folder: Path, draw: random.Random, say) -> dict[str, Any]:
    """Both kinds of noise, `kills` moments each."""
    rows = []
    for kind, more in (("fixed seed", [SEED]), ("real noise", ["seed=null"])):
        name = kind.replace(" ", "-")
        lines, between, after = uninterrupted(config, overrides + more, folder / name)
        say(f"{kind}: {lines - 1} releases without interruption, one every {between:.2f} s, {after:.1f} s after the last")
        for number, moment in enumerate(moments(kills, lines, between, after, draw)):
            run_dir = folder / f"{name}-{number}"
            row = {"noise": kind, **killed_and_resumed(config, overrides + more, run_dir, *moment)}
            row["same_adapter"] = adapter_of(run_dir) == adapter_of(folder / name) if kind == "fixed seed" else None
            row["held"] = row["within_target"] and row["unaccounted_draws"] == 0 and row["same_adapter"] is not False
            rows.append(row)
            say(line_of(row))
    return {"rows": rows, "held": all(row["held"] for row in rows)}


def line_of(row: dict[str, Any]) -> str:
    same = {True: "same adapter", False: "OTHER ADAPTER", None: "fresh noise"}[row["same_adapter"]]
    epsilon = "-" if row["epsilon"] is None else f"{row['epsilon']:.3f}"
    return (
        f"{row['noise']}  killed at ledger line {row['ledger_lines_when_killed']:>3}  "
        f"{row['rounds']} rounds, {row['ledger_entries']} entries  "
        f"epsilon {epsilon}  {row['unaccounted_draws']} draws unaccounted  {same}  {'held' if row['held'] else 'BROKEN'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", help="YAML file; a tiny model where it is left out")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--kills", type=int, default=10, help="moments for each kind of noise")
    parser.add_argument("--moments-seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.config is not None and "=" in given.config:
        given.config, given.overrides = None, [given.config, *given.overrides]

    def say(line: str) -> None:
        print(line, file=sys.stderr if given.json else sys.stdout, flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if given.config is None:
            tiny_model.write(folder / "tiny")
            config, overrides = folder / "tiny" / "config.yaml", ["federation.rounds=12", "codec.refresh=4", *given.overrides]
        else:
            config, overrides = Path(given.config), given.overrides
        found = check_all(config, overrides, given.kills, folder, random.Random(given.moments_seed), say)
    if given.json:
        print(json.dumps(found, indent=2))
    else:
        print("everything held" if found["held"] else "BROKEN: see above")
    return 0 if found["held"] else 1


if __name__ == "__main__":
    sys.exit(main())
