"""What check_ranks.py and bench_ranks.py share: a run in one process, or on several ranks by the `deepspeed` launcher."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, which transformers imports too, looks for one and says so


def train(config: Path, folder: Path, ranks: int, threads: int, overrides: list[str]) -> dict[str, Any]:
    """What results.json holds of a run into `folder`; ranks: 1 for a process without launcher; threads: of each rank."""
    given = ["train", str(config), *overrides, f"output_dir={folder}"]
    command = [sys.executable, "-m", "fedllm", *given]
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launch = ["--no_local_rank", "--log_level", "critical", "--hostfile", os.devnull, "--master_port", str(port)]
        command = [sys.executable, "-m", "deepspeed.launcher.runner", *launch, "--num_gpus", str(ranks), "--module", "fedllm", *given]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, env=environment, stdout=sys.stderr, check=False)
    if done.returncode:
        raise SystemExit(f"{Path(sys.argv[0]).stem}: the run with {ranks} ranks ended with status {done.returncode}")
    return json.loads((folder / "results.json").read_text())
