"""A tiny random Llama, a small labelled CSV, a public CSV and a config for them: for tests, and for scripts that need a run of seconds.

python scripts/tiny_model.py FOLDER [SEED]    writes FOLDER/{model,train.csv,public.csv,config.yaml}
"""

from __future__ import annotations

import csv
import os
import random
import sys
from pathlib import Path
from typing import Any

GOOD = ["bright", "warm", "clever", "fine", "lovely", "sharp"]
BAD = ["dull", "cold", "clumsy", "poor", "ugly", "flat"]
PLAIN = ["the", "a", "film", "story", "plot", "actor", "scene", "music", "with", "and", "of", "is", "was", "very", "long", "short"]
OTHER = ["ship", "engine", "wheel", "space", "orbit", "team", "game", "score", "disk", "screen", "price", "sale"]
FRAME = ["<unk>", "</s>", "Text", ":", "Topic", "positive", "negative"]
USERS = 12


def write(folder: Path, records: int = 160, public: int = 60, seed: int = 0, **sizes: int) -> dict[str, Any]:
    """Write model and data into `folder`; returns a config (nested, JSON-able) that trains on them for two rounds.

    sizes: see `write_model`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    write_model(folder / "model", **sizes)
    with open(folder / "train.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label", "user"])
        for record in range(records):
            label = draw.choice(["negative", "positive"])
            words = draw.choices(PLAIN, k=draw.randint(2, 9)) + draw.choices(GOOD if label == "positive" else BAD, k=2)
            draw.shuffle(words)
            rows.writerow([" ".join(words), label, f"user{record % USERS}"])
    with open(folder / "public.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text"])
        for _ in range(public):
            rows.writerow([" ".join(draw.choices(OTHER + PLAIN, k=draw.randint(3, 10)))])
    config = {
        "model": {"name": str(folder / "model"), "dtype": "float32"},
        "task": {
            "kind": "labels",
            "source": str(folder / "train.csv"),
            "public": str(folder / "public.csv"),
            "eval_examples": 40,
            "monitor_examples": 20,
            "max_length": 24,
        },
        "lora": {"r": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]},
        "federation": {"clients": 40, "expected_cohort": 10, "rounds": 2, "server": {"optimizer": "adam", "lr": 0.02}},
        "codec": {"family": "linear", "prior": "public", "code_size": 8, "public_examples": 30, "fit_steps": 3, "warmup_public_steps": 2},
        "privacy": {"target": {"epsilon": 8, "delta": 1e-3}},
        "output_dir": str(folder / "run"),
    }
    save(config, folder / "config.yaml")
    return config


def write_model(folder: Path, **sizes: int) -> None:
    """A random Llama of two layers and 16 dimensions, or of other `sizes` (keys of LlamaConfig), with a tokenizer of whole words."""
    # Where DeepSpeed is installed, saving imports it, and it tells on standard output which accelerator it found.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    words = FRAME + GOOD + BAD + PLAIN + OTHER
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                **{
                    "vocab_size": len(words),
                    "hidden_size": 16,
                    "intermediate_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "initializer_range": 0.5,
                    "bos_token_id": None,
                    "eos_token_id": 1,
                    **sizes,
                }
            )
        )
    model.save_pretrained(folder)
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)


def save(config: dict[str, Any], path: Path) -> Path:
    """Write a nested config as YAML."""
    from omegaconf import OmegaConf

    path.write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    return path


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python scripts/tiny_model.py FOLDER [SEED]")
    write(Path(sys.argv[1]), seed=int(sys.argv[2]) if len(sys.argv) == 3 else 0)
