"""Seconds and memory of the codecs that scale, at the shapes of LLaMA-7B with LoRA r=8 on q, k, v, o, and how they grow with n and k.

python scripts/bench_codecs.py [--json] [--quick] [--out FOLDER]      about 5 minutes on an idle machine and 2 GB; --quick: seconds

One thread; seconds are the thread's own, which a busy machine does not change much, wall-clock seconds stand beside them in the JSON.
Each case is a process of its own, so that its peak resident memory is its own. Memory is counted beyond what was there before the
call: for `fit` beyond the prior's rows and the fitted codec, for `encode` and `decode` beyond the codec and the input, with their
results. Rows are random numbers with decaying spectra on both sides of every matrix: they set sizes and times, and say nothing of how much
a codec keeps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
FAMILIES = ("kronecker", "sketch", "coordinate")
LARGEST_ONLY = ("autoencoder", "linear", "chain", "allocation", "identity", "topk", "powersgd")  # k is n / 64 or what the family takes
WIDTH, RANK, RATIO = 4096, 8, 64
LAYERS, LAYERS_QUICK = (4, 8, 16, 32), (1, 2)
ROWS = 16
REPEATS = 3
SECONDS, COPIES = 1.0, 2.0  # what a full-size encode + decode may take, and memory in updates


def cases(quick: bool) -> list[dict[str, int]]:
    """Growth in n at k = n / 64, and growth in k at one n."""
    width = WIDTH // 4 if quick else WIDTH
    layers = LAYERS_QUICK if quick else LAYERS
    sizes = [{"layers": count, "width": width, "code_size": update_size(count, width) // RATIO} for count in layers]
    largest = sizes[-1]
    return sizes + [{**largest, "code_size": largest["code_size"] // divisor} for divisor in ((8,) if quick else (8, 64))]


def update_size(layers: int, width: int) -> int:
    return layers * 4 * 2 * RANK * width


def measure(family: str, layers: int, width: int, code_size: int) -> dict[str, Any]:
    """One case, in this process."""
    import torch

    from dr_encoder.codecs import CODECS
    from dr_encoder.layout import AdapterLayout, Factor
    from dr_encoder.priors import from_public_gradients

    torch.set_num_threads(1)
    shapes = [(RANK, width), (width, RANK)] * (4 * layers)
    factors = tuple(Factor(str(place), shape, place * RANK * width) for place, shape in enumerate(shapes))
    layout = AdapterLayout(factors)
    prior = rows = None
    if CODECS[family].fits:
        generator = torch.Generator().manual_seed(0)
        rows = torch.empty(ROWS, layout.size)
        for factor in factors:
            matrices = torch.randn(ROWS, *factor.shape, generator=generator)
            for side in (0, 1):
                falling = torch.arange(1, factor.shape[side] + 1) ** -0.5
                matrices *= falling[:, None] if side == 0 else falling
            rows[:, factor.offset : factor.stop] = matrices.flatten(1)
        prior = from_public_gradients(layout, rows)
    small = AdapterLayout.of([("small", torch.zeros(8, 8))])  # what the first call imports and allocates is no codec's
    CODECS["sketch"].fit(None, small, 4, 0.0, 0).encode(torch.zeros(1, 64))
    if family == "autoencoder":
        CODECS[family].fit(from_public_gradients(small, torch.ones(1, 64)), small, None, 0.0, 0, steps=1)
    size = None if CODECS[family].fixed_size or family == "powersgd" else code_size  # PowerSGD: rank 1, more than n / 64 here
    size = ROWS if family in ("linear", "chain") else size  # dense: as many numbers as the prior has rows
    options = {"parts": ("allocation", "linear")} if family == "chain" else {}
    codec, fit = observed(lambda: CODECS[family].fit(prior, layout, size, 0.0, 0, **options))
    prior = rows = None  # let go of the rows
    update = torch.randn(1, layout.size, generator=torch.Generator().manual_seed(1))
    noise = 0.1 if codec.summable else 0.0
    codes, first_encode = observed(lambda: codec.encode(update))
    _, first_decode = observed(lambda: codec.decode(codes[0], noise))
    encodes = [first_encode, *(observed(lambda: codec.encode(update))[1] for _ in range(REPEATS))]
    decodes = [first_decode, *(observed(lambda: codec.decode(codes[0], noise))[1] for _ in range(REPEATS))]
    stored = sum(tensor.numel() * tensor.element_size() for tensor in codec.state()[0].values())
    return {
        "codec": family,
        "update_size": layout.size,
        "code_size": codec.code_size,
        "update_bytes": 4 * layout.size,
        "stored_bytes": stored,
        "fit_seconds": fit.thread_seconds,
        "encode_seconds": min(seen.thread_seconds for seen in encodes),
        "decode_seconds": min(seen.thread_seconds for seen in decodes),
        "fit_wall_seconds": fit.wall_seconds,
        "encode_wall_seconds": min(seen.wall_seconds for seen in encodes),
        "decode_wall_seconds": min(seen.wall_seconds for seen in decodes),
        "fit_bytes": max(fit.peak_bytes - stored, 0),
        "encode_bytes": first_encode.peak_bytes,
        "decode_bytes": first_decode.peak_bytes,
    }


class Observed(NamedTuple):
    """What one call took: seconds of the processor and of the clock, and the rise of the peak resident memory above what was there."""

    thread_seconds: float
    wall_seconds: float
    peak_bytes: int


def observed(call: Callable[[], Any]) -> tuple[Any, Observed]:
    """The call's result and what it took."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, wall, processor = resident("VmRSS"), time.perf_counter(), time.process_time()
    result = call()
    seconds = time.process_time() - processor, time.perf_counter() - wall
    return result, Observed(*seconds, max(resident("VmHWM") - before, 0))


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise SystemExit(f"Expected {field} in /proc/self/status: memory is measured on Linux only")


def apart(family: str, case: dict[str, int]) -> dict[str, Any]:
    """The same, in a process of its own."""
    # One thread, and large blocks go back to the system as soon as they are freed, or the peak would be an earlier one's.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "1000000"}
    command = [sys.executable, str(Path(__file__).resolve()), "--case", json.dumps([family, case])]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{family} {case} failed: {ended.stderr.strip().splitlines()[-1]}")
    return json.loads(ended.stdout)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: seconds, and memory in updates of 4 n bytes."""
    lines = [
        "| codec | n | k | encode s | decode s | both s | fit s | stored MB | fit, updates | encode, updates | decode, updates |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        both = row["encode_seconds"] + row["decode_seconds"]
        copies = " | ".join(f"{row[f'{step}_bytes'] / row['update_bytes']:.2f}" for step in ("fit", "encode", "decode"))
        lines.append(
            f"| {row['codec']} | {row['update_size']:,} | {row['code_size']:,} | {row['encode_seconds']:.3f} | {row['decode_seconds']:.3f} "
            f"| {both:.3f} | {row['fit_seconds']:.1f} | {row['stored_bytes'] / 1e6:.1f} | {copies} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Encode + decode seconds against n at k = n / 64, and against k at the largest n."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row["codec"] in FAMILIES]
    largest = max(row["update_size"] for row in rows)
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    views = [
        ("update_size", "n (k = n / 64)", [row for row in rows if row["code_size"] * RATIO == row["update_size"]]),
        ("code_size", f"k (n = {largest:,})", [row for row in rows if row["update_size"] == largest]),
    ]
    for axis, (key, label, shown) in zip(axes, views, strict=True):
        for family in FAMILIES:
            points = sorted((row[key], row["encode_seconds"] + row["decode_seconds"]) for row in shown if row["codec"] == family)
            axis.loglog(*zip(*points, strict=True), marker="o", label=family)
        axis.set_xlabel(label)
        sizes = sorted({row[key] for row in shown})
        axis.set_xticks(sizes, [f"{size / 1e6:.1f} M" if size >= 1e6 else f"{size:,}" for size in sizes])
        axis.minorticks_off()
        axis.grid(True, alpha=0.3)
    axes[0].axhline(SECONDS, color="grey", linestyle=":")
    axes[1].axhline(SECONDS, color="grey", linestyle=":")
    axes[0].set_ylabel("encode + decode, seconds")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--out", type=Path, help="folder for bench_codecs.md, .json and .png")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case is not None:
        family, case = json.loads(given.case)
        print(json.dumps(measure(family, **case)))
        return 0
    rows = []
    sizes = cases(given.quick)
    largest = max(sizes, key=lambda case: (case["layers"], case["code_size"]))
    for family, case in [(family, case) for case in sizes for family in FAMILIES] + [(family, largest) for family in LARGEST_ONLY]:
        print(f"bench_codecs: {family} {case}", file=sys.stderr, flush=True)
        rows.append(apart(family, case))
        print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    full = [row for row in rows if row["update_size"] == max(row["update_size"] for row in rows)]
    seconds = max(row["encode_seconds"] + row["decode_seconds"] for row in full)
    copies = max(row[f"{step}_bytes"] / row["update_bytes"] for row in full for step in ("fit", "encode", "decode"))
    within = seconds < SECONDS and copies <= COPIES
    held = None if given.quick else within  # beside small updates a few fixed megabytes are many copies
    answer = {"rows": rows, "limits": {"seconds": SECONDS, "updates": COPIES}, "held": held}
    print(json.dumps(answer, indent=2) if given.json else table(rows))
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "bench_codecs.md").write_text(table(rows) + "\n")
        (given.out / "bench_codecs.json").write_text(json.dumps(answer, indent=2) + "\n")
        plot(rows, given.out / "bench_codecs.png")
    return 1 if held is False else 0


if __name__ == "__main__":
    sys.exit(main())
