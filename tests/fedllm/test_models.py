"""Models: the adapter starts from a seed, trains alone, and comes back from disk with the same logits."""

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from fedllm import models
from fedllm.data.batches import make_batches
from fedllm.data.prompts import label_prompt
from fedllm.data.sources import load
from fedllm.errors import UserError
from fedllm.models import add_adapter, init_adapter, load_adapter, load_model, save_adapter

IDS = torch.tensor([[5, 9, 2, 7], [1, 3, 3, 8]])


def tiny_llama(dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).to(dtype)


def tiny_bert(dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_labels=3
    )
    return BertForSequenceClassification(config).to(dtype)


CASES = {
    "labels": (tiny_llama, ("q_proj", "v_proj")),
    "classify": (tiny_bert, ("query", "value")),
}


def build(kind: str, dtype: torch.dtype = torch.float32, **adapter):
    base, targets = CASES[kind]
    return add_adapter(base(dtype), kind, **{"r": 2, "targets": targets, **adapter})


def trainable(model) -> dict[str, torch.Tensor]:
    return {key: value for key, value in model.named_parameters() if value.requires_grad}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.float()


def step(model) -> None:
    """One SGD step over everything that is trainable."""
    model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.float().logsumexp(-1).sum().backward()
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter -= 0.5 * parameter.grad
            parameter.grad = None


@pytest.mark.parametrize("kind", list(CASES))
def test_a_fresh_adapter_changes_nothing(kind):
    if kind == "labels":
        assert torch.equal(logits(build(kind)), logits(tiny_llama().eval()))
    model = build(kind)
    with model.disable_adapter():
        hidden = model.get_base_model().base_model(IDS).last_hidden_state
    assert torch.equal(model.get_base_model().base_model(IDS).last_hidden_state, hidden)


@pytest.mark.parametrize("kind", list(CASES))
def test_a_trained_adapter_reloads_in_plain_peft_with_the_same_logits(kind, tmp_path):
    model = build(kind)
    before = logits(model)
    step(model)
    after = logits(model)
    assert (after - before).abs().max() > 1e-3  # the adapter did change
    save_adapter(model, tmp_path / "adapter")
    plain = PeftModel.from_pretrained(CASES[kind][0](), tmp_path / "adapter").eval()
    assert torch.equal(logits(plain), after)
    ours = build(kind, seed=5)
    assert not torch.equal(logits(ours), after)
    load_adapter(ours, tmp_path / "adapter")
    assert torch.equal(logits(ours), after)
    assert trainable(ours).keys() == trainable(model).keys()


def test_saving_again_replaces_and_leaves_no_part(tmp_path):
    model = build("labels")
    save_adapter(model, tmp_path)
    step(model)
    save_adapter(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert str(tmp_path) not in (tmp_path / "adapter_config.json").read_text()
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()), logits(model))


@pytest.mark.parametrize("kind", list(CASES))
def test_the_start_follows_the_seed_and_nothing_else(kind):
    one = build(kind, seed=3)
    torch.manual_seed(99)
    same, other = build(kind, seed=3), build(kind, seed=4)
    for key, value in trainable(one).items():
        assert torch.equal(value, trainable(same)[key])
    assert not all(torch.equal(value, trainable(other)[key]) for key, value in trainable(one).items())
    state = torch.get_rng_state()
    init_adapter(one, 8)
    assert torch.equal(state, torch.get_rng_state())


def test_the_start_is_loras_own():
    """A is uniform with variance 1 / (3 in-features), B zero: what PEFT itself draws, up to the seed."""
    model = build("labels", r=16, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
    drawn = torch.cat([value.flatten() for key, value in trainable(model).items() if "lora_A" in key])
    assert drawn.abs().max() <= 1 / 4
    assert float(drawn.detach().var()) == pytest.approx(1 / 48, rel=0.1)
    assert all(not value.any() for key, value in trainable(model).items() if "lora_B" in key)


def test_train_b_freezes_a():
    names = trainable(build("labels", train="b"))
    assert names and all("lora_B" in key for key in names)
    assert len(trainable(build("labels"))) == 2 * len(names)


@pytest.mark.parametrize("kind", list(CASES))
def test_a_bfloat16_base_keeps_a_float32_adapter_and_trains(kind):
    model = build(kind, torch.bfloat16)
    assert {value.dtype for value in trainable(model).values()} == {torch.float32}
    before = {key: value.clone() for key, value in trainable(model).items()}
    step(model)
    assert any(not torch.equal(before[key], value) for key, value in trainable(model).items())


@pytest.mark.parametrize("kind", list(CASES))
def test_only_adapter_and_head_are_trainable_and_nothing_is_random(kind):
    model = build(kind)
    assert all("lora_" in key or ".modules_to_save." in key for key in trainable(model))
    assert any(".modules_to_save." in key for key in trainable(model)) == (kind == "classify")
    assert not any(module.training for module in model.modules())
    assert torch.equal(logits(model), logits(model))


def test_missing_targets_are_named_with_what_there_is():
    with pytest.raises(UserError, match=r"tiny has no linear module q_prj; it has down_proj, .*q_proj") as error:
        add_adapter(tiny_llama(), "labels", name="tiny", targets=("q_prj", "v_proj"))
    assert "\n" not in str(error.value)


def test_an_adapter_of_another_shape_is_refused(tmp_path):
    save_adapter(build("labels"), tmp_path)
    for other in ({"r": 4}, {"targets": ("q_proj", "v_proj", "k_proj")}):
        with pytest.raises(UserError, match="does not fit") as error:
            load_adapter(build("labels", **other), tmp_path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no such file"):
        load_adapter(build("labels"), tmp_path / "none")


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
    empty = models.empty_model(str(tmp_path), "text", r=2)
    shapes = {key: value.shape for key, value in trainable(model).items()}
    assert {key: value.shape for key, value in trainable(empty).items()} == shapes


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
