"""The formulas of `fedllm plan` against torch's own accounting and real codecs."""

import itertools
import json

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from dr_encoder import codecs
from dr_encoder.codecs import kronecker
from dr_encoder.codecs.autoencoder import required_code_size
from dr_encoder.layout import AdapterLayout
from dr_encoder.priors import from_moments, from_public_gradients
from fedllm import plan_memory as memory
from fedllm.errors import UserError
from fedllm.models import add_adapter
from fedllm.plan import code_of
from fedllm.plan_memory import Geometry, Ranks
from fedllm.schema import CodecConfig, Config
from fedllm.training.engine import Encoded, TorchEngine
from fedllm.training.objectives import LabelWords, NextToken

SIZES = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 8, "num_attention_heads": 4, "vocab_size": 50}
ROWS, WIDTH, RANK = 3, 16, 4
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def saved_bytes(model, forward):
    """Bytes of the storages that autograd saves, parameters and buffers aside."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def llama(dtype, attention, targets, train="both", **more):
    config = LlamaConfig(**(SIZES | more), attn_implementation=attention)
    return add_adapter(LlamaForCausalLM(config).to(getattr(torch, dtype)), "text", r=RANK, targets=targets, train=train)


def forward(model):
    ids = torch.zeros(ROWS, WIDTH, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0  # padding, as in a real batch
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def planned(model, dtype, attention, train="both", **options):
    shape = memory.geometry(model)
    item = memory.ITEM[dtype]
    layer = memory.layer_bytes(shape, RANK, WIDTH, item, attention, train == "both")
    return memory.activation_bytes(shape, ROWS * WIDTH, layer, item, **options)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["o_proj"], ALL], ids=["qv", "o", "all"])
@pytest.mark.parametrize("attention", ["eager", "fused"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_what_torch_saves(dtype, attention, targets, one_thread):
    model = llama(dtype, {"fused": "sdpa"}.get(attention, attention), targets)
    assert planned(model, dtype, attention) == pytest.approx(saved_bytes(model, lambda: forward(model)), rel=0.1)


@pytest.mark.parametrize("more", [{"num_key_value_heads": 1}, {"intermediate_size": 400}, {"num_attention_heads": 16}], ids=str)
def test_activations_of_other_shapes(more, one_thread):
    model = llama("float32", "eager", ["q_proj", "v_proj"], **more)
    assert planned(model, "float32", "eager") == pytest.approx(saved_bytes(model, lambda: forward(model)), rel=0.1)


def test_activations_with_a_frozen(one_thread):
    model = llama("float32", "eager", ALL, "b")
    both = planned(model, "float32", "eager")
    frozen = planned(model, "float32", "eager", "b")
    assert frozen < 0.9 * both
    assert frozen == pytest.approx(saved_bytes(model, lambda: forward(model)), rel=0.1)


def test_activations_of_an_encoder(one_thread):
    sizes = SIZES | {"max_position_embeddings": 64}
    base = BertForSequenceClassification(BertConfig(**sizes, attn_implementation="eager"))
    model = add_adapter(base, "classify", r=RANK, targets=["query", "value"])
    ids = torch.zeros(ROWS, WIDTH, dtype=torch.int64)
    found = saved_bytes(model, lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
    assert planned(model, "float32", "eager") == pytest.approx(found, rel=0.12)


def test_checkpointing_keeps_the_layers_inputs(one_thread):
    model = llama("float32", "eager", ["q_proj", "v_proj"])
    base = model.get_base_model()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    base.enable_input_require_grads()
    model.train()
    found = saved_bytes(model, lambda: forward(model))
    shape = memory.geometry(model)
    layer = memory.layer_bytes(shape, RANK, WIDTH, 4, "eager")
    inputs = memory.activation_bytes(shape, ROWS * WIDTH, layer, 4, checkpointing=True) - ROWS * WIDTH * layer
    assert inputs == pytest.approx(found, rel=0.1)


def test_next_token_tasks_keep_the_log_softmax(one_thread):
    model = llama("float32", "eager", ["q_proj", "v_proj"], vocab_size=2000)

    def loss():
        return torch.nn.functional.cross_entropy(forward(model).transpose(1, 2), torch.zeros(ROWS, WIDTH, dtype=torch.int64))

    assert planned(model, "float32", "eager", next_token=True) == pytest.approx(saved_bytes(model, loss), rel=0.1)


def live_peak(work):
    """Most bytes alive at once of those that `work` allocates."""
    work()  # what comes once
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("moment", ["norm or mlp", "logits", "attention"])
@pytest.mark.parametrize("attention", ["eager", "fused"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_most_that_a_batch_holds(dtype, attention, moment, checkpointing, one_thread):
    width, vocabulary = (256 if moment == "attention" else 16), (2000 if moment == "logits" else 50)
    model = llama(dtype, {"fused": "sdpa"}.get(attention, attention), ["q_proj", "v_proj"], vocab_size=vocabulary)
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.get_base_model().enable_input_require_grads()
        model.train()
    count = 512 // width
    objective = NextToken() if moment == "logits" else LabelWords([3, 4])
    engine = TorchEngine(model, objective, 0, 512)
    data = Encoded([[row % 40 + 1] * width for row in range(count)], np.zeros(count, np.int64))
    units = [np.array([row]) for row in range(count)]
    found = live_peak(lambda: list(engine.updates(data, units)))
    shape, item, text = memory.geometry(model), memory.ITEM[dtype], moment == "logits"
    layer = memory.layer_bytes(shape, RANK, width, item, attention)
    kept = memory.activation_bytes(shape, 512, layer, item, checkpointing=checkpointing, next_token=text)
    working = memory.working_bytes(shape, 512, width, layer, item, attention, checkpointing=checkpointing, next_token=text)
    assert kept + working == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("family", sorted(codecs.CODECS))
def test_codecs_are_as_large_as_planned(family, one_thread):
    """Every registered family: its code size and what it stores, from a layout alone."""
    shapes = {"A": (4, 300), "B": (200, 4)}
    layout = AdapterLayout.of((f"f{index}.lora_{side}", torch.zeros(shape)) for index in range(2) for side, shape in shapes.items())
    size = None if codecs.CODECS[family].fixed_size else {"powersgd": 1100}.get(family, 24)
    prior = from_public_gradients(layout, torch.randn(40, layout.size, generator=torch.Generator().manual_seed(1)))
    codec = codecs.CODECS[family].fit(prior, layout, size, 0.0, 0, steps=1)
    code = code_of(Config(codec=CodecConfig(family=family, code_size=size)), layout)
    stored = sum(tensor.nbytes for tensor in codec.state()[0].values())
    assert code.size == codec.code_size
    if family == "kronecker":
        assert stored <= code.stored <= 3 * stored  # at most so much
    else:
        assert code.stored == pytest.approx(stored, rel=0.02, abs=16)


@pytest.mark.parametrize("kept", [True, False])
def test_what_kroneckers_fit_holds(kept, one_thread, monkeypatch):
    monkeypatch.setattr(kronecker, "KEPT", kronecker.KEPT if kept else 0)
    monkeypatch.setattr(memory, "KRONECKER_KEPT", kronecker.KEPT)
    shapes = [(8, 3000), (3000, 8)] * 8
    layout = AdapterLayout.of((f"f{index}", torch.zeros(shape)) for index, shape in enumerate(shapes))
    prior = from_public_gradients(layout, torch.randn(50, layout.size, generator=torch.Generator().manual_seed(1)))
    found = live_peak(lambda: codecs.CODECS["kronecker"].fit(prior, layout, 500, 0.0, 0))
    stored = code_of(Config(codec=CodecConfig(family="kronecker", code_size=500)), layout).stored
    assert stored + memory.FITTING["kronecker"](stored, layout.size, 50, shapes) == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("family", ["linear", "chain"])
def test_what_a_subspaces_fit_holds(family, one_thread):
    layout = AdapterLayout.of((f"f{index}", torch.zeros(8, 4096)) for index in range(16))
    prior = from_public_gradients(layout, torch.randn(50, layout.size, generator=torch.Generator().manual_seed(1)))
    options = {"parts": ("allocation", "linear"), "inner_size": layout.size} if family == "chain" else {}
    found = live_peak(lambda: codecs.CODECS[family].fit(prior, layout, 20, 0.0, 0, **options))
    settings = CodecConfig(family=family, code_size=20, parts=["allocation", "linear"], public_examples=50)
    code = code_of(Config(codec=settings), layout)
    assert found == pytest.approx(code.stored + code.fitting, rel=0.2)


@pytest.mark.parametrize("count", [4, 16, 64])
def test_what_an_autoencoders_fit_holds(count, one_thread):
    """One sample and a window or a band: not the many copies that activations of a whole image take."""
    layout = AdapterLayout.of((f"f{index}", torch.zeros(8, 4096)) for index in range(2 * count))
    prior = from_moments(layout, torch.zeros(2 * count), torch.ones(2 * count))
    found = live_peak(lambda: codecs.CODECS["autoencoder"].fit(prior, layout, None, 0.0, 0, steps=1))
    assert memory.FITTING["autoencoder"](0, layout.size, 0, []) == pytest.approx(found, rel=0.2)


def test_an_autoencoder_of_7b(one_thread):
    """CG-FedLLM's figures: 8,388,608 values, 1/64."""
    assert required_code_size(8_388_608) == 131_072


LLAMA_7B = 6_738_415_616


def test_weights_by_zero_stage():
    whole = memory.weight_bytes(LLAMA_7B, 1000, 2, Ranks(8, "data", 2))
    assert whole == 2 * LLAMA_7B + 4000 == memory.weight_bytes(LLAMA_7B, 1000, 2, Ranks(8, "clients", 3))
    divided = memory.weight_bytes(LLAMA_7B, 0, 2, Ranks(8, "data", 3, live=0))
    assert divided == pytest.approx(2 * LLAMA_7B / 8, rel=1e-6)
    assert memory.weight_bytes(LLAMA_7B, 0, 2, Ranks(8, "data", 3, live=10**9)) == pytest.approx(divided + 2e9, rel=1e-6)
    assert memory.weight_bytes(LLAMA_7B, 0, 2, Ranks(8, "data", 3, offload=True, live=10**8)) == 2 * 10**8
    assert memory.weight_bytes(1000, 0, 2, Ranks(1, "data", 3)) == 2000  # one rank holds all, gathered or not


def test_optimizer_and_updates():
    assert memory.optimizer_bytes(100, "adam", Ranks()) == 4 * 100 * 6
    assert memory.optimizer_bytes(100, "sgd", Ranks(4, "data", 2)) == 4 * (25 + 300)
    assert memory.update_bytes(10, units=3, chunk=400) == 4 * 10 * 3
    assert memory.update_bytes(10, units=30, chunk=400) == 4 * 10 * 20  # one is coded while the next is computed
    assert memory.update_bytes(1000, units=30, chunk=400) == 4 * 1000 * 2


@pytest.mark.parametrize(("text", "bytes_"), [("24GiB", 24 * 2**30), ("80 GB", 80 * 10**9), ("512mib", 2**29), ("7", 7), ("1.5kB", 1500)])
def test_sizes_are_read(text, bytes_):
    assert memory.parse_bytes(text) == bytes_


@pytest.mark.parametrize("text", ["", "big", "-3GB", "0GiB", "3 parsecs", "1e9"])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="expected a size"):
        memory.parse_bytes(text)


def test_deepspeed_files(tmp_path):
    def read(content, mode="none"):
        path = tmp_path / "zero.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return memory.read_deepspeed(path, 4, mode)

    assert read({}) == Ranks(4, "clients", 0)
    assert read({"zero_optimization": {"stage": 2}}) == Ranks(4, "data", 2)
    assert read({"zero_optimization": {"stage": 2}}, "clients").mode == "clients"
    full = {"stage": 3, "offload_param": {"device": "cpu"}, "stage3_max_live_parameters": "auto"}
    assert read({"zero_optimization": full, "activation_checkpointing": {"x": 1}}) == Ranks(4, "data", 3, offload=True, checkpointing=True)
    assert read({"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 1e8}}).live == 10**8
    for wrong in ("{", "[]", {"zero_optimization": {"stage": 4}}, {"zero_optimization": 3}):
        with pytest.raises(UserError, match=r"zero\.json"):
            read(wrong)
    with pytest.raises(UserError, match="No such file"):
        memory.read_deepspeed(tmp_path / "none.json", 1, "none")


def test_llama_7b_by_hand():
    """One layer of LLaMA-7B, bfloat16, fused attention, LoRA r = 8 on q and v: the sum of the module's docstring, written out."""
    shape = Geometry(32, 4096, 32, 128, 11008, 32000, True, True, (("q_proj", 4096), ("v_proj", 4096)))
    norms, attention, mlp, lora = 2 * 4 * 4096, 3 * 2 * 4096 + 2 * 4096 + 4 * 32, 3 * 2 * 11008, 2 * (4 * 4096 + 4 * 8)
    assert memory.layer_bytes(shape, 8, 512, 2, "fused") == norms + attention + mlp + lora
