"""What a DeepSpeed file says, and one line for each that contradicts the config."""

import importlib.util
import json
from pathlib import Path

import pytest

from fedllm.config import check_engine
from fedllm.errors import UserError
from fedllm.schema import Config
from fedllm.training.deepspeed_file import read
from fedllm.training.engines import ENGINES

SHIPPED = Path("configs/deepspeed")


@pytest.fixture
def reading(tmp_path):
    """reading(settings, ranks, bfloat16): the file that holds these settings, read for a run on so many ranks."""

    def get(settings, ranks=2, dtype="float32"):
        path = tmp_path / "ds.json"
        path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
        config = Config()
        config.model.dtype = dtype
        return read(path, config, ranks)

    return get


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name, stage", [("zero0", 0), ("zero1", 1), ("zero2", 2), ("zero3", 3), ("zero3_offload", 3)])
def test_shipped_files_fit_any_ranks_and_precision(reading, name, stage, dtype):
    file = reading((SHIPPED / f"{name}.json").read_text(), ranks=3, dtype=dtype)
    assert (file.stage, file.micro_batch) == (stage, None)
    assert file.settings["zero_optimization"]["stage"] == stage
    assert "auto" not in json.dumps(file.settings)


def test_no_shipped_file_is_forgotten():
    assert sorted(path.stem for path in SHIPPED.glob("*.json")) == ["zero0", "zero1", "zero2", "zero3", "zero3_offload"]


@pytest.mark.parametrize(
    "sizes, micro",
    [
        ({}, None),
        ({"train_micro_batch_size_per_gpu": 4}, 4),
        ({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3, "train_batch_size": 24}, 4),
        ({"train_batch_size": 24, "gradient_accumulation_steps": 3}, 4),
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": "auto"}, 4),
    ],
)
def test_batch_sizes(reading, sizes, micro):
    file = reading(sizes)
    assert file.micro_batch == micro
    assert file.settings["train_micro_batch_size_per_gpu"] == (micro or 1)


WRONG = {
    "malformed": ("{", "no JSON"),
    "no object": ([], "expected a JSON object"),
    "no object inside": ({"zero_optimization": 3}, "expected a JSON object"),
    "unknown stage": ({"zero_optimization": {"stage": 4}}, "stage=4: expected 0, 1, 2 or 3"),
    "product": (
        {"train_batch_size": 7, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1},
        "train_batch_size=7: expected 2 a rank x 1 steps x 2 ranks = 4",
    ),
    "not divisible": ({"train_batch_size": 7}, "train_batch_size=7: expected"),
    "no number": ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu=0: expected a whole number"),
    "too many tokens": ({"train_micro_batch_size_per_gpu": 100}, "more than engine.batch_tokens=2048; expected at least 6400"),
    "bf16": ({"bf16": {"enabled": True}}, "bf16.enabled=true: expected model.dtype=bfloat16 with it, not float32"),
    "fp16": ({"fp16": {"enabled": True}}, "fp16: expected none of it"),
    "clipping": ({"gradient_clipping": 1.0}, "gradient_clipping: expected none of it; here that is privacy.clip"),
    "scheduler": ({"scheduler": {"type": "WarmupLR"}}, "scheduler: expected none of it"),
    "optimizer": ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}, "optimizer.type=AdamW: expected SGD"),
    "its rate": ({"optimizer": {"type": "SGD", "params": {"lr": 0.5}}}, "lr=0.5: expected federation.local.lr=1"),
    "its momentum": ({"optimizer": {"type": "SGD", "params": {"momentum": 0.9}}}, "momentum=0.9: expected plain SGD"),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_line_for_what_contradicts(reading, name):
    settings, line = WRONG[name]
    with pytest.raises(UserError) as error:
        reading(settings)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_bf16_off_is_no_bfloat16_model(reading):
    with pytest.raises(UserError, match=r"bf16.enabled=false: expected model.dtype=float32"):
        reading({"bf16": {"enabled": False}}, dtype="bfloat16")
    assert reading({"bf16": {"enabled": True}, "optimizer": {"type": "SGD", "params": {"lr": "auto"}}}, dtype="bfloat16").stage == 0


def test_no_file_there():
    with pytest.raises(UserError, match=r"engine.deepspeed=nowhere.json: No such file.*zero2.json"):
        read(Path("nowhere.json"), Config(), 2)


def test_deepspeed_is_named_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"engine.name=deepspeed: needs DeepSpeed.*pip install 'dr-encoder\[deepspeed\]'"):
        ENGINES["deepspeed"](Config())


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"engine.deepspeed": "zero2.json"}, "engine.deepspeed=zero2.json: expected engine.name=deepspeed with it"),
        ({"engine.name": "deepspeed"}, "engine.name=deepspeed: expected engine.deepspeed, such as configs/deepspeed/zero2.json"),
        ({"parallel.mode": "data"}, "parallel.mode=data: expected engine.name=deepspeed, not torch"),
        ({"engine.name": "deepspeed", "engine.deepspeed": "f", "parallel.mode": "clients"}, "expected parallel.mode=data, not clients"),
        ({"engine.name": "deepspeed", "engine.deepspeed": "f", "federation.aggregation": "stack"}, "aggregation=stack: expected mean"),
        ({"engine.name": "deepspeed", "engine.deepspeed": "f", "lora.init": "public"}, "lora.init=public: expected random"),
    ],
)
def test_engines_that_do_not_fit_the_config(changes, line):
    config = Config()
    for key, value in changes.items():
        part, _, name = key.partition(".")
        setattr(getattr(config, part), name, value)
    with pytest.raises(UserError) as error:
        check_engine(config)
    assert line in str(error.value)
