"""Public text that the base model writes: the same for everybody, kept, and named as what it is."""

import json

import pytest
import torch

from fedllm import run
from fedllm.data import generated, sources
from fedllm.errors import UserError
from fedllm.evaluation import evaluate_run
from fedllm.models import load_model, load_writer
from fedllm.monitor import Display
from fedllm.privacy.ledger import read_ledger
from fedllm.schema import GenerateConfig

pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")

TASK = GenerateConfig(prompt="the film of {words}", count=37, max_new_tokens=6)  # more than a batch
SMALL = ["task.public=generated", "task.generate.count=40", "task.generate.max_new_tokens=6"]


@pytest.fixture(scope="module")
def loaded(tiny):
    model, tokenizer = load_model(str(tiny / "model"), dtype="float32", r=2)
    return model.get_base_model(), tokenizer


def written(loaded, task=TASK):
    return [text for some in generated.write(*loaded, task) for text in some]


def texts(loaded, tiny, display):
    return generated.texts(lambda: loaded, str(tiny / "model"), TASK, display.phase)


def test_the_texts_are_a_function_of_the_model_and_the_request(loaded):
    state, side = torch.get_rng_state(), loaded[1].padding_side
    first = written(loaded)
    assert torch.equal(torch.get_rng_state(), state) and loaded[1].padding_side == side
    torch.manual_seed(1)
    assert written(loaded) == first
    assert len(first) == 37 and len(set(first)) > 30
    assert written(loaded, GenerateConfig("a story", None, 37, 6)) != first


def test_a_batch_is_what_a_plain_loop_writes(loaded, monkeypatch):
    """Sampling with next to no choice is greedy: unlike requests side by side and with a cache, as one by one without."""
    monkeypatch.setattr(generated, "TOP_P", 1e-6)
    monkeypatch.setattr(generated, "LEAST_TOKENS", 0)
    requests = ["the film", "a long story of music and the team with", "scene"]
    monkeypatch.setattr(generated, "prompts", lambda *args: requests)
    model, tokenizer = loaded
    expected = []
    for request in requests:
        ids = tokenizer(request + "\n", add_special_tokens=False)["input_ids"]
        start = len(ids)
        while len(ids) < start + 6 and ids[-1] != tokenizer.eos_token_id:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(" ".join(tokenizer.decode(ids[start:], skip_special_tokens=True).split()))
    assert written(loaded) == expected


def test_a_chat_model_is_asked_through_its_template(loaded, monkeypatch):
    _, tokenizer = loaded
    assert generated.ask(tokenizer, "Hello") == "Hello\n"
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert generated.ask(tokenizer, "Hello") == "[user]Hello[assistant]"


def test_every_request_has_other_words():
    asked = generated.prompts(TASK)
    assert len(asked) == 37 and len(set(asked)) > 30
    for request in asked:
        one, other = request.removeprefix("the film of ").split(" and ")
        assert one != other and {one, other} <= set(generated.WORDS)
    assert generated.prompts(GenerateConfig(prompt="{text} {", count=2)) == ["{text} {"] * 2
    assert generated.prompts(GenerateConfig(prompt="the film of {words}", count=5)) == asked[:5]


def test_labels_are_asked_for_in_turn():
    task = GenerateConfig(prompt="a {label} film of {words}", count=5)
    asked = generated.prompts(task, ["bad", "good", "odd"])
    assert [request.split()[1] for request in asked] == ["bad", "good", "odd", "bad", "good"]
    plain = generated.prompts(GenerateConfig(prompt="the film of {words}", count=5))
    assert [request.split(" of ")[1] for request in asked] == [request.split(" of ")[1] for request in plain]


def test_each_text_keeps_the_label_it_was_asked_for(loaded, tiny, monkeypatch):
    """Blank texts are left out without moving the labels of those behind them, when written and when read from the cache."""
    task, words = GenerateConfig(prompt="a {label} film", count=7, max_new_tokens=6), ["bad", "good", "odd"]
    monkeypatch.setattr(generated, "write", lambda *args: iter([["b0", "", "o2", "b3"], ["", "o5", "b6"]]))
    for _ in range(2):
        found, labels = generated.texts(lambda: loaded, str(tiny / "model"), task, Display().phase, words)
        assert found == ["b0", "o2", "b3", "o5", "b6"] and [words[i][0] for i in labels] == [text[0] for text in found]
        monkeypatch.setattr(generated, "write", lambda *args: pytest.fail("written again"))
    assert generated.key("m", task, words) != generated.key("m", task, words[::-1])


def test_they_are_written_once(loaded, tiny, monkeypatch):
    shown = []

    class Shown(Display):
        def phase(self, text, total=None):
            shown.append((text, total))
            return super().phase(text, total)

    first = texts(loaded, tiny, Shown())
    assert shown == [("the base model writes 37 texts", 37)] and first == ([text for text in written(loaded) if text], None)
    monkeypatch.setattr(generated, "write", lambda *args: pytest.fail("written again"))
    assert texts(loaded, tiny, Shown()) == first and len(shown) == 1


def test_another_request_or_model_is_another_text(tiny, tmp_path):
    source = tmp_path / "model"
    source.mkdir()
    (source / "weights").write_text("1")
    keys = {generated.key(str(source), TASK), generated.key("owner/name", TASK), generated.key(str(tiny / "model"), TASK)}
    for field, value in (("prompt", "x"), ("count", 36), ("max_new_tokens", 7)):
        keys.add(generated.key(str(source), GenerateConfig(**vars(TASK) | {field: value})))
    (source / "weights").write_text("12")
    keys.add(generated.key(str(source), TASK))
    assert len(keys) == 7


def test_a_cache_that_cannot_be_written_is_one_line(loaded, tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "file" / "under"))
    with pytest.raises(UserError, match=r"^task\.public=generated: cannot write to .*FEDLLM_CACHE to another folder$"):
        texts(loaded, tiny, Display())


def test_a_run_on_generated_text_names_it_in_the_ledger(configured, tmp_path, no_plot, monkeypatch):
    results = run.train(configured("run", *SMALL))
    _, entries = read_ledger(tmp_path / "run" / "ledger.jsonl")
    assert results["rounds"] == 2 and results["epsilon"]["private"]
    assert all(entry["prior"].startswith("generated:") for entry in entries)
    (file,) = (tmp_path / "cache" / "generated").iterdir()
    assert 30 <= len(json.loads(file.read_text())) <= 40
    monkeypatch.setattr(generated, "texts", lambda *args: pytest.fail("a model that is only looked at needs no public text"))
    assert evaluate_run(tmp_path / "run", Display().phase)["loss"] == results["loss"]


def test_clients_and_server_write_the_same_text(configured, tmp_path, no_plot):
    results = run.train(configured("run", *SMALL, "codec.fit_at=client", "codec.prior=public+random"))
    assert results["downlink_bytes_per_client_round"] < results["codec_bytes"]
    _, entries = read_ledger(tmp_path / "run" / "ledger.jsonl")
    assert all(entry["prior"].startswith("generated+random:") for entry in entries)


def test_the_base_model_writes_whatever_the_lora_start_is(configured, tmp_path, no_plot):
    found = []
    for seed in (1, 2):
        run.train(configured(f"run{seed}", *SMALL, f"seed={seed}", "federation.rounds=1"))
        found.append([file.read_bytes() for file in (tmp_path / "cache" / "generated").iterdir()])
    assert found[0] == found[1]


def test_another_model_writes_for_one_that_cannot(configured, tiny, tmp_path, no_plot, monkeypatch):
    """A classifier's public text is what the named model writes, asked with nothing but the request."""
    more = ["task.kind=classify", "task.prompt=null", "task.words=null", f"task.generate.model={tiny / 'model'}"]
    results = run.train(configured("run", *SMALL, *more, "task.generate.prompt=the film of {words}", "federation.rounds=1"))
    assert results["rounds"] == 1
    (file,) = (tmp_path / "cache" / "generated").iterdir()
    writer, request = str(tiny / "model"), GenerateConfig("the film of {words}", None, 40, 6)
    assert json.loads(file.read_text()) == written(load_writer(writer), request)


def test_generated_text_has_no_labels():
    with pytest.raises(UserError, match=r"^generated: .*expected it in task\.public alone"):
        sources.load("generated")
