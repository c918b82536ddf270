"""GGUF files converted once: reading one takes transformers some 20 s, its converted copy well under a second."""

import errno
import hashlib
import shutil
import tempfile
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

from fedllm.data.assets import cache_dir
from fedllm.errors import UserError


def converted(file: Path) -> Path:
    """A folder with a GGUF file's model (float32 safetensors) and tokenizer, made where it is not there yet."""
    import transformers

    status = file.stat()
    identity = f"{file.resolve()} {status.st_size} {status.st_mtime_ns} {transformers.__version__}"
    target = cache_dir() / "converted" / f"{file.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".part-") as scratch:
            part = Path(scratch) / "model"
            part.mkdir()
            _convert(file, part)
            try:
                part.rename(target)
            except OSError:
                if not target.is_dir():  # another process was faster: its copy is as good
                    raise
    except OSError as error:
        reason = "no disk space left" if error.errno == errno.ENOSPC else error.strerror or str(error).splitlines()[0]
        raise UserError(f"{file}: cannot convert into {target.parent} ({reason})") from error
    return target


def _convert(file: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with redirect_stderr(StringIO()):  # a progress bar that no setting of transformers turns off
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except (ValueError, KeyError, NotImplementedError, OSError) as error:
        raise UserError(f"{file}: transformers cannot read this GGUF file ({str(error).splitlines()[0]})") from error
    needed = sum(parameter.nbytes for parameter in model.parameters())
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, f"needs {needed / 1e6:.0f} MB")
    tokenizer.save_pretrained(folder)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.save_pretrained(folder)
    # Tied weights appear under several names; each is written once, and tied again from the config on loading.
    written: dict[int, str] = {}
    state = {k: v for k, v in model.state_dict().items() if written.setdefault(v.data_ptr(), k) == k}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
