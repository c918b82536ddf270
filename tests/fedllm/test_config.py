"""The config: what is refused, in which words; and what bad input gets on the command line."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from fedllm import cli
from fedllm.config import Config, check_keys, load_config, save_config
from fedllm.errors import UserError
from fedllm.methods import METHODS, fit_rows, held_out_rows

CONFIGS = Path(__file__).parents[2] / "configs"
USER = ["privacy.unit=user", "task.columns.user=user", "federation.unit_sampling_rate=0.5"]


@pytest.fixture
def write(tmp_path):
    def make(text: str = "", name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return make


@pytest.fixture
def empty(write):
    return write()


# -- reading ---------------------------------------------------------------------------------------------------------------------------


def test_an_empty_file_is_the_defaults(empty):
    assert load_config(empty) == Config()


def test_later_wins_file_then_command_line(write):
    path = write("federation: {rounds: 7, clients: 50}\nlora: {targets: [k_proj]}\nseed: 3\n")
    config = load_config(path, ["federation.rounds=9", "federation.expected_cohort=5", "privacy.clip.norm=0.5", "lora.targets=[a,b]"])
    assert (config.federation.rounds, config.federation.clients, config.seed) == (9, 50, 3)
    assert config.privacy.clip.norm == 0.5 and config.lora.targets == ["a", "b"]
    assert load_config(path, ["seed=null", "federation.expected_cohort=5"]).seed is None


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_configs_of_the_repository_are_right(path):
    assert load_config(path).task.source


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["method=full_noise"],
        ["method=fedit", "seed=4"],
        ["codec.family=autoencoder", "codec.code_size=null", "codec.prior=moments", "privacy.clip.mode=adaptive"],
        [*USER, "privacy.clip.norm=0.25", "task.words=[good,bad]", 'task.prompt="{text}: is it good?"'],
    ],
)
def test_a_saved_config_reads_back_as_it_was(overrides, empty, tmp_path):
    config = load_config(empty, overrides)
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config
    assert dataclasses.asdict(load_config(tmp_path / "again.yaml")) == dataclasses.asdict(config)


@pytest.mark.parametrize("name", list(METHODS))
def test_a_method_fixes_its_parts_and_no_more(name, empty):
    config = load_config(empty, [f"method={name}", "federation.rounds=3"])
    for key, value in METHODS[name].parts.items():
        section, field = key.split(".")
        assert getattr(getattr(config, section), field) == value
    assert config.federation.rounds == 3


def test_without_privacy_nothing_is_quantized(empty):
    assert load_config(empty, ["privacy.enabled=false"]).codec.bits == 32


def test_public_rows_are_either_fitted_or_held_out():
    for count in range(5, 200):
        assert fit_rows(count) + held_out_rows(count) == count and held_out_rows(count) >= 1


# -- keys and types --------------------------------------------------------------------------------------------------------------------


def refusal(path, *overrides) -> str:
    with pytest.raises(UserError) as error:
        load_config(path, list(overrides))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("privacy.target.epsilom=3", "did you mean privacy.target.epsilon?"),
        ("federation.round=3", "did you mean federation.rounds?"),
        ("modell.name=x", "did you mean model?"),
        ("methd=x", "did you mean method?"),
        ("federation.server.learning=3", "expected one of optimizer, lr"),
        ("zzz=1", "expected one of model, task"),
        ("task.columns.txt=a", "did you mean task.columns.text?"),
    ],
)
def test_an_unknown_key_gets_the_nearest_right_one(override, hint, empty, write):
    key = override.split("=")[0]
    assert f"command line: unknown config key {key}; {hint}" in refusal(empty, override)
    nested = "1"
    for part in reversed(key.split(".")):
        nested = f"{{{part}: {nested}}}"
    path = write(nested, "file.yaml")
    assert f"{path}: unknown config key {key}; {hint}" in refusal(path)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("federation.rounds=many", "federation.rounds"),
        ("federation.rounds=2.5", "federation.rounds"),
        ("federation.rounds=true", "federation.rounds"),
        ("federation.rounds=", "federation.rounds"),
        ("federation.rounds=null", "federation.rounds"),
        ("privacy.enabled=maybe", "privacy.enabled"),
        ("privacy.target.epsilon=lots", "privacy.target.epsilon"),
        ("lora.targets=q_proj", "lora.targets"),
        ("federation.max_cohort=[3]", "federation.max_cohort"),
        ("seed=yes please", "seed"),
        ("model=smollm2-135m", "model"),
        ("privacy.clip=3", "privacy.clip"),
        ("federation.server.betas=[0.9,x]", "federation.server.betas"),
        ("model.name=null", "model.name"),
    ],
)
def test_a_wrong_type_names_the_key(override, key, empty):
    assert key in refusal(empty, override)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "a: [1, 2", "a: b: c", "\x00", "seed: ${nowhere.to.be.found}", "seed: ???"])
def test_a_file_that_is_no_config_is_one_line(text, write):
    assert "config.yaml" in refusal(write(text))


def test_a_file_that_is_not_text_is_one_line(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00seed")
    assert "config.yaml" in refusal(tmp_path / "config.yaml")


def test_no_file(tmp_path):
    assert "no such config file" in refusal(tmp_path / "none.yaml")
    assert "no such config file" in refusal(tmp_path)


@pytest.mark.parametrize("override", ["rounds", "=3", "--rounds", ""])
def test_an_override_without_key_or_value(override, empty):
    assert "expected key=value" in refusal(empty, override)


def test_the_schema_is_checked_to_the_bottom():
    check_keys({"privacy": {"target": {"epsilon": 1}}}, Config, "here")
    with pytest.raises(UserError, match="here: unknown config key privacy.target.epsilo"):
        check_keys({"privacy": {"target": {"epsilo": 1}}}, Config, "here")


# -- values ----------------------------------------------------------------------------------------------------------------------------

NAMES = {
    "model.dtype": "float31", "task.kind": "lables", "lora.train": "a", "federation.partition.kind": "idd",
    "federation.server.optimizer": "adm", "federation.transport": "simulate", "codec.bits": "12", "codec.family": "linaer",
    "codec.prior": "publik", "privacy.unit": "clients", "privacy.noise": "centrl", "privacy.noise_in": "codes",
    "privacy.clip.mode": "fix", "privacy.target.adversary": "servr", "engine.name": "torche", "parallel.mode": "non", "method": "dr_encodr",
}  # fmt: skip


@pytest.mark.parametrize("key", list(NAMES))
def test_a_wrong_name_lists_the_right_ones(key, empty):
    said = refusal(empty, f"{key}={NAMES[key]}")
    assert said.startswith(f"{key}={NAMES[key]}: expected one of ")


RANGES = [
    ("federation.clients", "0"), ("federation.rounds", "0"), ("federation.rounds", "-3"), ("federation.expected_cohort", "0"),
    ("federation.expected_cohort", "2001"), ("federation.max_cohort", "99"), ("federation.max_cohort", "2001"),
    ("federation.local.steps", "0"), ("federation.local.lr", "0"), ("federation.local.lr", "-1"), ("federation.local.lr", ".inf"),
    ("federation.server.lr", "0"), ("federation.server.lr", ".inf"), ("federation.server.lr", ".nan"),
    ("federation.server.momentum", "1"), ("federation.server.momentum", "-0.1"), ("federation.server.betas", "[0.9]"),
    ("federation.server.betas", "[0.9,1.0]"), ("federation.partition.alpha", "0"), ("lora.r", "0"), ("lora.alpha", "0"),
    ("task.eval_examples", "0"), ("task.monitor_examples", "0"), ("task.max_length", "7"), ("engine.batch_tokens", "63"),
    ("codec.refresh", "-1"), ("codec.public_examples", "4"), ("codec.warmup_rounds", "0"), ("codec.warmup_public_steps", "-1"),
    ("codec.fit_steps", "0"), ("codec.code_size", "0"), ("codec.code_size", "-8"), ("privacy.target.epsilon", "0"),
    ("privacy.target.epsilon", "-1"), ("privacy.target.epsilon", ".inf"), ("privacy.target.epsilon", ".nan"),
    ("privacy.target.delta", "0"), ("privacy.target.delta", "1"), ("privacy.target.delta", "1.5"), ("privacy.target.delta", "-1e-5"),
    ("privacy.stage1_share", "0"), ("privacy.stage1_share", "1"), ("privacy.clip.quantile", "0"), ("privacy.clip.quantile", "1"),
    ("privacy.clip.lr", "0"), ("privacy.clip.bit_multiplier", "0.5"), ("privacy.clip.norm", "0"), ("privacy.clip.norm", "-2"),
    ("privacy.clip.norm", "true"), ("privacy.clip.norm", "big"), ("privacy.clip.norm", ".inf"), ("privacy.clip.norm", ".nan"),
    ("privacy.clip.norm", "[1]"), ("seed", "-1"), ("seed", str(2**80)),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), RANGES)
def test_a_value_out_of_range_names_key_and_range(key, value, empty):
    said = refusal(empty, f"{key}={value}")
    assert said.startswith(f"{key}=") and "expected" in said


COMBINATIONS = [
    (["codec.family=linear", "codec.code_size=null"], "codec.code_size=null"),
    (["codec.family=coordinate", "codec.code_size=null"], "codec.code_size=null"),
    (["codec.family=autoencoder"], "codec.code_size=128: expected null"),
    (["codec.family=identity"], "codec.code_size=128: expected null"),
    (["codec.family=linear", "codec.prior=none"], "codec.prior=none: expected one of public, moments"),
    (["codec.code_size=129"], "codec.code_size=129: expected at most 128"),
    (["codec.family=autoencoder", "codec.code_size=null", "privacy.noise_in=update"], "privacy.noise_in=update: expected code"),
    (["privacy.clip.mode=adaptive", "privacy.noise_in=update"], "privacy.clip.mode=adaptive: expected fixed"),
    (["privacy.noise=central", "privacy.target.adversary=server"], "privacy.target.adversary=server: expected release"),
    ([*USER, "privacy.noise=central"], "codec.bits=16: expected 32"),
    ([*USER, "federation.partition.kind=dirichlet"], "federation.partition.kind=dirichlet: expected iid or column"),
    (["privacy.unit=user", "task.columns.user=user"], "federation.unit_sampling_rate: expected a rate"),
    (["privacy.unit=user", "federation.unit_sampling_rate=0.5"], "task.columns.user: expected the column"),
    ([*USER, "federation.unit_sampling_rate=0"], "federation.unit_sampling_rate=0"),
    ([*USER, "federation.unit_sampling_rate=1.1"], "federation.unit_sampling_rate=1.1"),
    (["task.public=movie-reviews"], "task.public=movie-reviews: expected a source other than"),
    (["task.public=null"], "task.public: expected a source of public text for codec.prior=public"),
    (["task.public=null", "codec.prior=moments", "privacy.clip.norm=1"], "task.public: expected a source of public text for codec.prior=mom"),
    (["method=full_noise", "task.public=null"], "privacy.clip.norm=auto: expected task.public"),
]


@pytest.mark.parametrize(("overrides", "says"), COMBINATIONS)
def test_what_makes_no_sense_together_is_refused(overrides, says, empty):
    assert refusal(empty, *overrides).startswith(says)


def test_what_makes_sense_is_not_refused(empty):
    load_config(empty, ["method=full_noise", "task.public=null", "privacy.clip.norm=1"])
    load_config(empty, ["method=fedit", "task.public=null"])
    load_config(empty, [*USER, "privacy.noise=central", "codec.bits=32"])
    load_config(empty, ["federation.expected_cohort=2000", "federation.max_cohort=2000"])
    load_config(empty, ["privacy.target.delta=0.01"])  # above 1/clients: a warning when it runs, no refusal


# -- the command line ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tiny, tmp_path, capfd):
    """command(overrides...): exit status and what the user reads."""

    def go(*overrides, config=None):
        arguments = ["train", str(config or tiny / "config.yaml"), f"output_dir={tmp_path / 'run'}", *overrides]
        status = cli.run(arguments)
        out, err = capfd.readouterr()
        assert out == ""
        return status, err

    return go


def edited(tiny, tmp_path, change) -> Path:
    path = tmp_path / "edited.csv"
    path.write_text(change((tiny / "train.csv").read_text()))
    return path


BAD_INPUT = [
    (["federation.roundz=3"], "did you mean federation.rounds?"),
    (["federation.rounds=x"], "federation.rounds"),
    (["task.source=/nowhere/train.csv"], "/nowhere/train.csv: no such file"),
    (["task.public=/nowhere/public.csv"], "/nowhere/public.csv: no such file"),
    (["task.columns.text=body"], "no column 'body'"),
    (["task.columns.label=class"], "no column 'class'"),
    (["task.columns.user=patient"], "no column 'patient'"),
    (["lora.targets=[q_proj,z_proj]"], "no linear module z_proj; it has"),
    (["lora.targets=[]"], "lora.targets"),
    (["model.name=/nowhere/model.gguf"], "no such file"),
    (["privacy.target.epsilon=0"], "privacy.target.epsilon=0"),
    (["privacy.target.delta=1"], "privacy.target.delta=1"),
    (["federation.expected_cohort=41"], "expected 1 <= expected_cohort <= 40"),
    (["codec.code_size=24", "lora.targets=[v_proj]", "lora.r=1", "lora.train=b"], "codec.code_size=24: expected at most 16"),
    (["codec.public_examples=61", "codec.code_size=8"], "60 texts, expected at least"),
    (["privacy.clip.mode=adaptive", "privacy.clip.bit_multiplier=0.51", "privacy.target.epsilon=0.1"], "bit"),
    (["federation.partition.kind=column"], "task.columns.user"),
    (["federation.partition.kind=dirichlet", "federation.clients=500"], "federation.clients=500"),
    (["task.eval_examples=160"], "too few to hold out"),
    (["task.words=[good,bad,ugly]"], "task.words"),
    (["task.prompt=no place"], "task.prompt"),
]


@pytest.mark.parametrize(("overrides", "says"), BAD_INPUT, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_bad_input_is_one_line_and_leaves_nothing(overrides, says, command, tmp_path):
    status, err = command(*overrides)
    lines = [line for line in err.splitlines() if "fedllm: error:" in line]
    assert status == 2 and len(lines) == 1 and says in lines[0] and "Traceback" not in err
    assert err.splitlines()[-1] == lines[0]
    assert not (tmp_path / "run").exists()


def test_an_unknown_label_in_the_test_file(command, tiny, tmp_path):
    path = edited(tiny, tmp_path, lambda text: text.replace("negative", "meh", 1))
    status, err = command(f"task.test={path}")
    assert status == 2 and "unknown label 'meh'" in err and not (tmp_path / "run").exists()


def test_a_copy_of_the_private_file_is_not_public(command, tiny, tmp_path):
    for public in (tiny / "train.csv", shutil.copy(tiny / "train.csv", tmp_path / "copy.csv")):
        status, err = command(f"task.public={public}")
        assert status == 2 and "task.public" in err and err.count("\n") == 1
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("left", ["results.json", "ledger.jsonl", "notes.txt"])
def test_a_folder_that_holds_another_run(left, command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / left).write_text("mine")
    status, err = command()
    assert status == 2 and "already holds a run" in err and err.count("\n") == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == [left] and (tmp_path / "run" / left).read_text() == "mine"


def test_a_folder_that_is_a_file(command, tmp_path):
    (tmp_path / "run").write_text("mine")
    assert command()[0] == 2 and (tmp_path / "run").read_text() == "mine"


def test_resuming_what_is_no_run(tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "none"):
        assert cli.run(["resume", str(tmp_path / folder)]) == 2
        assert capfd.readouterr().err.count("\n") == 1


def test_too_few_public_directions_is_one_line(command, tiny, tmp_path):
    (tmp_path / "same.csv").write_text("text\n" + "the film\n" * 40)
    status, err = command(f"task.public={tmp_path / 'same.csv'}")
    assert status == 2 and "directions the prior's" in err.splitlines()[-1]


def test_a_delta_above_one_over_clients_is_a_warning(command, tmp_path, monkeypatch):
    from fedllm import run

    monkeypatch.setattr(run, "_run", lambda *args: pytest.skip("reached the run, as it should") if args else None)
    said = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: said.append(words[0]))
    try:
        command("privacy.target.delta=0.2")
    finally:
        assert any("warning: privacy.target.delta=0.2 is not below 1/40" in line for line in said)
