"""`fedllm privacy tradeoff` and `variance`."""

import csv
import json

import pytest
from scipy.stats import norm

from fedllm import cli


def asked(capsys, *arguments):
    assert cli.run(["privacy", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_curve_of_every_accountant_as_png_and_csv(tmp_path, capsys):
    arguments = ["--noise-multiplier", "1", "--sampling-rate", "0.02", "--steps", "500", "--mu", "1", "--out", str(tmp_path / "out")]
    found = asked(capsys, "tradeoff", *arguments)
    rows = {row["curve"]: row for row in found["curves"]}
    assert {"pld", "rdp", "gdp", "1-GDP"} <= rows.keys()
    assert rows["1-GDP"]["advantage"] == pytest.approx(norm.cdf(0.5) - norm.cdf(-0.5), rel=1e-3)
    assert rows["1-GDP"]["false_negatives_at_1_percent"] == pytest.approx(norm.cdf(norm.ppf(0.99) - 1), rel=1e-6)
    assert rows["rdp"]["advantage"] > rows["pld"]["advantage"] > 0
    assert (tmp_path / "out" / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "out" / "tradeoff.csv").open() as file:
        points = list(csv.DictReader(file))
    assert {point["curve"] for point in points} == rows.keys()
    assert all(0 <= float(point["beta"]) <= 1 - float(point["alpha"]) + 1e-9 for point in points if point["kind"] == "bound")


def test_mu_alone(tmp_path, capsys):
    found = asked(capsys, "tradeoff", "--mu", "0.5", "--out", str(tmp_path))
    assert [row["curve"] for row in found["curves"]] == ["0.5-GDP"]


def test_variance_by_formula_and_by_simulation(capsys):
    shapes = ["--m", "8", "--n", "40", "--r", "4", "--noise-a", "0.1", "--noise-b", "0.3", "--norm-b", "2", "--norm-a", "3"]
    found = asked(capsys, "variance", *shapes, "--draws", "4000")
    assert found["exact"] == pytest.approx(40 * 0.01 * 4 + 8 * 0.09 * 9 + 0.01 * 0.09 * 8 * 40 * 4)
    assert abs(found["monte_carlo"] - found["exact"]) < 5 * found["standard_error"]
    assert found["bias"] < 3 * found["bias_expected"]
    assert cli.run(["privacy", "variance", *shapes]) == 0
    assert "published bound" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["tradeoff", "--mu", "-1"], "--mu -1"),
        (["tradeoff"], "--sampling-rate"),
        (["tradeoff", "--noise-multiplier", "1", "--sampling-rate", "2", "--steps", "1"], "--sampling-rate 2"),
        (["variance", "--m", "0", "--n", "4", "--r", "1", "--noise-a", "1", "--noise-b", "1"], "--m 0"),
        (["variance", "--m", "4", "--n", "4", "--r", "1", "--noise-a", "-1", "--noise-b", "1"], "--noise-a -1"),
        (["variance", "--m", "4", "--n", "4", "--r", "1", "--noise-a", "1", "--noise-b", "1", "--draws", "1"], "--draws 1"),
        (["variance", "--m", "4", "--n", "4", "--r", "1", "--noise-a", "1e200", "--noise-b", "1"], "--noise-a 1e+200"),
        (["variance", "--m", "10", "--n", "10", "--r", "100000000", "--noise-a", "1", "--noise-b", "1"], "--r 100000000"),
        (["variance", "--m", "4096", "--n", "4096", "--r", "8", "--noise-a", "1", "--noise-b", "1"], "--draws 1000"),
        (["variance", "--m", "4"], "Missing option"),
    ],
)
def test_bad_input_is_one_line(arguments, word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["privacy", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and word in captured.err
    assert list(tmp_path.iterdir()) == []
