"""Both epsilons of a run from its ledger alone, and the guard that asks before every round."""

import json
import math

import pytest

from fedllm.privacy import accountants
from fedllm.privacy.accountants.gdp import gdp_epsilon
from fedllm.privacy.adversaries import CUT_IGNORED, by_stage, epsilon_by_round, epsilon_release, epsilon_server, privacy_marks
from fedllm.privacy.calibration import calibrate_release, calibrate_server
from fedllm.privacy.events import PoissonGaussianEvent, TruncatedPoissonGaussianEvent
from fedllm.privacy.guard import may_run

HEADER = {
    "v": 1,
    "run": "r",
    "data": "d",
    "clients": 2000,
    "target": {"adversary": "release", "epsilon": 8.0, "delta": 1e-4},
    "planned_rounds": 4,
    "private": True,
    "why_not_private": [],
    "unit": "client",
}


def entry(round, z=1.0, stage="stage2", noise="distributed", **changes):
    base = {
        "id": f"{stage}/round{round}",
        "attempt": 1,
        "stage": stage,
        "round": round,
        "mechanism": "gaussian",
        "noise_multiplier": z,
        "clip": 0.1,
        "sampling_rate": 0.05,
        "max_cohort": 160,
        "shares": 160,
        "noise": noise,
        "unit": "client",
        "relation": "add-or-remove-one",
        "codec": "c",
        "prior": "p",
        "rng": "os",
    }
    return {**base, **changes}


def pld(*pairs):
    accountant = accountants.create("pld")
    for event, count in pairs:
        accountant.compose(event, count)
    return accountant.epsilon(1e-4).epsilon


def test_release_composes_both_stages():
    entries = [entry(0, 2.0, "stage1"), entry(0), entry(1), entry(1, attempt=2)]
    got = epsilon_release(HEADER, entries)
    want = pld(
        (TruncatedPoissonGaussianEvent(2.0, 0.05, 2000, 160), 1),
        (TruncatedPoissonGaussianEvent(1.0, 0.05, 2000, 160), 3),
    )
    assert got.epsilon == want
    assert (got.adversary, got.unit, got.relation, got.kind) == ("release", "client", "add-or-remove-one", "bound")
    json.dumps(got.as_json(), allow_nan=False)


def test_noise_mode_decides_which_noise_each_adversary_meets():
    for mode, of_sum, of_message in [("distributed", 1.0, 1 / math.sqrt(160)), ("local", math.sqrt(160), 1.0)]:
        entries = [entry(0, noise=mode), entry(1, noise=mode)]
        assert epsilon_release(HEADER, entries).epsilon == pytest.approx(
            pld((PoissonGaussianEvent(of_sum, 0.05), 2)), rel=1e-3
        )
        server = epsilon_server(HEADER, entries)
        assert server.epsilon == pytest.approx(gdp_epsilon(2 * math.sqrt(2) / of_message, 1e-4), rel=1e-9)
        assert (server.relation, server.adversary) == ("replace-one", "server")


def test_server_remarks():
    assert "share alone" in epsilon_server(HEADER, [entry(0)]).reason
    assert epsilon_server(HEADER, [entry(0, noise="local")]).reason is None
    trusted = epsilon_server(HEADER, [entry(0, noise="central")])
    assert (trusted.epsilon, trusted.reason) == (None, "none: trusted")
    assert epsilon_release(HEADER, [entry(0, noise="central")]).epsilon == epsilon_release(HEADER, [entry(0)]).epsilon


def test_server_by_participation_takes_the_least_noise():
    entries = [entry(0, 3.0, noise="local"), entry(1, 1.0, noise="local"), entry(2, 2.0, noise="local")]
    assert epsilon_server(HEADER, entries, 0).epsilon == 0.0
    assert epsilon_server(HEADER, entries, 1).epsilon == pytest.approx(gdp_epsilon(2.0, 1e-4))
    assert epsilon_server(HEADER, entries, 2).epsilon == pytest.approx(gdp_epsilon(2 * math.sqrt(1 + 1 / 4), 1e-4))
    assert epsilon_server(HEADER, entries, 9) == epsilon_server(HEADER, entries)


def test_decoding_every_message_is_accounted_per_message():
    each = epsilon_release(HEADER, [entry(0, noise="local", mechanism="gaussian_each")]).epsilon
    assert each == pytest.approx(pld((PoissonGaussianEvent(1.0, 0.05), 1)), rel=1e-3)


def test_user_unit_counts_users_and_has_no_cut():
    header = {**HEADER, "unit": "user", "clients": 5, "units": 2000}
    got = epsilon_release(header, [entry(0, unit="user", max_cohort=None, shares=5)])
    assert got.epsilon == pld((PoissonGaussianEvent(1.0, 0.05), 1))
    assert got.unit == "user"


def test_seeded_repeat_counts_once():
    seeded = [entry(0, rng="seeded"), entry(0, rng="seeded", attempt=2)]
    assert epsilon_release(HEADER, seeded).epsilon == epsilon_release(HEADER, seeded[:1]).epsilon
    assert epsilon_server(HEADER, seeded).epsilon == epsilon_server(HEADER, seeded[:1]).epsilon


def test_disabled_and_noiseless():
    off = {**HEADER, "private": False, "why_not_private": "privacy disabled"}
    for answer in (epsilon_release(off, []), epsilon_server(off, [])):
        assert (answer.epsilon, answer.reason) == (None, "no noise")
    assert epsilon_release(HEADER, [entry(0, 0.0)]).epsilon is None
    assert epsilon_server(HEADER, [entry(0, 0.0)]).epsilon is None
    assert privacy_marks(off) == (False, ["privacy disabled"])
    assert privacy_marks(HEADER) == (True, [])


@pytest.mark.parametrize(
    "change", [{"mechanism": "laplace"}, {"relation": "replace-one"}, {"unit": "example"}, {"noise": "none"}]
)
def test_what_is_not_understood_gets_no_figure(change):
    with pytest.raises(ValueError, match=r"Expected|cannot account"):
        epsilon_release(HEADER, [{**entry(0), **change}])


def test_by_round_grows():
    rows = epsilon_by_round(HEADER, [entry(0, 2.0, "stage1"), entry(0), entry(1)])
    assert [(row["releases"], row["stage"], row["round"]) for row in rows] == [(1, "stage1", 0), (2, "stage2", 0), (3, "stage2", 1)]
    columns = [[row["server"] for row in rows], *([row["release"][name] for row in rows] for name in ("pld", "rdp", "gdp"))]
    for values in columns:
        assert values == sorted(values) and len(set(values)) == 3


def test_many_rounds_are_looked_at_in_few_places():
    rows = epsilon_by_round(HEADER, [entry(number) for number in range(50)], ["gdp"], most=5)
    assert [row["releases"] for row in rows] == [10, 20, 30, 40, 50]
    assert epsilon_by_round(HEADER, [], ["gdp"]) == []


@pytest.mark.parametrize("accountant", accountants.names())
def test_the_release_by_every_accountant(accountant):
    entries = [entry(0, 2.0, "stage1"), entry(0), entry(1)]
    found, quoted = epsilon_release(HEADER, entries, accountant), epsilon_release(HEADER, entries)
    assert (found.accountant, found.adversary, found.unit) == (accountant, "release", HEADER["unit"])
    if found.epsilon is None:
        assert found.reason
    elif (found.kind, found.direction) == ("bound", "upper"):
        assert found.epsilon >= quoted.epsilon or accountant == "pld"
    elif found.kind == "estimate":
        assert CUT_IGNORED in found.reason or accountants.create(accountant).supports(TruncatedPoissonGaussianEvent(1.0, 0.05, 2000, 160))


def test_no_estimate_is_quoted_calibrated_or_guarded():
    assert epsilon_release(HEADER, [entry(0)]).kind == "bound"
    assert epsilon_server(HEADER, [entry(0)]).kind == "bound"


def test_stages_apart():
    parts = by_stage([entry(0, 2.0, "stage1"), entry(0), entry(1)])
    assert {name: len(part) for name, part in parts.items()} == {"stage 1": 1, "stage 2": 2}
    assert list(by_stage([entry(0)])) == ["stage 2"]


@pytest.mark.parametrize("adversary", ["release", "server"])
def test_guard_allows_exactly_the_planned_rounds(adversary):
    if adversary == "release":
        z = calibrate_release(8.0, 1e-4, 1, 4, 0.05, 2000, 160, 0.1)
    else:
        z = calibrate_server(8.0, 1e-4, 1, 4, "distributed", 160, 0.1)
    header = {**HEADER, "target": {**HEADER["target"], "adversary": adversary}}
    entries = []
    for step in [entry(0, z.stage1_multiplier, "stage1"), *(entry(r, z.stage2_multiplier) for r in range(4))]:
        assert may_run(header, entries, step)
        entries.append(step)
    assert not may_run(header, entries, entry(4, z.stage2_multiplier))
    # A crashed attempt with fresh noise has spent a round, so the last one may not run.
    crashed = [*entries[:2], {**entries[1], "attempt": 2}, *entries[2:-1]]
    assert not may_run(header, crashed, entries[-1])


def test_guard_without_a_figure():
    assert may_run({**HEADER, "private": False, "why_not_private": ["privacy disabled"]}, [], entry(0, 0.0))
    assert not may_run(HEADER, [], entry(0, 0.0))
    trusted = {**HEADER, "target": {**HEADER["target"], "adversary": "server"}}
    assert not may_run(trusted, [], entry(0, noise="central"))
    bare = {k: v for k, v in entry(0, 5.0).items() if k not in ("id", "attempt")}
    assert may_run(HEADER, [], bare)
