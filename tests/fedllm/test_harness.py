"""Question benchmarks through lm-eval, against answers picked by hand from the model's own logits."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from fedllm import cli, harness
from fedllm.adapters import save_adapter
from fedllm.config import load_config, save_config
from fedllm.models import load_model

FILES = Path(__file__).parent / "benchmark_tasks"
LETTERS = "ABCD"
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (extra eval)")


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run's folder with a tiny model that reads the questions' characters, and an adapter that is no zero."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("asked") / "run"
    folder.mkdir()
    letters = sorted({letter for path in FILES.glob("*.jsonl") for letter in path.read_text()} | set("Answer答案：:. \n"))
    words = ["<unk>", "</s>", *letters]
    config = load_config(tiny / "config.yaml", [f"output_dir={folder}", f"model.name={folder.parent / 'model'}", "lora.r=4"])
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
    torch.manual_seed(3)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), bos_token_id=None, eos_token_id=1, **sizes)).save_pretrained(config.model.name)
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>").save_pretrained(config.model.name)
    model, _ = load_model(config.model.name, "labels", dtype="float32", r=4, alpha=4, targets=config.lora.targets)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 2.0)
    save_adapter(model, folder / "adapter")
    save_config(config, folder / "config.yaml")
    return folder


def by_hand(folder, adapted, shots):
    """Accuracy of each subject: the letter with the largest logit after the prompt, written out here."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = load_config(folder / "config.yaml")
    model = AutoModelForCausalLM.from_pretrained(config.model.name)
    tokenizer = AutoTokenizer.from_pretrained(config.model.name)
    if adapted:
        model = PeftModel.from_pretrained(model, folder / "adapter")

    def read(name):
        return [json.loads(line) for line in (FILES / name).read_text().splitlines()]

    def english(one):
        return one["question"] + "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, one["choices"], strict=True)) + "\nAnswer:"

    def chinese(one):
        return one["question"] + "".join(f"\n{letter}. {one[letter]}" for letter in LETTERS) + "\n答案："

    found = {}
    topic = "以下是中国关于{}的单项选择题，请选出其中的正确答案。\n\n"
    about = "The following are multiple choice questions (with answers) about {}.\n\n"
    for subject, ask, first, examples in (
        ("everyday_science", english, about.format("everyday science"), "english_dev.jsonl"),
        ("everyday_geography", english, about.format("everyday geography"), "english_dev.jsonl"),
        ("shenghuo_kexue", chinese, topic.format("日常科学"), "chinese_dev.jsonl"),
        ("shenghuo_dili", chinese, topic.format("日常地理"), "chinese_dev.jsonl"),
    ):
        right = 0
        letter_of = (lambda one: LETTERS[one["answer"]]) if ask is english else (lambda one: one["answer"])
        before = first + "".join(f"{ask(one)} {letter_of(one)}\n\n" for one in read(examples)[:shots])
        questions = read(f"{subject}.jsonl")
        for one in questions:
            prompt = tokenizer(before + ask(one) + " ", return_tensors="pt", add_special_tokens=False)["input_ids"]
            with torch.inference_mode():
                logits = model(input_ids=prompt).logits[0, -1]
            ids = [tokenizer.convert_tokens_to_ids(letter) for letter in LETTERS]
            right += LETTERS[int(logits[ids].argmax())] == letter_of(one)
        found[subject] = right / len(questions)
    return found


@needs_lm_eval
@pytest.mark.parametrize("shots", [0, 2])
def test_both_shapes_of_questions_before_and_after(finished, shots, capfd, one_thread):
    arguments = ["evaluate", str(finished), "--tasks", "local_mmlu,local_ceval", "--task-files", str(FILES), "--shots", str(shots)]
    assert cli.run([*arguments, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    before, after = by_hand(finished, False, shots), by_hand(finished, True, shots)
    assert before != after  # or nothing would be told apart
    assert {one["subject"]: one["before"] for one in found["subjects"]} == pytest.approx(before)
    assert {one["subject"]: one["after"] for one in found["subjects"]} == pytest.approx(after)
    assert all(one["questions"] == 6 and one["metric"] == "acc" and one["shots"] == shots for one in found["subjects"])
    groups = {one["task"]: one["after"] for one in found["groups"]}
    assert groups["local_mmlu"] == pytest.approx((after["everyday_science"] + after["everyday_geography"]) / 2)


@needs_lm_eval
def test_the_table_and_a_limit(finished, capfd, one_thread):
    arguments = ["evaluate", str(finished), "--tasks", "local_mmlu", "--task-files", str(FILES), "--limit", "2"]
    assert cli.run(arguments) == 0
    out = capfd.readouterr().out
    assert "everyday_science" in out and "local_mmlu" in out and "before" in out and " 2 " in out


@needs_lm_eval
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tasks", "mmlo"], "did you mean mmlu?"),
        (["--tasks", "local_mmlu"], "lm-eval knows no such task"),
        (["--tasks", ","], "expected names"),
        (["--tasks", "mmlu", "--task-files", "/nowhere"], "no such folder"),
        (["--tasks", "mmlu", "--limit", "0"], "--limit 0"),
        (["--tasks", "mmlu", "--shots", "-1"], "--shots -1"),
        (["--shots", "1"], "expected --tasks"),
    ],
)
def test_bad_input_is_one_line(arguments, says, finished, capfd):
    assert cli.run(["evaluate", str(finished), *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == "" and says in err.splitlines()[-1] and err.count("fedllm: error:") == 1


@needs_lm_eval
def test_questions_that_cannot_be_had(finished, tmp_path, capfd):
    (tmp_path / "gone.yaml").write_text(
        "task: gone\ndataset_path: json\ndataset_kwargs: {data_files: {test: none.jsonl}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: [A, B]\ndoc_to_target: 0\n"
    )
    assert cli.run(["evaluate", str(finished), "--tasks", "gone", "--task-files", str(tmp_path)]) == 2
    assert "the questions cannot be had" in capfd.readouterr().err.splitlines()[-1]


@needs_lm_eval
def test_runs_that_cannot_be_asked(finished, tmp_path, capfd):
    config = load_config(finished / "config.yaml", ["task.kind=classify"])
    (tmp_path / "adapter").mkdir()
    save_config(config, tmp_path / "config.yaml")
    assert cli.run(["evaluate", str(tmp_path), "--tasks", "mmlu"]) == 2
    assert "answers no questions" in capfd.readouterr().err
    (tmp_path / "adapter").rmdir()
    assert cli.run(["evaluate", str(tmp_path), "--tasks", "mmlu"]) == 2
    assert "has no adapter" in capfd.readouterr().err


def test_without_lm_eval_one_line_says_how_to_get_it(finished, monkeypatch, capfd):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    assert cli.run(["evaluate", str(finished), "--tasks", "mmlu"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "pip install 'dr-encoder[eval]'" in err


def test_every_question_has_one_answer_of_four():
    for path in FILES.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            one = json.loads(line)
            texts = one.get("choices") or [one[letter] for letter in LETTERS]
            assert len(set(texts)) == 4 and one["answer"] in (range(4) if "choices" in one else LETTERS)
    assert sum(len(path.read_text().splitlines()) for path in FILES.glob("[es][hv]*.jsonl") if "_dev" not in path.name) == 24
