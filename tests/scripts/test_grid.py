"""scripts/grid*.py: axes to variants, what is trained once for several, the public choice of a learning rate."""

import json
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
AXES = {
    "task": {"one": ["task.source=one"], "two": ["task.source=two"]},
    "method": {"dp_lora": ["method=dp_lora"], "fedit": ["method=fedit"], "unheard_of": ["method=unheard_of"]},
    "budget": {"eps3": ["privacy.target.epsilon=3"], "inf": ["privacy.enabled=false"]},
}
TUNE = {
    "axis": "task",
    "keys": {"federation.server.lr": {"values": [0.01, 0.1]}},
    "seed": 11,
    "tasks": {"third": {"for": ["one", "two"], "overrides": ["task.source=three"]}},
}
GRID = {"out": "runs/x", "seeds": [1], "reference": "fedit/inf", "axes": AXES, "skip": ["fedit/eps3"], "same": {"dp_lora/inf": "fedit/inf"}}


@pytest.fixture
def axes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import grid_axes

    yield grid_axes
    for name in ("grid_axes", "grid_report", "grid"):
        sys.modules.pop(name, None)


@pytest.fixture
def load(axes, tmp_path):
    def get(**changes):
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump(GRID | changes, sort_keys=False))
        return axes.load_grid(tmp_path / "grid.yaml")

    return get


def test_every_combination_but_what_is_skipped_or_unknown(load, capsys):
    grid = load()
    assert list(grid["variants"]) == [f"{task}-{rest}" for task in ("one", "two") for rest in ("dp_lora-eps3", "dp_lora-inf", "fedit-inf")]
    assert grid["variants"]["two-dp_lora-eps3"] == ["task.source=two", "method=dp_lora", "privacy.target.epsilon=3"]
    assert capsys.readouterr().err == "grid: no method unheard_of here; left out\n"


def test_what_is_the_same_is_trained_once_and_compared_within_its_task(axes, load):
    grid = load()
    assert axes.chosen(grid, []) == ["one-dp_lora-eps3", "one-fedit-inf", "two-dp_lora-eps3", "two-fedit-inf"]
    assert axes.chosen(grid, ["two"]) == ["two-dp_lora-eps3", "two-fedit-inf"]
    assert axes.chosen(grid, ["one-dp_lora-inf"]) == ["one-fedit-inf"]
    assert axes.reference_of(grid, "two-dp_lora-eps3") == "two-fedit-inf"
    with pytest.raises(axes.UserError, match=r"^--only nobody: expected one, dp_lora, eps3, inf, fedit, two, or a variant$"):
        axes.chosen(grid, ["dp_lora", "nobody"])
    with pytest.raises(axes.UserError, match=r"^--only nobody: expected a, b$"):
        axes.chosen({"variants": {"a": [], "b": []}}, ["nobody"])


def test_a_grid_extends_another_axis_by_axis(axes, load, tmp_path):
    load()
    larger = {"extends": "grid.yaml", "axes": {"budget": {"eps8": []}}, "skip": [], "same": {}}
    (tmp_path / "larger.yaml").write_text(yaml.safe_dump(larger))
    grid = axes.load_grid(tmp_path / "larger.yaml")
    assert list(grid["variants"]) == ["one-dp_lora-eps8", "one-fedit-eps8", "two-dp_lora-eps8", "two-fedit-eps8"]


def test_the_best_value_on_another_task_is_chosen_once_for_all_its_tasks(axes, load):
    trained = {}

    def run(name, overrides, seed):
        assert seed == 11 and "task.source=three" in overrides and not {"task.source=one", "task.source=two"} & set(overrides)
        value = float(overrides[-1].partition("=")[2])
        trained[name] = {"accuracy": 0.7, "loss": 0.5 if value == 0.1 else 0.6, "seconds": {"total": 5}}
        if "fedit" in name:
            trained[name] |= {"accuracy": 0.6, "loss": 0.4} if value == 0.01 else {}
        return trained[name]

    tuning = axes.Tuning(load(tune=TUNE), run, lambda name, seed: trained.get(name))
    assert tuning.choose("one-dp_lora-eps3", train=False) == []
    assert tuning.choose("one-dp_lora-eps3", train=True) == ["federation.server.lr=0.1"]  # as accurate, less loss
    assert tuning.choose("one-fedit-inf", train=True) == ["federation.server.lr=0.01"]  # whatever the accuracy
    assert tuning.choose("two-fedit-inf", train=False) == ["federation.server.lr=0.01"]
    report = tuning.report()
    assert (report["runs"], report["seconds"]) == (4, 20)
    assert report["choices"]["tune-third-fedit-inf"]["for"] == ["one-fedit-inf", "two-fedit-inf"]


def test_a_tuning_run_on_a_task_of_the_grid_is_that_tasks_run(axes, load):
    """Chosen on the other task; the run on it, with the same seed and value, stands for the variant itself."""
    tasks = {"one": {"for": ["two"]}, "two": {"for": ["one"]}}
    tuning = axes.Tuning(grid := load(tune=TUNE | {"tasks": tasks}), None, None)
    name, overrides = tuning.trials("one-dp_lora-eps3")[0.1]
    assert (name, overrides) == ("tune-two-dp_lora-eps3-0.1", [*grid["variants"]["two-dp_lora-eps3"], "federation.server.lr=0.1"])
    assert tuning.twin(overrides, 11) == name
    assert tuning.twin(overrides, 12) is None and tuning.twin([*overrides[:-1], "federation.server.lr=0.2"], 11) is None
    assert axes.Tuning(load(tune=TUNE), None, None).twin(overrides, 11) is None


@pytest.mark.parametrize(
    ("loss", "tried", "best"),
    [
        ({0.01: 3, 0.1: 4}, [0.01, 0.1], 0.01),
        ({0.01: 3, 0.1: 2, 1: 4}, [0.01, 0.1, 1], 0.1),
        ({0.01: 3, 0.1: 2, 1: 1, 10: 0}, [0.01, 0.1, 1, 10], 10),
    ],
)
def test_a_value_beyond_is_tried_where_the_largest_before_it_is_the_best(axes, load, loss, tried, best):
    trained = {}

    def run(name, overrides, seed):
        trained[name] = {"accuracy": 0.7, "loss": loss[float(overrides[-1].partition("=")[2])], "seconds": {"total": 5}}
        return trained[name]

    tune = TUNE | {"keys": {"federation.server.lr": {"values": [0.01, 0.1], "beyond": [1, 10]}}}
    tuning = axes.Tuning(load(tune=tune), run, lambda name, seed: trained.get(name))
    assert tuning.choose("one-dp_lora-eps3", train=True) == [f"federation.server.lr={best:g}"]
    assert list(trained) == [f"tune-third-dp_lora-eps3-{value:g}" for value in tried]
    report = tuning.report()
    assert report["values"] == {"federation.server.lr": [0.01, 0.1, 1, 10]}
    assert report["choices"]["tune-third-dp_lora-eps3"] == {
        "for": ["one-dp_lora-eps3", "two-dp_lora-eps3"],
        "key": "federation.server.lr",
        "loss": {f"{value:g}": loss[value] for value in tried},
        "chosen": best,
        "seconds": 5 * len(tried),
    }


def test_what_a_method_fixes_is_not_tuned(axes, load):
    methods = {"flora": ["method=flora"], "fedit": ["method=fedit"]}
    tuning = axes.Tuning(load(tune=TUNE, axes=AXES | {"method": methods}, skip=[], same={}), None, lambda name, seed: None)
    assert tuning.trials("one-flora-inf") == {} and tuning.choose("one-flora-inf", train=True) == []
    assert len(tuning.trials("one-fedit-inf")) == 2
    assert tuning.report()["runs"] == 0
    local = {"keys": TUNE["keys"] | {"federation.local.lr": {"values": [1]}}}
    tuning = axes.Tuning(load(tune=TUNE | local, axes=AXES | {"method": methods}, skip=[], same={}), None, None)
    assert [overrides[-1] for _, overrides in tuning.trials("one-flora-inf").values()] == ["federation.local.lr=1"]
    assert tuning.key("one-fedit-inf") == "federation.server.lr"


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs" / "grids").glob("*.yaml")))
def test_no_grid_asks_for_what_its_method_fixes(axes, name):
    from fedllm.methods import METHODS

    grid = axes.load_grid(ROOT / "configs" / "grids" / f"{name}.yaml")
    tuning = axes.Tuning(grid, None, None)
    cells = list(grid["variants"].values())
    if tuning.plan:
        cells += [overrides for cell in axes.chosen(grid, []) for _, overrides in tuning.trials(cell).values()]
    for overrides in cells:
        asked = dict(item.split("=", 1) for item in [*grid.get("common", []), *overrides])
        method = METHODS[asked.get("method", "dr_encoder")]
        parts = method.parts | method.defaults
        assert {key: yaml.safe_load(value) for key, value in asked.items() if key in parts} == {
            key: parts[key] for key in parts if key in asked
        }


@pytest.mark.parametrize("name", ["methods", "methods_full"])
def test_cells_of_the_method_grids_are_configs_tuned_on_other_text(axes, name):
    from fedllm.config import load_config

    grid = axes.load_grid(ROOT / "configs" / "grids" / f"{name}.yaml")
    tuning = axes.Tuning(grid, None, None)
    names = axes.chosen(grid, [])
    for cell in names[:: len(names) // 9]:  # of every task and most methods; a config takes a third of a second
        config = load_config(ROOT / grid["config"], [*grid["common"], *grid["variants"][cell]])
        assert len(set(tuning.trials(cell))) == 5
        for _, overrides in list(tuning.trials(cell).values())[:1]:
            trial = load_config(ROOT / grid["config"], [*grid["common"], *overrides])
            assert config.task.source not in (trial.task.source, trial.task.public)
            assert (trial.method, trial.federation.expected_cohort) == (config.method, config.federation.expected_cohort)
            assert (trial.privacy.enabled, trial.privacy.target.epsilon) == (config.privacy.enabled, config.privacy.target.epsilon)


def test_a_run_of_another_process_is_waited_for(axes, load, tmp_path, monkeypatch, capsys):
    import fcntl

    import grid

    monkeypatch.chdir(tmp_path)
    runner = grid.Runner(load(config=str(ROOT / "configs/quickstart.yaml")) | {"kept": None})
    where = runner.folder("one-fedit-inf", 1)
    where.mkdir(parents=True)
    flock = fcntl.flock
    with open(where.parent / f".{where.name}.lock", "w") as other:
        flock(other, fcntl.LOCK_EX)

        def finished_meanwhile(file, how):
            if how == fcntl.LOCK_EX:  # it would wait now
                (where / "results.json").write_text('{"accuracy": 0.5, "accuracy_before": 0.4, "loss_before": 1.0}')
                flock(other, fcntl.LOCK_UN)
            flock(file, how)

        monkeypatch.setattr(fcntl, "flock", finished_meanwhile)
        assert runner.run("one-fedit-inf", ["method=fedit"], 1)["accuracy"] == 0.5  # read after the wait, not trained
    assert capsys.readouterr().err.count("waiting for it") == 1


def test_an_override_is_for_every_run_over_the_grids_own_and_elsewhere(axes, load, tmp_path, monkeypatch):
    import grid

    import fedllm.run

    monkeypatch.chdir(tmp_path)
    plain = load(config=str(ROOT / "configs/quickstart.yaml"), common=["model.dtype=bfloat16"])
    runner = grid.Runner(grid.overridden(plain, ["model.dtype=float32", "lora.targets=[q_proj,k_proj]"]) | {"kept": None})
    results = {"accuracy": 0.5, "accuracy_before": 0.4, "loss_before": 1.0}
    trained = []
    monkeypatch.setattr(fedllm.run, "train", lambda config, before: trained.append(config) or results)
    runner.run("one-fedit-inf", ["lora.r=2"], 1)
    assert (trained[0].model.dtype, trained[0].lora.targets, trained[0].lora.r) == ("float32", ["q_proj", "k_proj"], 2)
    assert trained[0].output_dir == "runs/x-model.dtype=float32-lora.targets=_q_proj_k_proj_/one-fedit-inf-seed1"
    assert grid.overridden(plain, []) == plain
    for wrong in ("dr_encoder", "seed=3", "output_dir=here"):
        with pytest.raises(axes.UserError, match=f"^{wrong}: expected key=value"):
            grid.overridden(plain, [wrong])


def test_no_two_processes_keep_the_same_results_at_once(axes, load, tmp_path, monkeypatch):
    import fcntl

    import grid

    monkeypatch.chdir(tmp_path)
    runner = grid.Runner(load(config=str(ROOT / "configs/quickstart.yaml")) | {"kept": None})
    seen = []

    def keep(name, seed, results):
        where = runner.folder(name, seed)
        with open(where.parent / f".{where.name}.lock", "w") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        seen.append(name)

    monkeypatch.setattr(runner, "keep", keep)
    results = {"accuracy": 0.5, "accuracy_before": 0.4, "loss_before": 1.0}
    runner.take_over("taken", 1, results)
    runner.folder("read", 1).mkdir(parents=True)
    (runner.folder("read", 1) / "results.json").write_text(json.dumps(results))
    runner.run("read", ["method=fedit"], 1)
    assert seen == ["taken", "read"]


def test_an_untrained_head_is_another_one_with_another_seed(axes):
    import grid

    from fedllm.schema import Config

    one, two = Config(seed=1), Config(seed=2)
    assert grid.untrained(one) == grid.untrained(two)
    one.task.kind = two.task.kind = "classify"
    assert grid.untrained(one) != grid.untrained(two)


def test_behind_counts_means_and_in_brackets_what_is_beyond_its_interval(axes, load):
    import grid_report

    grid = load(reference="fedit")

    def row(task, method, difference):
        accuracy = {"seeds": [1, 2], "accuracy": [0.5, 0.6], "claimed": None, "epsilon_release": 3.0}
        return {"task": task, "method": method, "budget": "eps3", "difference": difference} | accuracy

    clear, within = ({"mean": -2.0, "half_width": width} for width in (1.5, 2.5))
    rows = [row("one", "dp_lora", clear), row("two", "dp_lora", within), row("one", "fedit", None)]
    header, lines = grid_report.side_by_side(grid, rows)
    assert header[-1] == "tasks where behind fedit (beyond the interval)"
    assert [line[-1] for line in lines] == ["2 of 2 (1)", ""]


def test_a_variants_total_error_is_that_of_its_codec_prior_and_parts(axes, load, tmp_path):
    import grid_report

    def found(*rows):
        return {"rows": [dict(zip(("codec", "prior", "code_size", "total_error"), row, strict=True)) for row in rows]}

    one = found(("chain", "public", 64, 0.1), ("topk", "none", 96, 0.4), ("linear", "public", 64, 0.2))
    other = found(("chain", "public", 64, 0.5), ("linear", "moments", 64, 0.9))
    bench = []
    for first, rows in (("allocation", one), ("coordinate", other)):
        (tmp_path / f"{first}.json").write_text(json.dumps(rows))
        bench.append({"file": str(tmp_path / f"{first}.json"), "parts": [first, "linear"]})
    chain = ["codec.family=chain", "codec.code_size=64"]
    lossy = ["codec.family=topk", "codec.code_size=96", "privacy.enabled=false"]
    variants = {
        "one": [*chain, "codec.parts=[allocation,linear]"],
        "other": [*chain, "codec.parts=[coordinate,linear]"],
        "moments": ["codec.family=linear", "codec.code_size=64", "codec.prior=moments", "codec.fit_at=server"],
        "lossy": lossy,
        "plain": ["codec.family=linear", "codec.code_size=64", "privacy.enabled=false"],
        "absent": ["codec.family=sketch", "codec.code_size=64"],
    }
    grid = {"config": ROOT / "configs/quickstart.yaml", "bench": bench, "variants": variants}
    sizes = {"lossy": 96}
    got = {name: grid_report.total_error(grid, name, sizes.get(name, 64)) for name in variants}
    assert got == {"one": 0.1, "other": 0.5, "moments": 0.9, "lossy": 0.4, "plain": None, "absent": None}
