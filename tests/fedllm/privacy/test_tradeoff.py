"""Trade-off curves: what every f must be, closed forms, files."""

import csv
import math

import numpy as np
import pytest

from fedllm.privacy import accountants
from fedllm.privacy.events import REPLACE_ONE, GaussianEvent, PoissonGaussianEvent
from fedllm.privacy.tradeoff import LOW_RATES, TradeoffCurve, alpha_grid, curve_of, gdp_curve, gdp_tradeoff, tradeoff, write_csv
from fedllm.privacy.tradeoff_plot import tradeoff_figure

SAMPLED = PoissonGaussianEvent(0.8, 0.02)


def composed(name, event, count=1, relation="add-or-remove-one"):
    return accountants.create(name, relation).compose(event, count)


def at(curve, alphas):
    return np.interp(alphas, curve.alphas, curve.betas)


@pytest.mark.parametrize("name", ["rdp", "rdp_classic", "gdp"])
@pytest.mark.parametrize(("event", "count"), [(GaussianEvent(2.0), 3), (SAMPLED, 200)])
class TestEveryCurve:
    def test_is_a_tradeoff_function(self, name, event, count):
        curve = curve_of(composed(name, event, count))
        alphas, betas = np.array(curve.alphas), np.array(curve.betas)
        assert (alphas[0], alphas[-1], betas[-1]) == (0.0, 1.0, 0.0)
        assert np.all(np.diff(alphas) > 0) and np.all(np.diff(betas) <= 1e-12)
        assert np.all(betas >= 0) and np.all(betas <= 1 - alphas + 1e-12)
        slopes = np.diff(betas) / np.diff(alphas)
        assert np.all(np.diff(slopes) >= -1e-6 * np.maximum(1, np.abs(slopes[1:])))

    def test_is_symmetric(self, name, event, count):
        curve = curve_of(composed(name, event, count))
        probe = np.linspace(0.02, 0.9, 40)
        once = at(curve, probe)
        inside = once > 1e-3
        assert at(curve, once)[inside] == pytest.approx(probe[inside], abs=5e-3)

    def test_more_steps_are_a_lower_curve(self, name, event, count):
        probe = np.array([1e-3, 0.01, 0.1, 0.3, 0.6])
        curves = [at(curve_of(composed(name, event, n * count)), probe) for n in (1, 2, 4)]
        assert np.all(curves[0] > curves[1]) and np.all(curves[1] > curves[2])

    def test_advantage_is_delta_at_zero_or_better(self, name, event, count):
        accountant = composed(name, event, count)
        curve = curve_of(accountant)
        assert curve.advantage <= accountant.delta(0.0).delta + 1e-12
        if name == "gdp":
            assert curve.advantage == pytest.approx(accountant.delta(0.0).delta, abs=1e-9)

    def test_the_false_negative_rate_is_exact_at_the_usual_rates(self, name, event, count):
        accountant = composed(name, event, count)
        curve = curve_of(accountant)
        for alpha in LOW_RATES:
            assert alpha in curve.alphas
            assert curve.beta_at(alpha) == curve.betas[curve.alphas.index(alpha)]
        delta = accountant.delta(1.0).delta
        assert curve.beta_at(0.01) >= 1 - delta - math.e * 0.01 - 1e-3


@pytest.mark.parametrize("mu", [0.01, 0.5, 1.0, 2.0, 4.0, 8.0])
def test_exact_deltas_give_the_closed_form(mu):
    curve = curve_of(composed("gdp", GaussianEvent(1 / mu)))
    closed = gdp_tradeoff(mu, curve.alphas)
    assert np.max(np.abs(np.array(curve.betas) - closed)) < 1e-4
    assert np.all(np.array(curve.betas) <= closed + 1e-12)  # from below: a coarse grid never flatters
    assert (curve.kind, curve.direction) == ("bound", "exact")
    assert gdp_curve(mu).advantage == pytest.approx(accountants.gdp.gdp_delta(mu, 0.0), rel=1e-9)


def test_closed_form_at_known_points():
    assert gdp_tradeoff(1.0, [0.0, 0.05, 0.5, 1.0]) == pytest.approx([1.0, 0.740489, 0.1586553, 0.0], rel=1e-6)
    assert gdp_tradeoff(0.0, [0.3]) == pytest.approx([0.7])
    for mu in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="mu"):
            gdp_tradeoff(mu, [0.5])


def test_pure_and_approximate_dp():
    # (log 3, 0.1)-DP alone: the polygon of Wasserman and Zhou.
    found = tradeoff([math.log(3)], [0.1], [0.0, 0.1, 0.225, 0.9, 1.0])
    assert found == pytest.approx([0.9, 0.6, 0.225, 0.0, 0.0])


def test_bounds_lie_below_the_exact_curve_and_keep_their_label():
    exact = gdp_curve(0.5)
    for name in ("rdp", "rdp_classic"):
        curve = curve_of(composed(name, GaussianEvent(2.0)))
        assert (curve.kind, curve.direction) == ("bound", "lower")
        probe = np.linspace(0.01, 0.95, 30)
        assert np.all(at(curve, probe) < at(exact, probe))
    estimate = curve_of(composed("gdp", SAMPLED, 100))
    assert (estimate.kind, estimate.direction) == ("estimate", "unknown")


def test_replace_one_is_a_lower_curve():
    one, two = (curve_of(composed("gdp", GaussianEvent(2.0), relation=r)) for r in ("add-or-remove-one", REPLACE_ONE))
    assert two.beta_at(0.01) < one.beta_at(0.01)
    assert two.betas == pytest.approx(gdp_tradeoff(1.0, two.alphas), abs=1e-4)


def test_beta_between_grid_points_is_never_flattering():
    curve = TradeoffCurve("x", "bound", "lower", (0.0, 0.5, 1.0), (1.0, 0.4, 0.0))
    assert [curve.beta_at(a) for a in (0.0, 0.1, 0.5, 0.7, 1.0)] == [1.0, 0.4, 0.4, 0.0, 0.0]
    assert curve.advantage == pytest.approx(0.1)
    with pytest.raises(ValueError, match="alpha"):
        curve.beta_at(1.5)


def test_no_noise_protects_nothing_and_no_figure_is_said():
    curve = curve_of(composed("gdp", GaussianEvent(0.0)))
    assert curve.advantage == 1.0 and curve.beta_at(0.01) == 0.0
    assert curve_of(accountants.create("rdp")).advantage == 0.0
    with pytest.raises(ValueError, match="gdp has no trade-off curve: too little noise"):
        curve_of(composed("gdp", PoissonGaussianEvent(0.01, 0.1)))


def test_grid_holds_what_is_asked_for():
    grid = alpha_grid(advantage=0.3)
    assert {0.0, 1.0, 0.35, *LOW_RATES} <= set(grid.tolist())
    assert np.all(np.diff(grid) > 0)


def test_files(tmp_path):
    curves = [curve_of(composed("rdp", SAMPLED, 50)), curve_of(composed("gdp", SAMPLED, 50)), gdp_curve(0.5)]
    rows = list(csv.reader(write_csv(curves, tmp_path / "curves.csv").open()))
    assert rows[0] == ["curve", "kind", "alpha", "beta"]
    assert len(rows) == 1 + sum(len(curve.alphas) for curve in curves)
    assert [row[:2] for row in rows[1:]].count(["gdp", "estimate"]) == len(curves[1].alphas)
    written = [float(row[3]) for row in rows[1:] if row[0] == "rdp"]
    assert written == list(curves[0].betas)
    picture = tradeoff_figure(curves, tmp_path / "curves.png", "σ 0.8")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    with pytest.raises(ValueError, match="at least one"):
        tradeoff_figure([], tmp_path / "none.png")
