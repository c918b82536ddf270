"""`fedllm plan` against a run: a scaled-down Llama of random weights is planned, trained and measured, line by line.

python scripts/check_plan.py [KEY=VALUE ...] [--layers 4] [--hidden 512] [--json]    (80 s of one core)

Every figure comes from the formulas that plan LLaMA-7B. Activations are counted exactly, by torch's saved-tensor hooks over one real
batch; bytes are those of real files and messages; the peak is that of the process above what a run with a model of 16 dimensions
leaves, with an allocator that gives freed blocks back. Exit status 1 where a planned figure is more than a tenth off.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}  # read by the C library when a process starts
if __name__ == "__main__" and not ALLOCATOR.items() <= os.environ.items():
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import tiny_model  # noqa: E402
import torch  # noqa: E402

from fedllm import run  # noqa: E402
from fedllm.config import load_config  # noqa: E402
from fedllm.plan import Question, plan  # noqa: E402
from fedllm.schema import Config  # noqa: E402
from fedllm.setting import Setting, build  # noqa: E402

MOST = 0.1
WIDTH = 64
Row = tuple[str, float, float]  # what, planned, measured


@contextlib.contextmanager
def phase(text: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """No display."""
    yield lambda count: None


def saved_bytes(model: torch.nn.Module, work: Callable[[], Any]) -> int:
    """Bytes of all storages that autograd saves while `work` runs; the model's own parameters and buffers do not count."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}  # alive until the end, so that no address comes twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def measured_activations(setting: Setting, tokens: int) -> int:
    """One full batch through the engine, one unit an example."""
    rows = [[number] for number in range(tokens // WIDTH)]
    assert {len(setting.train.tokens[row[0]]) for row in rows} == {WIDTH}, "rows are full"
    return saved_bytes(setting.engine.model, lambda: list(setting.engine.updates(setting.train, rows)))


def write(folder: Path, layers: int, hidden: int, overrides: list[str]) -> Config:
    """A model of this size, texts that fill every row, and the config of a run of one round."""
    sizes = {"hidden_size": hidden, "intermediate_size": -(-hidden * 43 // 16), "num_hidden_layers": layers, "vocab_size": 4000}
    heads = max(4, hidden // 64)
    more = {"initializer_range": 0.02, "num_attention_heads": heads, "num_key_value_heads": heads}
    tiny_model.write(folder, records=300, public=200, **sizes, **more)
    for name in ("train.csv", "public.csv"):  # texts long enough for every row
        path = folder / name
        head, *lines = path.read_text().splitlines()
        longer = [line.replace(words, " ".join([words] * WIDTH), 1) for line in lines for words in [line.partition(",")[0]]]
        path.write_text("\n".join([head, *longer]) + "\n")
    fixed = [
        f"task.max_length={WIDTH}",
        "lora.r=8",
        "lora.targets=[q_proj,k_proj,v_proj,o_proj]",
        "federation.rounds=1",
        "federation.clients=100",
        "federation.expected_cohort=40",  # of three texts each: more than one full batch
        "codec.code_size=32",
        "codec.public_examples=140",
        "task.eval_examples=20",
        "task.monitor_examples=10",
        "engine.batch_tokens=4096",
        "seed=1",
        f"output_dir={folder / 'run'}",
    ]
    return load_config(folder / "config.yaml", [*fixed, *overrides])


def rows_of(planned: dict[str, Any], results: dict[str, Any], setting: Setting) -> list[Row]:
    """What was planned beside what is."""
    held, sizes = planned["memory"], planned["bytes"]
    model = setting.engine.model
    return [
        ("trainable parameters", planned["trainable_parameters"], results["parameters"]),
        ("code size", planned["code_size"], results["code_size"]),
        ("message, bytes", sizes["message"], results["uplink_bytes_per_client_round"]),
        ("downlink, bytes", sizes["down"], results["downlink_bytes_per_client_round"]),
        ("update, bytes", sizes["update"], results["update_bytes"]),
        ("codec, bytes on disk", sizes["codec"], results["codec_bytes"]),
        ("weights, bytes", held["weights"], sum(value.nbytes for value in model.parameters())),
        ("activations, bytes", held["activations"], measured_activations(setting, held["tokens"])),
        ("epsilon, release", planned["privacy"]["release"]["epsilon"], results["epsilon"]["release"]["epsilon"]),
        ("epsilon, server", planned["privacy"]["server"]["epsilon"], results["epsilon"]["server"]["epsilon"]),
    ]


def resident_bytes() -> int:
    """Memory of this process now."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run.train(write(Path(temporary) / "little", 2, 16, given.overrides))
        config = write(Path(temporary) / "scaled", given.layers, given.hidden, given.overrides)
        planned = plan(config, Question(attention="eager"), phase)
        before = resident_bytes()
        results = run.train(config)
        rows = rows_of(planned, results, build(run.resolve(config), 0))
    rows.append(("peak of the process, bytes", planned["memory"]["total"], results["peak_memory_bytes"] - before))
    off = [name for name, guess, found in rows if abs(guess / found - 1) > MOST]
    if given.json:
        table = [{"what": name, "planned": guess, "measured": found, "ratio": guess / found} for name, guess, found in rows]
        print(json.dumps({"rows": table, "off": off, "held": not off, "plan": planned}, indent=2))
    else:
        for name, guess, found in rows:
            print(f"{name:34} planned {guess:>16,.6g}  measured {found:>16,.6g}  ratio {guess / found:.3f}")
        expected, seen = planned["noise_to_signal"], results["history"][-1].get("noise_to_signal")
        if expected is not None and seen is not None:
            print(f"noise to signal: {expected:.3g} expected, {seen:.3g} seen (an assumption, not counted)")
        print("all within a tenth" if not off else f"more than a tenth off: {', '.join(off)}")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
