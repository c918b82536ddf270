"""`codec bench`: scores against constructed updates, and the command on a tiny model."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch

from dr_encoder.codecs import CODECS
from dr_encoder.layout import AdapterLayout
from dr_encoder.priors import from_public_gradients
from fedllm import cli, priors, run
from fedllm.bench.codecs import Candidate, adam_weights, collect, message_bytes, prior_of
from fedllm.bench.memory import TensorPeak
from fedllm.bench.plots import bench_figure
from fedllm.bench.scores import Cohorts, Score, add, add_oracle
from fedllm.config import load_config
from fedllm.errors import UserError
from fedllm.public import PublicGradients
from fedllm.setting import build

pytestmark = pytest.mark.usefixtures("one_thread")

N, UNITS = 400, 300
LAYOUT = AdapterLayout.of([("A", torch.zeros(4, 50)), ("B", torch.zeros(50, 4))])
ROW_KEYS = {
    "codec", "prior", "cost", "code_size", "compression_ratio", "signal_energy", "kept_energy_mean", "kept_energy_single",
    "oracle_signal_energy", "oracle_size", "signal_energy_adam", "oracle_signal_energy_adam", "total_error_adam",
    "epsilon", "noise_multiplier", "total_error", "message_bytes", "fit_seconds", "encode_seconds",
    "decode_seconds", "memory_bytes", "working_bytes",
}  # fmt: skip


def updates(generator, count, signal):
    """signal + white noise of unit variance a coordinate."""
    return signal + torch.randn(count, N, generator=generator)


@pytest.fixture
def cohorts():
    """A signal of energy 4 in the first two directions (3 and 1), under white sampling noise a hundred times as long."""
    generator = torch.Generator().manual_seed(0)
    signal = torch.zeros(N)
    signal[0], signal[1] = 3**0.5, 1.0
    return Cohorts(*(updates(generator, UNITS, signal) for _ in range(3)))


def fitted(rows, size):
    return CODECS["linear"].fit(from_public_gradients(LAYOUT, rows), LAYOUT, size, 0.0, 0)


def scored(codec, cohorts, noise_std=0.0, draws=1):
    score, rng = Score(), np.random.default_rng(1)
    for _ in range(draws):
        add(score, codec, cohorts, noise_std, rng)
    return score.row()


def test_the_signal_is_told_from_the_sampling_noise(cohorts):
    """A projection on the signal's larger direction keeps 3 of its 4; a random one nothing; of the mean's energy both keep little."""
    larger, other = torch.zeros(1, N), torch.zeros(1, N)
    larger[0, 0] = other[0, 7] = 1.0
    good, bad = scored(fitted(larger, 1), cohorts), scored(fitted(other, 1), cohorts)
    assert good["signal_energy"] == pytest.approx(0.75, abs=0.08) and abs(bad["signal_energy"]) < 0.08
    assert good["kept_energy_mean"] == pytest.approx(3 / (4 + N / UNITS), rel=0.15)
    assert good["kept_energy_single"] < 0.03
    whole = scored(CODECS["identity"].fit(None, LAYOUT, None, 0.0, 0), cohorts)
    assert whole["signal_energy"] == pytest.approx(1.0) and whole["kept_energy_single"] == pytest.approx(1.0)


def test_adams_metric_weighs_coordinates(cohorts):
    """Of a signal of energies 3 and 1, weighed 1 and 3, either direction holds half; the oracle then finds both alike."""
    weights = torch.full((N,), 1e-6)
    weights[0], weights[1] = 1.0, 3.0
    weighed = dataclasses.replace(cohorts, weights=weights)
    larger, both = torch.zeros(1, N), torch.zeros(2, N)
    larger[0, 0] = both[0, 0] = both[1, 1] = 1.0
    one, all_of_it = scored(fitted(larger, 1), weighed), scored(fitted(both, 2), weighed)
    assert one["signal_energy_adam"] == pytest.approx(0.5, abs=0.08) and one["signal_energy"] == pytest.approx(0.75, abs=0.08)
    assert all_of_it["signal_energy_adam"] == pytest.approx(1.0, abs=0.01)
    assert one["total_error_adam"] == pytest.approx(0.5, abs=0.1)
    assert scored(fitted(larger, 1), cohorts)["signal_energy_adam"] == scored(fitted(larger, 1), cohorts)["signal_energy"]
    oracle = {2: Score()}
    add_oracle([(score, size) for size, score in oracle.items()], weighed)
    assert oracle[2].row()["signal_energy_adam"] == pytest.approx(1.0, abs=0.01)
    assert oracle[2].row()["signal_energy"] < 0.9  # white noise of every coordinate hides it there


IDENTITY = CODECS["identity"].fit(None, LAYOUT, None, 0.0, 0)


def test_the_error_counts_what_is_lost_and_the_noise(cohorts):
    larger = torch.zeros(1, N)
    larger[0, 0] = 1.0
    lost = scored(fitted(larger, 1), cohorts)["total_error"]
    assert lost == pytest.approx(0.25, abs=0.1)
    sampling = N / (2 * UNITS)  # energy of the whole cohort's sampling noise
    assert scored(IDENTITY, cohorts)["total_error"] == pytest.approx(sampling / (4 + sampling), abs=0.1)
    for noise_std in (0.1, 1.0):  # the same energy as the signal, and a hundred times
        error = sampling + N * noise_std**2
        noisy = scored(IDENTITY, cohorts, noise_std=noise_std, draws=20)["total_error"]
        assert noisy == pytest.approx(error / (4 + error), abs=0.1)
    # Of one number, full noise leaves the direction but not the sign: no factor that has not seen the noise makes use of that.
    assert scored(fitted(larger, 1), cohorts, noise_std=100.0, draws=20)["total_error"] == pytest.approx(1.0, abs=0.1)


def test_noise_is_counted_against_clipped_codes(cohorts):
    """All units are some 20 long: with every clip norm below that the noise, which follows it, is as large against them."""
    known = scored(IDENTITY, cohorts)["total_error"]
    for clip in (10.0, 0.1, 0.001):
        clean = clipped(cohorts, clip)
        assert clean["total_error"] == pytest.approx(known, abs=0.05)  # shorter, but the same way
        assert clean["signal_energy"] == pytest.approx(1.0)  # of codes as they are
        noise = N * (0.005 * 20) ** 2 + N / (2 * UNITS)  # of units 20 long
        assert clipped(cohorts, clip, 0.005)["total_error"] == pytest.approx(noise / (4 + noise), abs=0.1)


def clipped(cohorts, clip, noise=0.0):
    """Scores of the identity, its codes clipped to `clip`, noise as a share of that."""
    score, rng = Score(), np.random.default_rng(1)
    noisy = add(score, IDENTITY, cohorts, noise * clip, rng, clip)
    assert noisy.norm() < clip * (1 + 2 * noise * N**0.5)
    return score.row()


def test_the_clip_turns_what_long_units_carry_alone(cohorts):
    """Every tenth unit carries all of the signal, ten times over: clipped to the length of the others it hardly counts."""
    some = (torch.arange(UNITS) % 10 == 0).float()[:, None]
    signal = torch.zeros(N)
    signal[0] = 100.0
    rare = Cohorts(*(part + 10 * some * signal for part in (cohorts.first, cohorts.second, cohorts.others)))
    assert clipped(rare, 1e9)["total_error"] < 0.01
    sampling, kept = N / (2 * UNITS), (0.1 * 20) ** 2
    assert clipped(rare, 20.0)["total_error"] == pytest.approx(sampling / (sampling + kept), abs=0.1)


def test_the_command_clips_as_a_run_does(tiny, tmp_path, capsys, monkeypatch):
    """What `released` priors are given are means of clipped codes."""
    means = []
    monkeypatch.setattr("fedllm.priors.Past.add", lambda self, codec, code, std: means.append((code.norm(), std, len(code))))
    arguments = ["--rounds", "1", "--sizes", "4", "--codecs", "linear", "--priors", "public+released", "--json", "--out", str(tmp_path)]
    shared = ["privacy.clip.norm=0.1", "privacy.target.epsilon=1000", "federation.local.lr=1000", "federation.expected_cohort=6"]
    assert cli.run(["codec", "bench", str(tiny / "config.yaml"), *shared, *arguments]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    ((length, noise_std, size),) = means
    assert noise_std == pytest.approx(row["noise_multiplier"] * 0.1 / 6)
    assert length <= 0.1 + 4 * noise_std * size**0.5


def test_a_prior_of_private_updates_is_of_clients_that_nothing_else_is_told_of(configured, cohorts):
    """Fitted to the half that the signal is told by, a subspace would keep its sampling noise and say signal."""
    setting = build(configured(), 0)
    asked = []
    setting.engine.updates = lambda data, units, *_: asked.extend(units) or []
    collect(setting, configured(), np.random.default_rng(0), 2, 4, 3)
    assert len(asked) == 11 and len({int(record) for unit in asked for record in unit}) == sum(len(unit) for unit in asked)
    private = torch.ones(5, N)
    given = dataclasses.replace(cohorts, private=private)
    found = prior_of(Candidate("linear", "real", 4), configured(), LAYOUT, given, PublicGradients(torch.ones(3, N), torch.ones(1, N)), 0)
    assert torch.equal(found.rows, private)


def test_seconds_are_of_one_fit_and_a_message_is_as_long_as_a_runs(configured, no_plot):
    assert Score(fit_seconds=3.0, fits=1, rounds=3).row()["fit_seconds"] == 3.0
    config = configured("run", "federation.rounds=1")
    results = run.train(config)
    told = message_bytes(config.codec.code_size, config.codec.bits, config.federation.clients)
    assert abs(told - results["uplink_bytes_per_client_round"]) <= 8  # of the digits of one number


def test_clients_train_on_the_batches_that_a_run_has_them_draw(configured):
    config = configured("run", "federation.local.batch=2", "federation.local.steps=3")
    setting = build(config, 0)
    asked = []
    setting.engine.updates = lambda data, units, *_: asked.extend(units) or []
    collect(setting, config, np.random.default_rng(0), 2, 4)
    owned = [len(setting.partition.records(client)) for client in range(setting.partition.clients)]
    assert len(asked) == 8 and max(owned) > 2
    assert all(unit.shape == (3, 2) if unit.ndim == 2 else len(unit) <= 2 for unit in asked) and any(unit.ndim == 2 for unit in asked)


def test_the_table_says_what_its_error_is(tiny, tmp_path, capsys):
    arguments = ["--rounds", "1", "--sizes", "4", "--codecs", "linear", "--priors", "public", "--out", str(tmp_path)]
    assert cli.run(["codec", "bench", str(tiny / "config.yaml"), *arguments]) == 0
    assert "clipped and noisy as in a run" in " ".join(capsys.readouterr().out.split())


def test_the_oracle_finds_the_signal_in_other_clients(cohorts):
    parts = (cohorts.first, cohorts.second, cohorts.others)
    strong = Cohorts(*(10 * torch.outer(torch.ones(UNITS), cohorts.first.new_ones(N)) + part for part in parts))
    oracle = {1: Score(), 8: Score()}
    add_oracle([(score, size) for size, score in oracle.items()], strong)
    assert oracle[1].row()["signal_energy"] == pytest.approx(1.0, abs=0.01)
    assert oracle[8].row()["signal_energy"] >= oracle[1].row()["signal_energy"] - 0.01


def test_working_memory_is_the_most_that_is_held_at_once():
    x = torch.ones(1000)
    with TensorPeak() as held:
        y = x + 1
        y.add_(1)  # in place: nothing new
        part = y.view(10, 100)[1]  # holds y
        del y
        x.mul_(2)  # was there before
        assert held.now == 4000
        z = part * 2
        del part
    assert (held.peak, held.now) == (4400, 400) and len(z) == 100


def test_the_command(tiny, tmp_path, capsys):
    arguments = ["codec", "bench", str(tiny / "config.yaml"), "seed=5", "--rounds", "2", "--others", "12", "--sizes", "4,160"]
    assert cli.run([*arguments, "--out", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["private"] is False and "not private" in found["why_not_private"]
    assert all(row.keys() >= ROW_KEYS for row in found["rows"])
    assert {row["codec"] for row in found["rows"]} == set(CODECS)  # a family is in the table by being registered
    assert {row["prior"] for row in found["rows"]} == {"none", "public", "public+released", "moments"}
    whole = next(row for row in found["rows"] if row["codec"] == "identity")
    assert whole["signal_energy"] is None or whole["signal_energy"] == pytest.approx(1.0)
    assert all(row["working_bytes"] > 0 for row in found["rows"] if row["encode_seconds"] is not None and row["codec"] != "identity")
    oracles = {row["codec"]: row["oracle_signal_energy"] for row in found["rows"] if row["encode_seconds"] is not None}
    assert oracles["autoencoder"] is not None and oracles["topk"] is not None  # of families that fix their size too
    assert all(row["message_bytes"] is None or row["message_bytes"] > 0 for row in found["rows"])
    figures = ("epsilon", "noise_multiplier", "message_bytes")
    assert all(CODECS[row["codec"]].summable == (row["epsilon"] == 8) for row in found["rows"] if row["decode_seconds"] is not None)
    assert all(row["decode_seconds"] is None or row["decode_seconds"] > 0 for row in found["rows"])
    lost = [row for row in found["rows"] if any(row["codec"] == each["codec"] and row["code_size"] == each["code_size"]
            and row["prior"] == each["prior"] for each in found["failed"])]
    assert lost and all(row[name] is None for row in lost for name in figures)
    assert {(each["codec"], each["code_size"]) for each in found["failed"]} >= {("powersgd", 4), ("linear", 160)}
    assert (tmp_path / "codecs.png").read_bytes().startswith(b"\x89PNG")


def test_a_codecs_figures_are_the_same_whichever_stand_beside_it_and_others_with_another_seed(tiny, tmp_path, capsys):
    command = ["codec", "bench", str(tiny / "config.yaml"), "--others", "12", "--sizes", "4", "--priors", "public", "--out", str(tmp_path)]

    def kept(codecs, seed):
        assert cli.run([*command, f"seed={seed}", "--rounds", "2", "--codecs", codecs, "--json"]) == 0
        row = next(row for row in json.loads(capsys.readouterr().out)["rows"] if row["codec"] == "linear")
        return row["kept_energy_mean"], row["total_error"]

    assert kept("linear", 1) == kept("linear,coordinate,sketch", 1) != kept("linear", 2)


def test_the_table_says_that_it_is_not_private(tiny, tmp_path, capsys):
    arguments = ["--rounds", "1", "--others", "12", "--sizes", "4", "--codecs", "linear,identity", "--priors", "public"]
    assert cli.run(["codec", "bench", str(tiny / "config.yaml"), *arguments, "--out", str(tmp_path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "diagnostic: not private" in out and "linear" in out and "topk" not in out


@pytest.mark.parametrize(("sizes", "says"), [("4,12", False), ("4,16", True)])
def test_an_oracle_shorter_than_the_code_says_so(sizes, says, tiny, tmp_path, capsys):
    command = ["codec", "bench", str(tiny / "config.yaml"), "--rounds", "1", "--others", "12", "--codecs", "linear", "--sizes", sizes]
    command += ["--priors", "public", "--out", str(tmp_path)]
    assert cli.run([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["oracle_size"] for row in rows] == [min(row["code_size"], 12) for row in rows]
    assert cli.run(command) == 0
    note = "oracle: 12 directions where a code has more numbers, one a client of --others"
    assert (note in capsys.readouterr().out) is says


def test_a_codec_of_real_gradients_says_what_it_costs(tiny, tmp_path, capsys):
    arguments = ["--rounds", "1", "--others", "12", "--sizes", "4", "--codecs", "linear", "--priors", "real", "--json"]
    assert cli.run(["codec", "bench", str(tiny / "config.yaml"), *arguments, "--out", str(tmp_path)]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["cost"].startswith("everything") and row["kept_energy_mean"] is not None


def test_a_codec_of_ones_own_is_one_class(tiny, tmp_path, capsys, monkeypatch):
    """Registered, a family is a config's, with the checks that its attributes ask for, and stands in the table."""

    class Halved(CODECS["coordinate"]):
        """Half of each number: linear, but not orthonormal."""

        name, orthonormal, fits = "halved", False, ("rows",)

        def encode(self, updates):
            return super().encode(updates) / 2

        def decode(self, mean_code, noise_std=0.0):
            return super().decode(2 * mean_code, 2 * noise_std)

    monkeypatch.setitem(CODECS, "halved", Halved)
    config = str(tiny / "config.yaml")
    assert load_config(config, ["codec.family=halved"]).codec.family == "halved"
    for overrides, says in [
        (["codec.prior=moments"], "codec.prior=moments: expected one of public[+released][+random], real with codec.family=halved"),
        (["privacy.noise_in=update"], "halved is no orthonormal code"),
        (["codec.code_size=null"], "codec.code_size=null: expected a number"),
    ]:
        with pytest.raises(UserError, match=re.escape(says)):
            load_config(config, ["codec.family=halved", *overrides])
    Halved.summable = False
    with pytest.raises(UserError, match="its codes cannot be summed"):
        load_config(config, ["codec.family=halved"])
    Halved.summable = True
    arguments = ["--rounds", "1", "--others", "12", "--sizes", "4", "--codecs", "halved", "--json", "--out", str(tmp_path)]
    assert cli.run(["codec", "bench", config, *arguments]) == 0
    assert {row["prior"] for row in json.loads(capsys.readouterr().out)["rows"]} == {"public", "public+released"}


def test_errors_below_zero_are_drawn(monkeypatch, tmp_path):
    """Every point lies within its panel, the least one ringed."""
    figures = []
    monkeypatch.setattr("fedllm.bench.plots._save", lambda figure, path: figures.append(figure))
    errors = {16: 0.4, 64: -0.02, 256: 1.3}
    rows = [
        {"codec": "linear", "prior": "public", "code_size": size, "signal_energy": 0.9, "oracle_signal_energy": 1.0}
        | {"oracle_size": min(size, 20), "total_error": error}
        for size, error in errors.items()
    ]
    bench_figure({"model": "m", "task": "t", "why_not_private": "diagnostic", "rows": rows}, tmp_path / "codecs.png")
    assert "up to 20 directions" in figures[0].legends[0].texts[-1].get_text()
    panel = figures[0].axes[1]
    curve, ring = panel.lines
    assert curve.get_ydata().tolist() == list(errors.values()) and (list(ring.get_xdata()), list(ring.get_ydata())) == ([64], [-0.02])
    figures[0].draw_without_rendering()
    heights = panel.transAxes.inverted().transform(panel.transData.transform(curve.get_xydata()))[:, 1]
    assert 0 < heights[1] < heights[0] < heights[2] < 1


def test_a_figure_leaves_out_what_could_not_be_told(monkeypatch, tmp_path):
    """A signal lost in sampling noise: of the cohort, of the others, of both."""
    figures = []
    monkeypatch.setattr("fedllm.bench.plots._save", lambda figure, path: figures.append(figure))
    for errors, energies in (((None, None), (0.5, 0.9)), ((0.3, None), (None, 0.9)), ((None, None), (None, None))):
        rows = [
            {"codec": "linear", "prior": "public", "code_size": size, "signal_energy": energy, "oracle_signal_energy": None}
            | {"oracle_size": None, "total_error": error}
            for size, error, energy in zip((4, 8), errors, energies, strict=True)
        ]
        bench_figure({"model": "m", "task": "t", "why_not_private": "diagnostic", "rows": rows}, tmp_path / "codecs.png")
        figures[-1].draw_without_rendering()
        drawn = [[y for line in panel.lines[:1] for y in line.get_ydata()] for panel in figures.pop().axes]
        assert drawn == [[value for value in values if value is not None] for values in (energies, errors)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--codecs", "lineal"], "--codecs lineal: expected some of"),
        (["--sizes", "four"], "--sizes four: expected whole numbers"),
        (["--sizes", "0"], "--sizes 0: expected whole numbers"),
        (["--rounds", "0"], "--rounds 0: expected"),
        (["--others", "1000"], "--others 1000: expected 2 to"),
        (["--priors", "released"], "--priors released: expected public[+released][+random], real, moments or none"),
        (["--priors", "public,publik"], "--priors publik: expected"),
        (["--codecs", "chain", "--priors", "moments"], "--codecs, --priors: expected at least one"),
        (["privacy.unit=example"], "privacy.unit=example: expected client in codec bench"),
        (["privacy.noise_in=update"], "privacy.noise_in=update: expected code in codec bench"),
        (["codec.decode=each", "privacy.noise=local"], "codec.decode=each: expected mean in codec bench"),
        (["privacy.clip.mode=adaptive"], "privacy.clip.mode=adaptive: expected fixed in codec bench"),
        (["--others", "99", "--priors", "moments"], ", the clients beside the cohort and as many for priors of private"),
        (["--others", "99", "--priors", "public"], ", the clients beside the cohort"),
        (["--codecs", "linear", "--sizes", "9999"], "expected at least one code that can be fitted; linear, public, 9999: Expected 1 <="),
    ],
)
def test_bad_input_is_one_line(arguments, says, tiny, tmp_path, capsys):
    assert cli.run(["codec", "bench", str(tiny / "config.yaml"), *arguments, "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert says in captured.err and captured.out == "" and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "says", "status"),
    [
        (["federation.local.lr=1e39"], "round 1: clients' updates are not finite; expected a smaller federation.local.lr", 2),
        (["federation.server={optimizer: sgd, lr: 1e38}", "federation.local.lr=1e6"], "round 1: the new adapter is not finite", 1),
    ],
)
def test_updates_without_a_figure_are_one_line(overrides, says, status, tiny, tmp_path, capsys):
    arguments = ["--rounds", "1", "--codecs", "identity", "--out", str(tmp_path / "out"), *overrides]
    assert cli.run(["codec", "bench", str(tiny / "config.yaml"), *arguments]) == status
    captured = capsys.readouterr()
    assert says in captured.err and "a bug" not in captured.err and captured.out == "" and not (tmp_path / "out").exists()


def test_a_code_without_a_clip_norm_is_its_own_failure(tiny, tmp_path, capsys, monkeypatch):
    """Public gradients whose codes are zero, as those of A alone at LoRA's start: the other codes are told."""
    arguments = ["--rounds", "1", "--sizes", "8", "--codecs", "linear,sketch", "--out", str(tmp_path / "out"), "--json"]
    monkeypatch.setattr(CODECS["sketch"], "encode", lambda self, updates: torch.zeros(len(updates), self.code_size))
    assert cli.run(["codec", "bench", str(tiny / "config.yaml"), *arguments]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [each["codec"] for each in answer["failed"]] == ["sketch"] and "privacy.clip.norm=auto" in answer["failed"][0]["reason"]
    assert next(row for row in answer["rows"] if row["codec"] == "linear")["kept_energy_mean"] is not None


def test_a_warm_start_that_diverges_is_one_line(tiny, tmp_path, capsys, own_cache):
    written = ["task.public=generated", "task.generate={prompt: 'a {label} film of {words}', count: 20, max_new_tokens: 4}"]
    overrides = [*written, "codec.public_labels=given", "codec.public_examples=10", "federation.warm_start={steps: 3, lr: 1e37}"]
    assert cli.run(["codec", "bench", str(tiny / "config.yaml"), *overrides, "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "is not finite; expected a smaller lr there" in captured.err and captured.out == ""


def test_the_configs_own_prior_has_its_weights(tiny, cohorts):
    config = load_config(str(tiny / "config.yaml"), ["codec.prior=public+random", "codec.weights=[1.0,3.0]"])
    rows = PublicGradients(cohorts.others[:20], cohorts.others[20:24])
    given = priors.Given(LAYOUT, rows.fit, priors.Past(), 0)
    for name, weights in [("public+random", [1.0, 3.0]), ("random+public", None)]:
        found = prior_of(Candidate("linear", name, 4), config, LAYOUT, cohorts, rows, 0)
        assert found.fingerprint() == priors.build(name, weights, given).fingerprint()
    assert priors.build("public+random", None, given).fingerprint() != priors.build("public+random", [1.0, 3.0], given).fingerprint()


def test_gradients_of_zero_have_no_metric_of_their_own():
    none = PublicGradients(torch.zeros(3, N), torch.zeros(1, N))
    assert adam_weights(LAYOUT, none) is None
