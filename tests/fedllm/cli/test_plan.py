"""`fedllm plan` as a user types it."""

import json

import pytest

from fedllm import cli

# What calibrates in a moment: the server's epsilon is a closed form.
SERVER = ["privacy.target.adversary=server", "privacy.target.epsilon=300"]


def test_the_table_and_the_json(tiny, capfd, tmp_path):
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 3}}')
    arguments = ["plan", str(tiny / "config.yaml"), *SERVER, "--memory", "1GiB"]
    assert cli.run([*arguments, "--ranks", "2", "--deepspeed", str(tmp_path / "zero.json")]) == 0
    out, _ = capfd.readouterr()
    for text in ("trainable", "bytes up", "memory, weights", "2 ranks, data, ZeRO 3", "fits into 1.07 GB", "after 2", "cohort needed"):
        assert text in out
    assert "warning" not in out
    assert cli.run([*arguments, "--json", "--attention", "eager"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["trainable_parameters"], found["code_size"], found["rounds"]) == (224, 8, 2)
    assert 1 <= found["needs"]["cohort"] <= 40 and found["memory"]["attention"] == "eager" and found["warnings"] == []
    assert found["privacy"]["by_round"][-1]["release"] == found["privacy"]["release"]["epsilon"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--memory", "lots"], "--memory lots: expected a size"),
        (["--ranks", "0"], "--ranks 0"),
        (["--attention", "flash"], "expected one of fused, eager"),
        (["--signal-share", "2"], "at most 1"),
        (["--noise-to-signal", "0"], "--noise-to-signal 0"),
        (["--deepspeed", "/nowhere.json"], "/nowhere.json"),
        (["--model-config", "/nowhere"], "expected a folder with config.json"),
        (["federation.roundz=3"], "did you mean federation.rounds?"),
    ],
)
def test_bad_input_is_one_line(arguments, says, tiny, capfd):
    assert cli.run(["plan", str(tiny / "config.yaml"), *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == "" and says in err.splitlines()[-1] and err.count("fedllm: error:") == 1
