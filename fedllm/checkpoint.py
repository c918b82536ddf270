"""Run folders on disk: every file appears whole or not at all, so that a kill at any moment leaves the last round's state."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dr_encoder.codecs import Codec, load, save
from fedllm.errors import UserError


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, and move it into place.

    Raises UserError where the disk is full.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: could not be written ({why}); free some space and `fedllm resume` the run") from None


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole; no infinities or NaN (JSON has none)."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_whole(path, lambda part: part.write_text(text))


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Checkpoints:
    """`checkpoints/`: the state after the newest round, and the codec it names."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Write the state after `step`; older ones are removed afterwards."""
        from safetensors.torch import save_file

        metadata = {"facts": json.dumps(facts, allow_nan=False)}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_whole(self.folder / f"state-{step:06d}.safetensors", lambda part: save_file(tensors, part, metadata))
        for old in self._states()[:-1]:
            old.unlink()

    def latest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and facts of the newest state, or None.

        Raises UserError for a file that is damaged.
        """
        states = self._states()
        if not states:
            return None
        try:
            with safe_open(states[-1], "pt") as file:
                names = list(file.keys())
                return {name: file.get_tensor(name) for name in names}, json.loads(file.metadata()["facts"])
        except (SafetensorError, KeyError, TypeError, ValueError):
            raise UserError(f"{states[-1]}: damaged checkpoint; the ledger stands, the run cannot be continued") from None

    def save_codec(self, codec: Codec, fingerprint: str) -> None:
        """Write the codec under its fingerprint, once."""
        path = self.codec_path(fingerprint)
        if not path.exists():
            write_whole(path, lambda part: save(codec, part))

    def load_codec(self, fingerprint: str) -> Codec:
        """Inverse of `save_codec`.

        Raises UserError for a file that is missing or holds another codec.
        """
        path = self.codec_path(fingerprint)
        try:
            codec = load(path)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            codec = None
        if codec is None or codec.fingerprint() != fingerprint:
            raise UserError(f"{path}: damaged codec; the ledger stands, the run cannot be continued")
        return codec

    def codec_path(self, fingerprint: str) -> Path:
        return self.folder / f"codec-{fingerprint}.safetensors"

    def keep_codec(self, fingerprint: str | None) -> None:
        """Remove all other codecs."""
        for path in self.folder.glob("codec-*.safetensors"):
            if path.stem != f"codec-{fingerprint}":
                path.unlink()

    def _states(self) -> list[Path]:
        return sorted(self.folder.glob("state-*.safetensors"))
