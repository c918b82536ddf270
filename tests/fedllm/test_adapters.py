"""Adapters: they start from a seed, train alone, and come back from disk in plain PEFT with the same logits."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from fedllm.adapters import TRAINED, add_adapter, init_adapter, open_adapter, save_adapter
from fedllm.errors import UserError
from fedllm.lora_layers import add_dense, lora_layers
from tests.fedllm.tiny_models import IDS, logits, tiny_bert, tiny_llama, trainable

CASES = {
    "labels": (tiny_llama, ("q_proj", "v_proj")),
    "classify": (tiny_bert, ("query", "value")),
}


def build(kind: str, dtype: torch.dtype = torch.float32, **adapter):
    base, targets = CASES[kind]
    return add_adapter(base(dtype), kind, **{"r": 2, "targets": targets, **adapter})


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


@pytest.mark.parametrize("train", list(TRAINED))
@pytest.mark.parametrize("kind", list(CASES))
def test_a_trained_adapter_reloads_in_plain_peft_with_the_same_logits(kind, train, tmp_path):
    model = build(kind, train=train)
    before = logits(model)
    step(model)
    after = logits(model)
    assert (after - before).abs().max() > 1e-3  # the adapter did change
    assert_reloads(model, kind, tmp_path / "adapter", exact=train != "core")


def assert_reloads(model, kind, path, exact):
    """In plain PEFT and in ours; exact: to the bit, where what is saved is what was trained."""
    save_adapter(model, path)
    plain, ours = PeftModel.from_pretrained(CASES[kind][0](), path).eval(), open_adapter(CASES[kind][0](), path)
    for loaded in (plain, ours):
        assert torch.equal(logits(loaded), logits(model)) if exact else torch.allclose(logits(loaded), logits(model), atol=2e-6)
    assert all(key.rpartition(".")[2] == "weight" or "bias" in key for key in trainable(ours))


@pytest.mark.parametrize(("kind", "size"), [("labels", 1.0), ("classify", 30.0)])
def test_dense_matrices_reload_in_plain_peft_at_their_exact_rank(kind, size, tmp_path):
    """One layer has a full matrix, one a rank-1 matrix, the others none: each is saved at its own rank, A and B included."""
    model = build(kind)
    dense = add_dense(model)
    untouched = logits(model)
    step(model)
    alone = logits(model)
    generator = torch.Generator().manual_seed(3)
    full, thin, *rest = dense.values()
    full.copy_(0.3 * size * torch.randn(full.shape, generator=generator))
    thin.copy_(size * torch.outer(torch.randn(len(thin), generator=generator), torch.randn(thin.shape[1], generator=generator)))
    assert (alone - untouched).abs().max() > 1e-3 and (logits(model) - alone).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(build(kind))) or kind == "classify"
    assert_reloads(model, kind, tmp_path, exact=False)
    ranks = [len(value) for key, value in sorted(load_file(tmp_path / "adapter_model.safetensors").items()) if "lora_A" in key]
    assert ranks == [min(full.shape), 3, *[2] * len(rest)]


def test_a_dense_matrix_equals_a_changed_weight():
    model, changed = build("labels"), tiny_llama().eval()
    name, dense = next(iter(add_dense(model).items()))
    dense.copy_(torch.randn(dense.shape, generator=torch.Generator().manual_seed(4)))
    with torch.no_grad():
        changed.get_submodule(name.removeprefix("base_model.model.")).weight += dense
    assert torch.allclose(logits(model), logits(changed), atol=1e-5)


def test_small_dense_changes_are_not_lost_in_bfloat16():
    model = build("labels", torch.bfloat16)
    before = logits(model)
    for dense in add_dense(model).values():
        for _ in range(300):
            dense += 1e-4  # each of them a twentieth of what a bfloat16 weight near 0.5 resolves
    assert (logits(model) - before).abs().max() > 1e-2


def test_a_core_is_the_matrix_between_two_fixed_orthonormal_factors():
    model = build("labels", train="core", r=4)
    trained = trainable(model)
    assert {value.shape for value in trained.values()} == {(4, 4)} and not any(value.any() for value in trained.values())
    assert torch.equal(logits(model), logits(tiny_llama().eval()))
    before = {key: value.clone() for key, value in model.named_parameters()}
    for _ in range(2):
        step(model)
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert moved == trained.keys()
    changed = tiny_llama().eval()
    for name, layer in lora_layers(model).items():
        a, b = layer.lora_A["default"], layer.lora_B["default"].weight
        for factor in (a.weight, b.T):
            assert torch.allclose(factor @ factor.T, torch.eye(4), atol=1e-6)
        with torch.no_grad():
            changed.get_submodule(name.removeprefix("base_model.model.")).weight += 16 / 4 * b @ a.core.weight @ a.weight
    assert torch.allclose(logits(model), logits(changed), atol=1e-5)


def test_a_core_larger_than_its_matrix_is_refused():
    with pytest.raises(UserError, match=r"lora\.r=9: expected at most 8, the smaller side of model\.layers\.0\.self_attn\.v_proj") as error:
        build("labels", train="core", r=9)
    assert "\n" not in str(error.value)


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


def test_an_adapter_that_does_not_fit_is_refused(tmp_path):
    save_adapter(build("labels", targets=("down_proj",)), tmp_path)
    wide = tiny_llama()
    wide.model.layers[1].mlp.down_proj = torch.nn.Linear(32, 17)
    few = tiny_llama()
    del few.model.layers[1]
    many = tiny_llama()
    many.model.layers.append(tiny_llama().model.layers[0])
    for other in (wide, few, many):
        with pytest.raises(UserError, match="does not fit") as error:
            open_adapter(other, tmp_path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="has no linear module down_proj"):
        open_adapter(tiny_bert(), tmp_path)
    with pytest.raises(UserError, match="no such file"):
        open_adapter(tiny_llama(), tmp_path / "none")
