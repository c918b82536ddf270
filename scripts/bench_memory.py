"""Peak memory of a run with 1,000,000 clients over shared records against the same run with 1,000 clients, a cohort of 20 in both.

python scripts/bench_memory.py [CONFIG] [KEY=VALUE ...] [--json]      without CONFIG a tiny model made on the fly (about 30 s)

Each run is a process of its own. Exit status 0 where the larger federation takes at most a tenth more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import tiny_model

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = (1_000, 1_000_000)
MOST = 1.1


def peak(config: Path, overrides: list[str], clients: int, folder: Path) -> dict:
    """Peak resident bytes of one run, and how it is marked."""
    fixed = [f"federation.clients={clients}", "federation.expected_cohort=20", f"output_dir={folder / str(clients)}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", "from fedllm.cli import main; main()", "train", str(config), *overrides, *fixed, "--json"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"fedllm failed with status {ended.returncode}: {ended.stderr.strip().splitlines()[-1]}")
    results = json.loads(ended.stdout)
    return {
        "clients": clients,
        "peak_memory_bytes": results["peak_memory_bytes"],
        "why_not_private": results["epsilon"]["why_not_private"],
        "rounds": results["rounds"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", help="YAML file; a tiny model where it is left out")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.config is not None and "=" in given.config:
        given.config, given.overrides = None, [given.config, *given.overrides]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if given.config is None:
            tiny_model.write(folder / "tiny")
        config = Path(given.config) if given.config is not None else folder / "tiny" / "config.yaml"
        overrides = ["privacy.target.delta=1e-7", *given.overrides]
        rows = [peak(config, overrides, clients, folder) for clients in CLIENTS]
    ratio = rows[1]["peak_memory_bytes"] / rows[0]["peak_memory_bytes"]
    if given.json:
        print(json.dumps({"rows": rows, "ratio": ratio, "held": ratio <= MOST}, indent=2))
    else:
        for row in rows:
            marks = ", ".join(row["why_not_private"]) or "private"
            print(f"{row['clients']:>9,} clients  peak {row['peak_memory_bytes'] / 1e6:8.1f} MB  ({marks})")
        print(f"ratio {ratio:.4f}, at most {MOST} wanted")
    return 0 if ratio <= MOST else 1


if __name__ == "__main__":
    sys.exit(main())
