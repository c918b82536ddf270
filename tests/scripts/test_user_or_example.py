"""scripts/user_or_example.py: the noise for examples that protects a whole user, and the steps on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "user_or_example.py"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import user_or_example

    yield user_or_example
    for name in ("user_or_example", "grid", "grid_axes", "grid_report"):
        sys.modules.pop(name, None)


def test_without_sampling_a_user_of_four_needs_four_times_the_noise(script):
    four, one = (script.noise_for_user(2.0, 3, 1.0, most)[0] for most in (4, 1))
    assert four == pytest.approx(4 * one, rel=2e-3)


def test_with_sampling_noise_calibrated_for_an_example_protects_the_user(script):
    from fedllm.privacy import accountants
    from fedllm.privacy.calibration import calibrate_release
    from fedllm.privacy.events import PoissonGaussianEvent

    noise, one = script.noise_for_user(3.0, 8, 0.05)
    assert 3.0 / 16 < one < 3.0 / 4 and noise > script.noise_for_user(3.0, 8, 0.05, 1)[0]
    run = calibrate_release(one, script.DELTA, 0, 8, 0.05, 1000, None, 0.0, shares=10).stage2_multiplier
    for multiplier, within in ((run, True), (0.98 * noise, False)):
        user = accountants.create("pld").compose(PoissonGaussianEvent(multiplier, 0.05, script.MOST), 8).epsilon(script.DELTA)
        assert (user.epsilon <= 3.0) == within


def test_the_steps_on_a_tiny_model(tmp_path):
    command = [sys.executable, str(SCRIPT), "--quick", "--json", "--epsilon", "4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    user, example = json.loads(done.stdout)["rows"]
    assert (user["method"], example["method"]) == ("user_level", "example_level")
    assert user["epsilon_release"] <= 4 and example["epsilon_release"] <= example["promise"]["example"] < 2
    assert example["difference"]["mean"] == pytest.approx(100 * (example["accuracy"][0] - user["accuracy"][0]))
