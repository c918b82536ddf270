"""Models: what loads, in which type, and what cannot be loaded."""

import numpy as np
import pytest
import torch

from fedllm import models
from fedllm.adapters import TRAINED, add_adapter
from fedllm.data.batches import make_batches
from fedllm.data.prompts import label_prompt
from fedllm.data.sources import load
from fedllm.errors import UserError
from fedllm.models import load_model
from tests.fedllm.tiny_models import logits, tiny_llama, trainable


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "movie-reviews"}, "is a data source"),
        ({"name": "none.gguf"}, "no such file"),
        ({"name": "owner/none"}, "cannot be loaded"),
        ({"name": "."}, "expected config.json or one .gguf file"),
        ({"name": "owner/none", "dtype": "float16"}, "expected auto, float32 or bfloat16"),
        ({"name": "owner/none", "kind": "chat"}, "expected one of labels"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says) as error:
        load_model(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("gain", "dtype"), [(1.4, "float32"), (1.6, "bfloat16")])
def test_dtype_auto_takes_what_measured_faster(monkeypatch, gain, dtype):
    monkeypatch.setattr(models, "_matmul_seconds", {"float32": gain, "bfloat16": 1.0}.get)
    assert models.resolve_dtype("auto") == dtype
    assert models.resolve_dtype("auto", "classify") == "float32"
    assert models.resolve_dtype("bfloat16") == "bfloat16"


@pytest.mark.parametrize(("times", "dtype", "told"), [(46.0, "bfloat16", True), (1.5, "bfloat16", False), (46.0, "float32", False)])
def test_a_dtype_that_is_slow_here_is_told(monkeypatch, capsys, times, dtype, told):
    monkeypatch.setattr(models, "_matmul_seconds", {"float32": 0.1, "bfloat16": 0.1 * times}.get)
    monkeypatch.setattr(models, "default_device", lambda: "cpu")
    models.warn_if_slow(dtype)
    said = capsys.readouterr().err
    assert ("46 times as long" in said) == told and len(said.splitlines()) == told


def test_a_folder_loads_and_its_shapes_can_be_counted_without_weights(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    base = tiny_llama()
    base.save_pretrained(tmp_path)
    core = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, "film": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>").save_pretrained(tmp_path)
    model, tokenizer = load_model(str(tmp_path), "text", dtype="float32", r=2)
    assert torch.allclose(logits(model), logits(base.eval()), atol=1e-6)
    assert tokenizer("film")["input_ids"] == [2] and tokenizer.pad_token == "</s>"
    (tmp_path / "model.safetensors").unlink()
    for train in TRAINED:
        full, empty = add_adapter(tiny_llama(), "text", r=2, train=train), models.empty_model(str(tmp_path), "text", r=2, train=train)
        assert {key: value.shape for key, value in trainable(empty).items()} == {key: value.shape for key, value in trainable(full).items()}


def test_the_demo_model_knows_good_reviews_from_bad_before_training():
    """The real model from its GGUF file, the real reviews: about 76 % of all are right, and chance is 50 %."""
    test = load("movie-reviews").test.take(range(64))
    model, tokenizer = load_model("smollm2-135m", dtype="auto")
    prompt = label_prompt("movie-reviews", test.label_names)
    words = prompt.word_ids(tokenizer)
    right = np.zeros(len(test), dtype=bool)
    for batch in make_batches(prompt.encode(tokenizer, test.texts, 64), pad_id=tokenizer.pad_token_id):
        with torch.no_grad():
            answer = model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                logits_to_keep=1,
                use_cache=False,
            ).logits[:, -1, words]
        right[batch.index] = answer.argmax(1).numpy() == test.labels[batch.index]
    assert right.mean() > 0.65


def test_the_demo_encoder_takes_a_head():
    model, tokenizer = load_model("minilm-l6", "classify", labels=3, targets=("query", "value"))
    encoded = tokenizer(["a fine film"], return_tensors="pt")
    with torch.no_grad():
        assert model(**encoded).logits.shape == (1, 3)
