"""scripts/reproduce_ew_tune.py on its cheapest task: the published figures come out, and what they hide."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "reproduce_ew_tune.py"


@pytest.fixture
def run(capsys):
    """call(options) -> what it printed, for the task SST-2."""
    spec = importlib.util.spec_from_file_location("reproduce_ew_tune", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*options):
        module.main(["--task", "SST-2", *options])
        return capsys.readouterr()

    return call


def test_json_and_plot(run, tmp_path):
    done = run("--json", "--out", str(tmp_path / "new"))
    (row,) = json.loads(done.out)["rows"]
    assert (row["steps"], row["sampling_rate"]) == (660, 2000 / 67349)
    assert row["edgeworth"] == pytest.approx(row["published"]["edgeworth"], abs=5.1e-3)
    assert row["true_epsilon"] == pytest.approx(row["published"]["true_epsilon"], abs=6e-3)
    sigma, published = row["needed_sigma"], row["published"]["sigma"]
    assert (sigma["edgeworth_1"], sigma["rdp_classic"]) == pytest.approx((published["edgeworth"], published["rdp"]), abs=5e-4)
    assert published["edgeworth"] < sigma["pld"] < published["prv"]
    assert row["missing_noise"] == pytest.approx(sigma["pld"] / 0.7865 - 1)
    assert row["cdf_error_over_delta"]["berry_esseen"] > 1e4 > row["cdf_error_over_delta"]["best"] > 1
    assert (tmp_path / "new" / "ew_tune.png").read_bytes().startswith(b"\x89PNG")
    assert "SST-2" in done.err


def test_markdown(run):
    lines = run().out.splitlines()
    assert lines[2].startswith("| SST-2 1e-5 | 0.7865 / 0.817 / 0.8775 | 7.99 / 8.37 / 8.63 (7.99 / 8.37 / 8.63) | **8.29** (8.29) |")
    assert len({line.count("|") for line in lines[:3]}) == 1
    assert "vacuous" in lines[-1]
