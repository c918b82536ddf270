"""Prompts and token ids: how a text and its label become what a causal LM continues."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedllm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARACTERS_PER_TOKEN = 8  # texts are cut to this many characters a token before they are tokenized, for speed alone
DEFAULT_TEMPLATE = "Text: {text}\nTopic:"


@dataclass(frozen=True)
class LabelPrompt:
    """A template with `{text}` in it, and one word a label, in the order of the labels, each with its leading space."""

    template: str
    words: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.template.count("{text}") != 1:
            raise UserError(f"task.prompt={self.template!r}: expected a template with {{text}} in it once")

    def encode(self, tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Token ids of the filled template, at most `max_length` each; what is too long is cut from the text's end."""
        head, tail = self.template.split("{text}")
        prompts = [head + text[: max_length * CHARACTERS_PER_TOKEN] + tail for text in texts]
        if not prompts:
            return []
        encoded = tokenizer(prompts, return_offsets_mapping=True)
        cut = []
        for prompt, ids, offsets in zip(prompts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            keep = _tail_tokens(offsets, len(prompt) - len(tail))
            if len(ids) > max_length and keep >= max_length:
                raise UserError(f"task.max_length={max_length} leaves no room: the prompt's end has {keep} tokens")
            cut.append(ids if len(ids) <= max_length else ids[: max_length - keep] + ids[len(ids) - keep :])
        return cut

    def word_ids(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """The first token of each label word. Raises UserError where two share it: they could not be told apart."""
        ids: list[int] = []
        for word in self.words:
            tokens = tokenizer(word, add_special_tokens=False)["input_ids"]
            if not tokens:
                raise UserError(f"task.words: {word!r} has no token; expected a word")
            if tokens[0] in ids:
                other = self.words[ids.index(tokens[0])]
                raise UserError(f"task.words: {other!r} and {word!r} begin with the same token; expected other words")
            ids.append(tokens[0])
        return ids


def _tail_tokens(offsets: Sequence[tuple[int, int]], start: int) -> int:
    """How many tokens reach past character `start`, with the special tokens that follow them."""
    reach = [i for i, (_, end) in enumerate(offsets) if end > start]
    if reach:
        return len(offsets) - reach[0]
    last_text = max((i for i, (begin, end) in enumerate(offsets) if end > begin), default=-1)
    return len(offsets) - 1 - last_text


SENTIMENT = "Review: {text}\nSentiment:"
TEMPLATES = {"movie-reviews": SENTIMENT, "drug-reviews": SENTIMENT}
# Class names that no reader would use as a word, by the word that stands for them.
WORDS = {
    "earn": "earnings", "acq": "acquisition", "crude": "oil", "money-fx": "currency", "ship": "shipping",
    "alt.atheism": "atheism", "comp.graphics": "graphics", "comp.os.ms-windows.misc": "Windows",
    "comp.sys.ibm.pc.hardware": "PC", "comp.sys.mac.hardware": "Mac", "comp.windows.x": "X", "misc.forsale": "sale",
    "rec.autos": "cars", "rec.motorcycles": "motorcycles", "rec.sport.baseball": "baseball",
    "rec.sport.hockey": "hockey", "sci.crypt": "encryption", "sci.electronics": "electronics", "sci.med": "medicine",
    "sci.space": "space", "soc.religion.christian": "Christianity", "talk.politics.guns": "guns",
    "talk.politics.mideast": "Israel", "talk.politics.misc": "politics", "talk.religion.misc": "religion",
}  # fmt: skip


def label_words(label_names: Sequence[str], words: Sequence[str] | None = None) -> list[str]:
    """One word a label: as given (task.words), or its name, where that is none the one that stands for it.

    Raises UserError where as many words as labels are not given.
    """
    if words is None:
        return [WORDS.get(name, name) for name in label_names]
    if len(words) != len(label_names):
        raise UserError(
            f"task.words: {len(words)} words for {len(label_names)} labels; expected one for each of "
            f"{', '.join(label_names)}, in this order"
        )
    return list(words)


def label_prompt(
    source: str, label_names: Sequence[str], template: str | None = None, words: Sequence[str] | None = None
) -> LabelPrompt:
    """The prompt of a source: its own template and words, unless given (task.prompt, task.words in label order)."""
    spaced = tuple(word if word[:1].isspace() else " " + word for word in label_words(label_names, words))
    return LabelPrompt(template or TEMPLATES.get(source, DEFAULT_TEMPLATE), spaced)


def encode_plain(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Token ids of the texts alone with the tokenizer's own special tokens, at most `max_length` each."""
    if not texts:
        return []
    cut = [text[: max_length * CHARACTERS_PER_TOKEN] for text in texts]
    return tokenizer(cut, truncation=True, max_length=max_length)["input_ids"]
