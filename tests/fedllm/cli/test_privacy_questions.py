"""`fedllm privacy epsilon` and `calibrate`: what they answer, what they refuse, and how they say it."""

import json
import subprocess
import sys

import pytest

from fedllm import cli
from fedllm.privacy import accountants

EXAMPLE = ["--noise-multiplier", "1.5", "--sampling-rate", "0.04", "--steps", "2250"]
ANSWER_KEYS = {"accountant", "epsilon", "delta", "kind", "direction", "interval", "conversion", "relation", "unit", "seconds"}


@pytest.fixture
def ask(capsys):
    """ask(arguments...): the JSON object that the command prints."""

    def run(*arguments):
        assert cli.run(["privacy", *arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_every_accountant_answers_or_is_refused(ask):
    found = ask("epsilon", *EXAMPLE, "--delta", "1e-5", "--accountant", "all")
    assert all(answer.keys() >= ANSWER_KEYS for answer in found["answers"])
    told = {answer["accountant"] for answer in found["answers"]} | {refusal["accountant"] for refusal in found["refused"]}
    assert told == set(accountants.names())
    assert found["quote"] == "pld"
    by_name = {answer["accountant"]: answer for answer in found["answers"]}
    assert by_name["pld"]["epsilon"] == pytest.approx(6.7688, rel=1e-4)
    for answer in found["answers"]:
        if (answer["kind"], answer["direction"]) == ("bound", "upper"):
            assert answer["epsilon"] >= by_name["pld_optimistic"]["epsilon"]


def test_an_exact_figure_is_quoted_where_there_is_one(ask):
    found = ask("epsilon", "--noise-multiplier", "2", "--sampling-rate", "1", "--steps", "4", "--delta", "1e-5", "--accountant", "all")
    assert found["quote"] == "gdp"
    by_name = {answer["accountant"]: answer for answer in found["answers"]}
    assert by_name["gdp"]["epsilon"] == pytest.approx(4.377178096, rel=1e-8)
    assert found["refused"] == []


def test_delta_for_an_epsilon(ask):
    found = ask("epsilon", "--noise-multiplier", "0.5", "--sampling-rate", "0.2", "--steps", "3", "--epsilon", "1")["answers"][0]
    assert (found["epsilon"], found["delta"]) == (1.0, pytest.approx(0.15594, rel=1e-3))


def test_steps_that_a_budget_allows(ask):
    arguments = ["--noise-multiplier", "3", "--sampling-rate", "0.1", "--delta", "1e-6"]
    found = ask("epsilon", *arguments, "--epsilon", "2")
    assert found["answers"][0]["steps"] == 155 and found["quote"] == "pld"
    assert ask("epsilon", *arguments, "--steps", "155")["answers"][0]["epsilon"] <= 2
    assert ask("epsilon", *arguments, "--steps", "156")["answers"][0]["epsilon"] > 2


def test_phases_are_composed(ask):
    whole = ask("epsilon", "--noise-multiplier", "1", "--sampling-rate", "0.02", "--steps", "300", "--delta", "1e-5")
    parts = ask("epsilon", "--phase", "1,0.02,100", "--phase", "1,0.02,200", "--delta", "1e-5")
    assert parts["answers"][0]["epsilon"] == whole["answers"][0]["epsilon"]


def test_replace_one_costs_more(ask):
    arguments = ["epsilon", *EXAMPLE, "--delta", "1e-5"]
    assert ask(*arguments, "--relation", "replace-one")["answers"][0]["epsilon"] > ask(*arguments)["answers"][0]["epsilon"]


def test_a_group_of_clients_costs_more_than_one(ask):
    arguments = ["epsilon", "--noise-multiplier", "2", "--sampling-rate", "0.02", "--steps", "200", "--delta", "1e-5"]
    assert ask(*arguments, "--group", "3")["answers"][0]["epsilon"] > ask(*arguments)["answers"][0]["epsilon"]


def test_fixed_size_cohorts_have_the_rdp_bound_alone(ask):
    arguments = ["--noise-multiplier", "4", "--population", "1000", "--cohort", "20", "--steps", "100", "--delta", "1e-5"]
    found = ask("epsilon", *arguments, "--relation", "replace-one", "--accountant", "all")
    assert {answer["accountant"] for answer in found["answers"]} == {"rdp", "rdp_classic"} and found["quote"] == "rdp"


def test_calibration_is_rounded_up_and_checked_back(ask):
    found = ask("calibrate", "--epsilon", "1", "--sampling-rate", "0.1", "--steps", "512", "--delta", "1e-6")
    assert found.keys() >= {"query", "accountant", "noise_multiplier", "epsilon"}
    assert found["noise_multiplier"] == pytest.approx(9.66, abs=0.01) and 0.99 < found["epsilon"] <= 1
    again = ask(
        "epsilon", "--noise-multiplier", str(found["noise_multiplier"]), "--sampling-rate", "0.1", "--steps", "512", "--delta", "1e-6"
    )
    assert again["answers"][0]["epsilon"] == found["epsilon"]
    rdp = next(other for other in found["others"] if other["accountant"] == "rdp")
    assert rdp["off_by"] == pytest.approx(rdp["epsilon"] / found["epsilon"] - 1) and rdp["off_by"] > 0


@pytest.mark.parametrize(
    "extra",
    [
        ["--sampling-rate", "0.02"],
        ["--sampling-rate", "0.02", "--group", "2"],
        ["--sampling-rate", "0.02", "--relation", "replace-one"],
        ["--sampling-rate", "1"],
    ],
)
def test_an_independent_library_agrees(extra, ask):
    found = ask("epsilon", "--noise-multiplier", "2", "--steps", "100", "--delta", "1e-5", "--check", *extra)
    assert found["check"]["epsilon"] > 0 and -1e-6 <= found["check"]["difference"] < 1e-3


def test_where_the_library_has_no_figure(ask, capsys):
    fixed = ["--noise-multiplier", "4", "--population", "1000", "--cohort", "20", "--steps", "10", "--delta", "1e-5", "--check"]
    assert ask("epsilon", *fixed, "--relation", "replace-one", "--accountant", "rdp")["check"]["epsilon"] is None
    assert cli.run(["privacy", "epsilon", *EXAMPLE, "--epsilon", "1", "--check"]) == 2
    assert "--check" in capsys.readouterr().err
    short = ["--noise-multiplier", "2", "--sampling-rate", "0.1", "--steps", "9", "--delta", "1e-5"]
    assert cli.run(["privacy", "epsilon", *short, "--check"]) == 0
    assert "dp-accounting's own PLD says" in capsys.readouterr().out


def test_the_library_is_not_asked_for_losses_that_would_take_it_minutes(ask):
    found = ask("epsilon", "--noise-multiplier", "0.01", "--sampling-rate", "0.1", "--steps", "10", "--delta", "1e-5", "--check")
    assert found["check"]["epsilon"] is None and found["answers"][0]["epsilon"] > 1000


def test_no_more_steps_are_claimed_than_were_tried(ask, capsys):
    budget = ["--noise-multiplier", "100", "--sampling-rate", "1e-8", "--epsilon", "9", "--delta", "0.5", "--accountant", "rdp"]
    assert ask("epsilon", *budget)["answers"][0]["steps"] is None
    assert cli.run(["privacy", "epsilon", *budget]) == 0
    assert "quote: 1,000,000,000 or more steps by rdp" in capsys.readouterr().out


def test_a_vacuous_end_of_an_interval_is_not_infinity_on_both_sides(capsys):
    assert cli.run(["privacy", "epsilon", *EXAMPLE, "--epsilon", "1e300", "--accountant", "edgeworth_1"]) == 0
    out = capsys.readouterr().out
    assert "∞" not in out and " 0 to " in out


def test_a_target_that_no_noise_reaches_names_the_flag(capsys):
    target = ["--epsilon", "1e-6", "--delta", "1e-12", "--sampling-rate", "1", "--steps", "1000000"]
    assert cli.run(["privacy", "calibrate", *target]) == 2
    assert "--epsilon 1e-06: no noise multiplier up to 1e+06" in capsys.readouterr().err


def test_tables(capsys):
    assert cli.run(["privacy", "epsilon", *EXAMPLE, "--delta", "1e-5", "--accountant", "all"]) == 0
    out = capsys.readouterr().out
    assert "quote: ε = 6.77 at δ = 1e-5 by pld (bound" in out and "estimate" in out and "edgeworth_3" in out
    assert cli.run(["privacy", "calibrate", "--epsilon", "3", *EXAMPLE[2:], "--delta", "1e-5", "--accountant", "gdp"]) == 0
    out = capsys.readouterr().out
    assert "no guarantee" in out and "against gdp" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--noise-multiplier", "-1", "--sampling-rate", "0.1", "--steps", "5", "--delta", "1e-5"], ["--noise-multiplier -1", ">= 0"]),
        (["--noise-multiplier", "nan", "--sampling-rate", "0.1", "--steps", "5", "--delta", "1e-5"], ["--noise-multiplier nan"]),
        (["--noise-multiplier", "1", "--sampling-rate", "1.2", "--steps", "5", "--delta", "1e-5"], ["--sampling-rate 1.2", "[0, 1]"]),
        (["--noise-multiplier", "1", "--steps", "5", "--delta", "1e-5"], ["--sampling-rate", "[0, 1]"]),
        (["--sampling-rate", "0.1", "--steps", "5", "--delta", "1e-5"], ["--noise-multiplier is missing"]),
        ([*EXAMPLE, "--delta", "1"], ["--delta 1", "[1e-12, 1)"]),
        ([*EXAMPLE, "--epsilon", "-1"], ["--epsilon -1", ">= 0"]),
        ([*EXAMPLE], ["--delta"]),
        ([*EXAMPLE, "--delta", "1e-5", "--epsilon", "1"], ["--steps"]),
        (["--noise-multiplier", "1", "--sampling-rate", "0.1", "--steps", "-5", "--delta", "1e-5"], ["--steps -5"]),
        (["--phase", "1,0.1", "--delta", "1e-5"], ["--phase 1,0.1", "S,Q,T"]),
        (["--phase", "1,2,5", "--delta", "1e-5"], ["--phase 1,2,5: sampling rate 2", "[0, 1]"]),
        ([*EXAMPLE, "--phase", "1,0.1,5", "--delta", "1e-5"], ["--phase"]),
        ([*EXAMPLE, "--delta", "1e-5", "--relation", "swap"], ["--relation swap", "replace-one"]),
        ([*EXAMPLE, "--delta", "1e-5", "--accountant", "moments"], ["--accountant moments", "pld"]),
        ([*EXAMPLE, "--delta", "1e-5", "--group", "0"], ["--group 0", ">= 1"]),
        ([*EXAMPLE, "--delta", "1e-5", "--cohort", "5"], ["--population and --cohort"]),
        ([*EXAMPLE, "--delta", "1e-5", "--relation", "replace-one", "--accountant", "rdp"], ["rdp", "theorem"]),
        (
            ["--noise-multiplier", "1", "--population", "100", "--cohort", "5", "--steps", "5", "--delta", "1e-5", "--accountant", "pld"],
            ["pld", "fixed-size"],
        ),
        (["--noise-multiplier", "1", "--population", "5", "--cohort", "6", "--steps", "5", "--delta", "1e-5"], ["--cohort 6"]),
    ],
)
def test_bad_questions_are_one_line(arguments, words, capsys):
    assert cli.run(["privacy", "epsilon", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert all(word in captured.err for word in words), captured.err


@pytest.mark.parametrize(("flag", "value"), [("--epsilon", "0"), ("--epsilon", "-1"), ("--delta", "2"), ("--steps", "0")])
def test_impossible_targets(flag, value, capsys):
    flags = {"--epsilon": "1", "--sampling-rate": "0.1", "--steps": "10", "--delta": "1e-5"} | {flag: value}
    assert cli.run(["privacy", "calibrate", *(part for pair in flags.items() for part in pair)]) == 2
    assert flag in capsys.readouterr().err


def test_starts_without_torch():
    code = (
        "import sys; from fedllm import cli;"
        f"status = cli.run(['privacy', 'epsilon', *{EXAMPLE}, '--delta', '1e-5', '--accountant', 'all', '--json']);"
        "sys.exit(status or ('torch' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
