"""The README's table of what codecs keep, from results of `codec bench`: python scripts/codec_tables.py FILE.json ..."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

COLUMNS = ("linear", "chain", "kronecker", "coordinate", "autoencoder")  # and what else is in the files, but for:
LEFT_OUT = {"sketch"}  # keeps what it must, k / n
SIZES = (64, 128, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    files = [json.loads(file.read_text()) for file in parser.parse_args().files]
    columns = list(dict.fromkeys([*COLUMNS, *(row["codec"] for found in files for row in found["rows"] if row["codec"] not in LEFT_OUT)]))
    lines = [line for found in files for line in lines_of(found, columns)]
    header = ["model, text", "code of", *("`allocation`, `linear`" if codec == "chain" else f"`{codec}`" for codec in columns), "oracle"]
    for line in [header, ["---"] * len(header), *lines]:
        print("| " + " | ".join(line) + " |")


def lines_of(found: dict[str, Any], columns: list[str]) -> list[list[str]]:
    """A line a code size: signal kept, in brackets in Adam's metric."""
    by_place = {(row["codec"], row["code_size"]): row for row in found["rows"]}
    largest = max(size for codec, size in by_place if codec == "kronecker")
    lines = []
    for size in (*SIZES, largest):
        rows = {codec: by_place.get((codec, size)) for codec in columns}
        if size == largest:  # a family that fixes its size
            rows["autoencoder"] = next((row for (codec, _), row in by_place.items() if codec == "autoencoder"), None)
        oracle = next(row for row in rows.values() if row is not None and row["oracle_signal_energy"] is not None)
        cells = [cell(row, "") for row in rows.values()] + [cell(oracle, "oracle_")]
        lines.append([f"{found['model']}, {found['task']}", "1/64" if size == largest else str(size), *cells])
    return lines


def cell(row: dict[str, Any] | None, prefix: str) -> str:
    values = [None if row is None else row[f"{prefix}{name}"] for name in ("signal_energy", "signal_energy_adam")]
    return "-" if None in values else "{:.0f} % ({:.0f} %)".format(*(100 * value for value in values))


if __name__ == "__main__":
    main()
