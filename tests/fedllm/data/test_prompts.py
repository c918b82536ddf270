"""Prompts: the text is cut, never the template's end; label words can be told apart."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fedllm.data.prompts import LabelPrompt, encode_plain, label_prompt
from fedllm.errors import UserError

TEMPLATE = "Review: {text}\nSentiment:"


def train_tokenizer(special_end: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of a few hundred merges; with or without special tokens around every text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    corpus = ["Review: a fine film\nSentiment: positive", "Review: poor, dull film!\nSentiment: negative"] * 20
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(corpus, trainer)
    if special_end:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="module", params=[False, True], ids=["bare", "with special tokens"])
def tokenizer(request):
    return train_tokenizer(request.param)


def test_short_prompts_stay_whole(tokenizer):
    ids = LabelPrompt(TEMPLATE, (" positive",)).encode(tokenizer, ["a fine film"], 64)[0]
    assert ids == tokenizer("Review: a fine film\nSentiment:")["input_ids"]


@pytest.mark.parametrize("text", ["dull film! " * 200, "x!\n" * 200, "é" * 500])
def test_long_text_is_cut_at_its_end_and_the_template_stays(tokenizer, text):
    ids = LabelPrompt(TEMPLATE, (" positive",)).encode(tokenizer, [text], 32)[0]
    whole = tokenizer(TEMPLATE.replace("{text}", text))["input_ids"]
    assert len(ids) == 32
    assert any(ids == whole[:head] + whole[head - 32 :] for head in range(1, 32))  # a piece of the text is left out
    prompt = tokenizer.decode(ids, skip_special_tokens=True)
    assert prompt.startswith("Review: " + text[:3]) and prompt.endswith("\nSentiment:")


def test_a_template_without_an_end_keeps_the_special_tokens(tokenizer):
    whole = tokenizer("rate: " + "film " * 99)["input_ids"]
    ids = LabelPrompt("rate: {text}", (" positive",)).encode(tokenizer, ["film " * 99], 16)[0]
    assert len(ids) == 16 and ids[:14] == whole[:14]
    assert (ids[-1] == 1) == (whole[-1] == 1)


def test_no_room_for_text_is_an_error(tokenizer):
    with pytest.raises(UserError, match="max_length=3"):
        LabelPrompt(TEMPLATE, (" positive",)).encode(tokenizer, ["dull film " * 9], 3)


def test_label_words_give_their_first_tokens(tokenizer):
    positive, negative = LabelPrompt(TEMPLATE, (" positive", " negative")).word_ids(tokenizer)
    assert positive != negative
    assert " positive".startswith(tokenizer.decode([positive]))


def test_words_with_one_first_token_are_refused(tokenizer):
    with pytest.raises(UserError, match="' positive' and ' positive!'"):
        LabelPrompt(TEMPLATE, (" positive", " positive!")).word_ids(tokenizer)


@pytest.mark.parametrize("template", ["no place", "{text} {text}"])
def test_a_template_names_the_text_once(template):
    with pytest.raises(UserError, match="once"):
        LabelPrompt(template, (" a", " b"))


def test_sources_have_their_own_prompts_and_words():
    assert label_prompt("movie-reviews", ["negative", "positive"]) == LabelPrompt(TEMPLATE, (" negative", " positive"))
    assert label_prompt("reuters-r8", ["acq", "trade"]).words == (" acquisition", " trade")
    assert label_prompt("own.csv", ["0", "1"], "Q: {text}\nA:", ["no", "yes"]).words == (" no", " yes")
    with pytest.raises(UserError, match="1 words for 2 labels"):
        label_prompt("own.csv", ["0", "1"], None, ["no"])


def test_plain_text_is_truncated_with_its_special_tokens(tokenizer):
    whole = tokenizer("film " * 99)["input_ids"]
    ids = encode_plain(tokenizer, ["film " * 99, "film"], 10)
    assert len(ids[0]) == 10 and (ids[0][-1] == 1) == (whole[-1] == 1)
    assert ids[1] == tokenizer("film")["input_ids"]
    assert encode_plain(tokenizer, [], 10) == []
