"""Public text that a language model writes, before any training: it costs no privacy, and nobody has to bring any.

The texts are a function of that model, the request and a public seed. They are free as long as the writer was not trained on the clients'
data, and the request says no more of these than everybody may know (that they are film reviews, say). The writer is the base model, or
another one for a base that writes nothing.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedllm.data.assets import cache_dir
from fedllm.errors import UserError
from fedllm.schema import LABEL, GenerateConfig

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from fedllm.monitor import Phase

    Writer = Callable[[], tuple[nn.Module, PreTrainedTokenizerBase]]

SEED = 0  # public, and the same for every run: all runs of a model share the texts, and so do all clients
BATCH = 100
TEMPERATURE, TOP_P = 0.9, 0.95
LEAST_TOKENS = 8  # of a text
# Two of these in every request: from one and the same request a small model writes one and the same text.
WORDS = (
    "animal", "answer", "art", "ball", "bank", "book", "bridge", "brother", "car", "child", "church", "city", "clothes", "coffee",
    "company", "computer", "country", "dance", "doctor", "dream", "engine", "family", "farm", "fear", "film", "fire", "food", "friend",
    "game", "garden", "gold", "hand", "heart", "history", "horse", "hospital", "house", "island", "job", "joke", "kitchen", "language",
    "law", "letter", "light", "love", "machine", "market", "medicine", "money", "moon", "morning", "mother", "mountain", "movie", "music",
    "neighbour", "news", "night", "office", "oil", "paper", "party", "phone", "picture", "plan", "price", "prison", "question", "rain",
    "river", "road", "school", "science", "sea", "secret", "ship", "shop", "sleep", "soldier", "song", "space", "star", "story",
    "summer", "team", "theatre", "time", "town", "train", "travel", "tree", "voice", "war", "water", "wedding", "week", "wind", "winter",
    "work", "world", "writer", "year",
)  # fmt: skip


def texts(
    open_writer: Writer, source: str, task: GenerateConfig, phase: Phase, words: Sequence[str] = ()
) -> tuple[list[str], np.ndarray | None]:
    """Texts of the writer, from the cache folder or written once and kept there, and their labels; blank ones are left out.

    Labels are those that were asked for, where the request has `{label}` in it, else None.

    Args:
        open_writer: gives a causal LM as it was before any training, and its tokenizer; asked only where there is something to write.
        source: the folder or hub id that the model comes from.
        task: what is asked for, how many texts, how many tokens each at most.
        phase: (text, total) -> context that gives advance(count), as of `Monitor`.
        words: of the labels, in their order.
    Raises: UserError where the cache folder cannot be written.
    """
    words = tuple(words) if LABEL in task.prompt else ()
    path = cache_dir() / "generated" / f"{key(source, task, words)}.json"
    try:
        if path.is_file():
            return _told_apart(json.loads(path.read_text(encoding="utf-8")), words)
        path.parent.mkdir(parents=True, exist_ok=True)
        with phase(f"{task.model or 'the base model'} writes {task.count} texts", total=task.count) as advance:
            found = []
            for some in write(*open_writer(), task, words):
                found += some
                advance(len(some))
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".part-") as scratch:
            part = Path(scratch) / path.name
            part.write_text(json.dumps(found, ensure_ascii=False, indent=0), encoding="utf-8")
            part.replace(path)
    except OSError as error:
        raise UserError(
            f"task.public=generated: cannot write to {path.parent} ({error.strerror}); set FEDLLM_CACHE to another folder"
        ) from None
    return _told_apart(found, words)


def _told_apart(found: list[str], words: Sequence[str]) -> tuple[list[str], np.ndarray | None]:
    """Texts that are not blank, and the labels that they were asked for."""
    written = [i for i, text in enumerate(found) if text]
    return [found[i] for i in written], np.array([i % len(words) for i in written], dtype=np.int64) if words else None


def key(source: str, task: GenerateConfig, words: Sequence[str] = ()) -> str:
    """16 hex digits over the model's files and everything that a text depends on."""
    folder = Path(source)
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    model = [source, *(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)]
    values = [model, task.prompt, task.count, task.max_new_tokens, SEED, BATCH, TEMPERATURE, TOP_P, WORDS, *words]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def write(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: GenerateConfig, words: Sequence[str] = ()
) -> Iterator[list[str]]:
    """The texts, a batch at a time, sampled at TEMPERATURE from the most likely tokens that hold TOP_P together."""
    import torch

    asked = [ask(tokenizer, prompt) for prompt in prompts(task, words)]
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        for start in range(0, len(asked), BATCH):
            given = tokenizer(
                asked[start : start + BATCH], return_tensors="pt", padding=True, add_special_tokens=False, return_token_type_ids=False
            ).to(model.device)
            with torch.random.fork_rng(devices=[]), torch.inference_mode():
                torch.manual_seed(SEED + start)
                tokens = model.generate(
                    **given,
                    do_sample=True,
                    temperature=TEMPERATURE,
                    top_p=TOP_P,
                    top_k=0,
                    min_new_tokens=min(LEAST_TOKENS, task.max_new_tokens),
                    max_new_tokens=task.max_new_tokens,
                    pad_token_id=tokenizer.pad_token_id,
                )
            written = tokenizer.batch_decode(tokens[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
            yield [" ".join(text.split()) for text in written]
    finally:
        tokenizer.padding_side = side


def prompts(task: GenerateConfig, words: Sequence[str] = ()) -> list[str]:
    """The requests: `{words}` becomes two everyday words, others each time, and `{label}` the labels' words, one after another."""
    rng = np.random.default_rng(SEED)
    pairs = (rng.choice(WORDS, 2, replace=False) for _ in range(task.count))
    asked = [task.prompt.replace("{words}", " and ".join(pair)) for pair in pairs]
    return [prompt.replace(LABEL, words[i % len(words)]) for i, prompt in enumerate(asked)] if words else asked


def ask(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The request as the model reads it: through its chat template where it has one, else as a line that it goes on from."""
    if tokenizer.chat_template is None:
        return f"{tokenizer.bos_token or ''}{prompt}\n"
    return tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
