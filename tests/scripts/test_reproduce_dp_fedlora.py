"""scripts/reproduce_dp_fedlora_privacy.py: the figures of the published setting, and what is printed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedllm.privacy.events import ADD_REMOVE, REPLACE_ONE

SCRIPT = Path(__file__).parents[2] / "scripts" / "reproduce_dp_fedlora_privacy.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("reproduce_dp_fedlora_privacy", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_known_figures_follow_from_delta_1e_5(script):
    found = script.reproduce(script.Setting())
    assert found["delta"] == 1e-5
    assert found["noise_multiplier"] == pytest.approx(4.844805 / 25, rel=1e-6)
    one, joint, expected, worst = found["rows"]
    assert one["epsilon"][ADD_REMOVE] == pytest.approx(34.6, abs=0.05)
    assert joint["epsilon"][ADD_REMOVE] == pytest.approx(1950, rel=2e-3)
    assert (one["claimed"], joint["claimed"], expected["claimed"]) == (25, 25, 500)
    assert (expected["releases"], worst["releases"]) == (128 * 20, 128 * 200)
    # mu^2/2 is what is left of epsilon where mu is large.
    assert worst["epsilon"][ADD_REMOVE] == pytest.approx(128 * 200 / found["noise_multiplier"] ** 2 / 2, rel=0.02)


def test_true_figures_exceed_the_claims_and_replacing_costs_more(script):
    for row in script.reproduce(script.Setting())["rows"]:
        assert row["epsilon"][ADD_REMOVE] > 25 and row["epsilon"][REPLACE_ONE] > 2.5 * row["epsilon"][ADD_REMOVE]
        assert script.true_epsilon(row["needed_multiplier"], row["releases"], 1e-5, ADD_REMOVE) == pytest.approx(25, rel=1e-9)


def test_output(script, tmp_path, capsys):
    script.main([])
    table = capsys.readouterr().out
    assert "| one matrix, one round | 25 | 34.6 | 96.4 |" in table
    assert "| one client-round: all 128 matrices | 25 | 1,952 |" in table
    script.main(["--json", "--out", str(tmp_path / "new")])
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "new" / "dp_fedlora_privacy.json").read_text())
    assert (tmp_path / "new" / "dp_fedlora_privacy.md").read_text() == table


def test_runs_as_a_command():
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}  # as if installed
    done = subprocess.run([sys.executable, SCRIPT, "--json"], capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout)["rows"][0]["claimed"] == 25
