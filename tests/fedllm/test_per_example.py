"""Per-example gradients under what could spoil them: other architectures, bfloat16, recomputed forward passes; Opacus as oracle."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dr_encoder.layout import AdapterLayout
from fedllm.adapters import add_adapter
from fedllm.data.batches import make_batches
from fedllm.schema import ServerConfig
from fedllm.server import ServerOptimizer
from fedllm.training.engine import Encoded, TorchEngine
from fedllm.training.objectives import ClassHead, LabelWords, NextToken
from fedllm.training.unit_gradients import UnitGradients

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}
KINDS = {
    "llama, tied": (
        lambda: LlamaForCausalLM(LlamaConfig(**SIZE, num_key_value_heads=2, tie_word_embeddings=True)),
        "text", ["q_proj", "v_proj", "down_proj"], NextToken(),
    ),
    "qwen2, biases": (
        lambda: Qwen2ForCausalLM(Qwen2Config(**SIZE, num_key_value_heads=2, tie_word_embeddings=True)),
        "labels", ["q_proj", "k_proj", "up_proj"], LabelWords([7, 9, 4]),
    ),
    "llama with a head": (
        lambda: LlamaForSequenceClassification(LlamaConfig(**SIZE, num_key_value_heads=2, num_labels=3, pad_token_id=0)),
        "classify", ["q_proj", "v_proj"], ClassHead(),
    ),
    "bert with a head": (
        lambda: BertForSequenceClassification(BertConfig(**SIZE, num_labels=3, hidden_dropout_prob=0, attention_probs_dropout_prob=0)),
        "classify", ["query", "value"], ClassHead(),
    ),
}  # fmt: skip
EXAMPLES = [np.array([i]) for i in range(9)]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def data():
    draw = np.random.default_rng(3)
    return Encoded([draw.integers(1, 50, draw.integers(3, 12)).tolist() for _ in EXAMPLES], draw.integers(0, 3, len(EXAMPLES)))


def make_engine(kind, dtype=torch.float32, batch_tokens=36):
    base, task, targets, objective = KINDS[kind]
    torch.manual_seed(0)
    model = add_adapter(base().to(dtype), task, r=2, alpha=4, targets=targets)
    engine = TorchEngine(model, objective, 0, batch_tokens, "right" if task == "classify" else "left")
    engine.load(engine.adapter() + 0.1 * torch.randn(engine.layout.size, generator=torch.Generator().manual_seed(1)))
    return engine


def rows_of(engine, data, units=EXAMPLES):
    return torch.cat([updates for _, updates in engine.updates(data, units)])


def plain_gradient(engine, batch, targets):
    """Of the summed loss, by autograd alone."""
    engine.objective(engine.model, batch, targets)[0].sum().backward()
    gradient = engine.layout.flatten({name: value.grad for name, value in engine.parameters.items()}).clone()
    for value in engine.parameters.values():
        value.grad = None
    return gradient


def loop(engine, data):
    one = [
        plain_gradient(engine, next(make_batches([tokens])), torch.tensor([int(label)]))
        for tokens, label in zip(data.tokens, data.targets, strict=True)
    ]
    return torch.stack(one)


def assert_equal(engine, found, expected, tolerance):
    """Row by row, and factor by factor: a small factor does not hide behind a large one."""
    assert found.shape == expected.shape and (expected.norm(dim=1) > 0).all()
    for factor in engine.layout.factors:
        part = slice(factor.offset, factor.stop)
        wrong, right = (found - expected)[:, part].norm(dim=1), expected[:, part].norm(dim=1)
        assert (wrong <= tolerance * right.clamp_min(1e-3 * expected.norm(dim=1))).all(), factor.name


def test_rows_are_the_gradients_of_single_examples(kind, data):
    engine = make_engine(kind)
    assert len(list(make_batches(data.tokens, batch_tokens=36))) > 2  # several batches into the same rows
    assert_equal(engine, rows_of(engine, data), loop(engine, data), 1e-4)


def test_batches_hold_every_unit_once_and_are_one_batch_each(kind, data):
    engine = make_engine(kind)
    groups = [[EXAMPLES[place] for place in places] for places in engine.batches(data, EXAMPLES)]
    assert sorted(int(unit[0]) for group in groups for unit in group) == list(range(len(EXAMPLES)))
    widths = [[len(data.tokens[unit[0]]) for unit in group] for group in groups]
    assert len(groups) > 2 and all(len(group) * max(group) <= 36 and group == sorted(group) for group in widths)
    together = torch.cat([rows_of(engine, data, group) for group in groups])
    order = [int(unit[0]) for group in groups for unit in group]
    assert_equal(engine, together, rows_of(engine, data)[order], 1e-5)
    assert list(engine.batches(data, [])) == []


def test_a_bfloat16_base(kind, data):
    engine = make_engine(kind, torch.bfloat16, batch_tokens=10**6)
    found = rows_of(engine, data)
    assert found.dtype == torch.float32 and {value.dtype for value in engine.parameters.values()} == {torch.float32}
    batch = next(make_batches(data.tokens, batch_tokens=10**6, side=engine._batching["side"]))
    whole = plain_gradient(engine, batch, torch.from_numpy(data.targets[batch.index]))
    assert (found.sum(0) - whole).norm() <= 5e-3 * whole.norm()  # the same forward pass; backward differs in the last bit of float32
    alike = F.cosine_similarity(found, loop(engine, data))  # other padding, other rounding
    assert (alike > 0.995).all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_forward_pass_counts_once(kind, reentrant, data):
    engine, plain = make_engine(kind), make_engine(kind)
    base = engine.model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    base.enable_input_require_grads()  # as PEFT does: reentrant checkpoints need a differentiable input
    engine.model.train()
    calls = []
    layer = next(module for module in engine.model.modules() if "lora_A" in getattr(module, "_modules", {}))
    layer.register_forward_hook(lambda *_: calls.append(1))
    found = rows_of(engine, data)
    batches = len(list(make_batches(data.tokens, batch_tokens=36)))
    assert len(calls) == 2 * batches  # it was recomputed indeed
    assert_equal(engine, found, rows_of(plain, data), 1e-5)


def test_opacus_finds_the_same(kind, data):
    opacus = pytest.importorskip("opacus")
    engine = make_engine(kind)
    found = rows_of(engine, data)
    for module in engine.model.modules():  # its hooks look at layers in training mode only
        if any(value.requires_grad for value in module.parameters(recurse=False)):
            module.training = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opacus.GradSampleModule(engine.model, strict=False, loss_reduction="sum")
        batch = next(make_batches(data.tokens, batch_tokens=10**6, side=engine._batching["side"]))
        engine.objective(engine.model, batch, torch.from_numpy(data.targets[batch.index]))[0].sum().backward()
    samples = torch.cat([engine.parameters[factor.name].grad_sample.flatten(1) for factor in engine.layout.factors], 1)
    assert_equal(engine, found[batch.index], samples, 1e-4)


def test_frozen_weights_get_no_gradient_and_stay(kind, data):
    engine = make_engine(kind)
    before = {name: value.detach().clone() for name, value in engine.model.named_parameters()}
    rows_of(engine, data)
    assert all(value.grad is None for value in engine.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in engine.model.named_parameters())


def test_steps_along_the_mean_of_rows_train_the_adapter(kind, data):
    """The trap of hook engines: the loss falls, or seems to, and the adapter is what it was."""
    engine = make_engine(kind)
    start, loss = engine.adapter(), engine.evaluate(data).loss
    optimizer = ServerOptimizer(start, ServerConfig(lr=0.03))
    for _ in range(30):
        engine.load(optimizer.step(rows_of(engine, data).mean(0)))
    assert engine.evaluate(data).loss < 0.9 * loss
    moved = engine.layout.views(engine.adapter() - start)
    assert all(value.norm() > 1e-3 for value in moved.values())


# -- small models: what the layers may do ----------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One layer used twice, and a wide one."""

    def __init__(self):
        super().__init__()
        self.same, self.wide = nn.Linear(3, 3), nn.Linear(3, 8)

    def forward(self, x):
        return self.wide(torch.tanh(self.same(torch.tanh(self.same(x)))))


def collected(model, inputs, rows, units, times=1):
    gradients = UnitGradients(model, AdapterLayout.of(model.named_parameters()))
    gradients.begin(units)
    for _ in range(times):
        gradients.batch(torch.tensor(rows, dtype=torch.int64))
        model(inputs).square().sum().backward()
    return gradients.end()


def by_unit(model, inputs, rows, units):
    layout = AdapterLayout.of(model.named_parameters())
    expected = torch.zeros(units, layout.size)
    for row, one in zip(rows, inputs, strict=True):
        model.zero_grad()
        model(one[None]).square().sum().backward()
        expected[row] += layout.flatten({name: value.grad for name, value in model.named_parameters()})
    model.zero_grad()
    return expected


@pytest.mark.parametrize("shape", [(5, 3), (5, 4, 3), (5, 2, 4, 3)])
@pytest.mark.parametrize("rows", [[2, 0, 2, 2, 0], [1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])
def test_a_layer_used_twice_and_batches_twice(shape, rows):
    torch.manual_seed(0)
    model, inputs = Twice(), torch.randn(shape)
    expected = by_unit(model, inputs, rows, 6)
    assert torch.allclose(collected(model, inputs, rows, 6), expected, atol=1e-4)
    assert torch.allclose(collected(model, inputs, rows, 6, times=3), 3 * expected, atol=1e-4)


def test_an_empty_batch_and_no_units():
    model = Twice()
    assert not collected(model, torch.zeros(0, 4, 3), [], 2).any()
    assert collected(model, torch.zeros(0, 3), [], 0).shape == (0, AdapterLayout.of(model.named_parameters()).size)


def test_a_parameter_used_outside_its_layer_is_noticed():
    class Elsewhere(Twice):
        def forward(self, x):
            return super().forward(x) @ self.wide.weight

    with pytest.raises(RuntimeError, match=r"wide\.weight is used outside its linear layer"):
        collected(Elsewhere(), torch.ones(2, 3), [0, 1], 2)


def test_a_layer_that_does_not_see_the_batch_first_is_noticed():
    class Flat(Twice):
        def forward(self, x):
            return super().forward(x.flatten(0, 1))

    with pytest.raises(RuntimeError, match="Expected the batch of 2 examples in the first dimension"):
        collected(Flat(), torch.ones(2, 4, 3), [0, 1], 2)


def test_a_layer_with_a_forward_of_its_own_is_refused():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match=r"found 0\.bias in a Scaled"):
        UnitGradients(model := nn.Sequential(Scaled(3, 3)), AdapterLayout.of(model.named_parameters()))
